"""Who answers the prompts: the main agent, pi0, another temperature, an earlier policy, a pool.

The exploration of arXiv 2312.11456 is non-symmetric: one *main agent* plays the best policy so far
and a second, the *enhancer*, tries something else. A sampler is a mixture of agents; the first is
the main agent, and every response carries the number of the one who gave it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jax_klrlhf import placement
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import continuous, partition, sampling
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.logits import Warp
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import Drawn, Policies, Sampler, ragged, token_rows
from jax_klrlhf.training.state import cast_floating


@dataclass(frozen=True, kw_only=True)
class Draw:
    """``draw(key, params, prompts) -> Ragged [B, K, C]``: how a policy is sampled from.

    A response depends on the key, its prompt and the prompt's row number, not on ``rows``, the
    prompts that are answered at one time (up to the rounding of matrix products of other shapes).

    ``mesh`` is the one to *sample* on. Parameters that lie on another (that of training) are cast
    to ``compute_dtype`` and moved to it once for all prompts, and the copy is let go of at the end:
    a decoding step on the training mesh would gather every weight over ``fsdp`` for each token.
    """

    model: LanguageModel
    samples: int
    """Responses to each prompt, K."""
    max_new_tokens: int
    stop: tuple[int, ...] = ()
    pad_id: int = 0
    temperature: float = 1.0
    """0, with one sample, is greedy decoding."""
    top_k: int | None = None
    top_p: float | None = None
    rows: int = 256
    continuous: bool = False
    """As prompts are answered the next ones take their places (:mod:`.models.continuous`): still
    ``rows`` at one time. By default the next ``rows`` begin when the last of these has ended."""
    mesh: Mesh | None = None
    compute_dtype: Any = None
    shardings: Callable[[Any, Mesh], Any] = partition.shardings
    """How parameters that are moved lie on ``mesh``; for trees that are not the library's, one's
    own."""
    weights: Callable[[Any, Any], Any] | None = None
    """What becomes of the parameters, given them and ``compute_dtype``, once for all prompts and
    before they move: :func:`.quantized.weights` for eight bits. None casts them. What is drawn, and
    its log-probability, is then of *those* weights."""
    _program: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"samples and max_new_tokens must be at least 1, got {self.samples} and "
                f"{self.max_new_tokens}"
            )
        if not self.temperature >= 0 or (self.temperature == 0 and self.samples > 1):
            raise ValueError(
                f"temperature must be positive, got {self.temperature}: all samples of a greedy "
                "policy are one response"
            )
        rows = None if self.continuous else self.rows
        object.__setattr__(self, "_program", mapped(self._batch, rows=rows, mesh=self.mesh))

    def __call__(self, key: Key[Array, ""], params: Any, prompts: Ragged) -> Ragged:
        """K responses to every prompt; raises as :meth:`with_log_prob`."""
        return self.with_log_prob(key, params, prompts)[0]

    def with_log_prob(
        self, key: Key[Array, ""], params: Any, prompts: Ragged
    ) -> tuple[Ragged, np.ndarray]:
        """The responses, and the sampler's log-probability of each under the model, ``[B, K]``.

        Raises:
            ValueError: where a prompt leaves no room for ``max_new_tokens``, or is empty.
        """
        lengths = np.asarray(prompts.lengths)
        longest = int(lengths.max())
        if longest + self.max_new_tokens > self.model.max_length or lengths.min() < 1:
            raise ValueError(
                f"prompts of {lengths.min()} to {longest} tokens do not fit: each has at least "
                f"one, and with max_new_tokens={self.max_new_tokens} at most the model's "
                f"{self.model.max_length}; cut prompts or ask for fewer new tokens."
            )
        width = min(sampling.bucket(longest), self.model.max_length)
        ids = np.asarray(prompts.ids)[:, :width]
        ids = np.pad(ids, ((0, 0), (0, width - ids.shape[1])))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(ids), dtype=np.uint32))
        params = self._moved(params)
        drawn, log_prob = self._program(params, jax.random.key_data(keys), ragged(ids, lengths))
        return ragged(*drawn), log_prob

    def _moved(self, params: Any) -> Any:
        """The parameters where they are sampled with; as they are where they lie there already."""
        lie = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
        meshes = {at.mesh for at in lie if isinstance(at, jax.NamedSharding)}
        there = self.mesh is None or meshes <= {self.mesh}
        # In their own type first: half of what travels, and of what is held twice.
        if self.weights is not None:
            params = self.weights(params, self.compute_dtype)
        elif not there:
            params = _cast(params, self.compute_dtype)
        if self.mesh is None or (there and self.weights is None):
            return params
        return placement.reshard(params, self.shardings(params, self.mesh))

    def _batch(self, params: Any, keys: Array, prompts: Ragged) -> tuple[Ragged, Array]:
        warp = Warp(
            temperature=None if self.temperature in (0.0, 1.0) else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        if self.weights is None:
            params = cast_floating(params, self.compute_dtype)
        sample = sampling.sample
        if self.continuous:
            parts = placement.parts(self.mesh)
            slots = -(-self.rows // parts) * parts
            sample = partial(continuous.sample, slots=slots, parts=parts)
        drawn = sample(
            jax.random.wrap_key_data(keys),
            self.model,
            params,
            prompts,
            warp,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            greedy=self.temperature == 0,
            stop=self.stop,
            pad_id=self.pad_id,
        )
        return drawn.responses, drawn.log_prob


_cast = jax.jit(cast_floating, static_argnums=1)


@dataclass(frozen=True, kw_only=True)
class Agent:
    """A policy among those at hand, and how it is sampled from."""

    policy: Callable[[Policies], Any]
    """:func:`current`, :func:`base`, :func:`earlier` of a number, or a function of one's own."""
    draw: Draw


def current(policies: Policies) -> Any:
    """The main agent's parameters."""
    return policies.current


def base(policies: Policies) -> Any:
    """pi0's parameters: the enhancer of Option II."""
    return policies.base


def earlier(back: int) -> Callable[[Policies], Any]:
    """The policy of ``back`` rounds before the current one, or pi0 where there were fewer."""
    if back < 0:
        raise ValueError(f"earlier: back must be at least 0, got {back}")
    return lambda policies: policies.earlier[max(0, len(policies.earlier) - 1 - back)]


def mixture(*agents: Agent) -> Sampler:
    """Every agent answers every prompt; responses stand in the agents' order.

    Raises:
        ValueError: without an agent.
    """
    if not agents:
        raise ValueError("mixture: no agent; the first one given is the main agent.")

    def sampler(key: Key[Array, ""], policies: Policies, prompts: Ragged) -> Drawn:
        found = [
            agent.draw(jax.random.fold_in(key, number), agent.policy(policies), prompts)
            for number, agent in enumerate(agents)
        ]
        width = max(f.ids.shape[-1] for f in found)
        ids = [np.pad(f.ids, ((0, 0), (0, 0), (0, width - f.ids.shape[-1]))) for f in found]
        count = [f.ids.shape[1] for f in found]
        agent = np.repeat(np.arange(len(agents), dtype=np.int32), count)
        return Drawn(
            ragged(*prompts),
            ragged(np.concatenate(ids, 1), np.concatenate([f.lengths for f in found], 1)),
            np.broadcast_to(agent, (len(ids[0]), agent.size)).copy(),
        )

    return sampler


def main_agent(draw: Draw) -> Sampler:
    """The main agent alone."""
    return mixture(Agent(policy=current, draw=draw))


def against_base(main: Draw, other: Draw | None = None) -> Sampler:
    """The main agent and pi0, the enhancer of Option II; ``other`` is how pi0 is sampled from."""
    return mixture(Agent(policy=current, draw=main), Agent(policy=base, draw=other or main))


def temperatures(*draws: Draw) -> Sampler:
    """The main agent sampled in several ways; the first is its own."""
    return mixture(*(Agent(policy=current, draw=draw) for draw in draws))


def pool(prompts: Ragged, responses: Ragged) -> Sampler:
    """Responses that were recorded, in the place of a policy's: the pool of active learning.

    ``responses`` are ``[N, K, C]``, of ``prompts [N, P]``. ValueError where a prompt was not
    recorded.
    """
    table = {row: number for number, row in enumerate(token_rows(prompts))}

    def sampler(key: Key[Array, ""], policies: Policies, asked: Ragged) -> Drawn:
        del key, policies
        missing = [number for number, row in enumerate(token_rows(asked)) if row not in table]
        if missing:
            raise ValueError(f"pool: prompt {missing[0]} has no recorded responses; leave it out.")
        at = np.array([table[row] for row in token_rows(asked)])
        found = ragged(np.asarray(responses.ids)[at], np.asarray(responses.lengths)[at])
        return Drawn(ragged(*asked), found, np.zeros(found.lengths.shape, np.int32))

    return sampler
