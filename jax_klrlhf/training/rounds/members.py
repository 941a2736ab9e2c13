r"""Many rewards as one belief: heads on one trunk, and the worst mixture of members.

* :func:`heads`: an ensemble that costs one reward model: M heads on one trunk, fitted together.
* :func:`worst_mixture`: :mod:`core.saddle` for language models. Between two policy updates the
  weights of the members take one step against what the policy is worth to each of them; max-min
  over groups, or Lagrange multipliers of constraints, by the step that is handed in.

Axes: ``B`` prompts, ``K`` responses, ``M`` members or heads.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_klrlhf.core import saddle
from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import heads as many
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.reward import RewardParams
from jax_klrlhf.training import tasks
from jax_klrlhf.training.rounds import beliefs
from jax_klrlhf.training.rounds.beliefs import Combine, Origin
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.fitting import Fitting
from jax_klrlhf.training.rounds.parts import Comparisons, Mixture, Policies, Reward, Scored
from jax_klrlhf.training.rounds.samplers import Draw
from jax_klrlhf.training.tasks import Rewarded, Task


class Heads(NamedTuple):
    """What the heads say of a batch of pairs, and how much each counts a row."""

    reward: Float[Array, "B M K"]
    weight: Float[Array, "B M"]
    label: Float[Array, " B"] | None
    length: Any


def bootstrap(batch: Any, members: int) -> Float[Array, "B M"]:
    """Exponential weights, the Bayesian bootstrap: a row's depend on its tokens and the head alone.

    So a head sees the same data in every epoch, whatever the padding, and after a run is resumed.
    """
    ids, lengths = batch.responses.ids, batch.responses.lengths
    samples, width = (jnp.arange(n, dtype=jnp.uint32) for n in ids.shape[1:])
    place = width[None, None] + (samples * jnp.uint32(1 << 16))[None, :, None]
    keep = jnp.arange(ids.shape[-1])[None, None] < lengths[..., None]
    hashed = (ids.astype(jnp.uint32) + 1) * (2 * place + 1) * jnp.uint32(2654435761)
    mark = jnp.sum(jnp.where(keep, hashed, 0), axis=(1, 2), dtype=jnp.uint32)
    key = jax.random.key(0)
    draw = lambda mark: jax.random.exponential(jax.random.fold_in(key, mark), (members,))  # noqa: E731
    return jax.vmap(draw)(mark)


def heads_task(
    reward: Callable[[Any, Ragged, Ragged], Float[Array, "M B K"]],
    *,
    centring: float = 0.0,
    preference: PreferenceModel = bradley_terry,
    resample: bool = False,
) -> Task:
    """:func:`tasks.bradley_terry_reward` of every head, on weights of its own with ``resample``."""
    single = tasks.bradley_terry_reward(
        lambda *_: jnp.zeros((0, 2)), centring=centring, preference=preference
    )

    def score(params: Any, ref_params: Any, batch: Any) -> Heads:
        del ref_params
        found = jnp.moveaxis(reward(params, batch.prompts, batch.responses), 0, 1)
        shape = found.shape[:2]
        weight = bootstrap(batch, shape[1]) if resample else jnp.ones(shape, found.dtype)
        return Heads(found, weight, batch.label, batch.responses.lengths)

    def loss(given: Heads) -> Float[Array, " B"]:
        def head(reward: Array) -> Array:
            return single.loss(Rewarded(reward, given.label, None, given.length))

        return jnp.mean(given.weight * jax.vmap(head, in_axes=1, out_axes=1)(given.reward), 1)

    def report(given: Heads) -> Any:
        return single.report(Rewarded(given.reward.mean(1), given.label, None, given.length))

    return Task(score=score, loss=loss, report=report, names=single.names)


def heads(
    model: LanguageModel,
    params: RewardParams,
    *,
    fitting: Fitting,
    combine: Combine | None = None,
    origin: Origin | None = None,
    pooling: Callable[[Array, Array, Array], Array] = rewards.last,
    centring: float = 0.01,
    preference: PreferenceModel = bradley_terry,
    resample: bool = True,
    rows: int = 64,
) -> Reward:
    """:func:`.beliefs.ensemble` of the heads of ``params`` (:func:`models.heads.init` makes them).

    Trunk and heads are fitted together, from ``params`` again each round, and a prompt is read
    once, whatever the number of heads. With ``resample`` each head learns from a bootstrap of the
    comparisons (:func:`bootstrap`); a shared trunk still shares its errors ("finetune" ensembles,
    arXiv 2312.09244: members that were pretrained apart differ more).

    Raises:
        ValueError: for one head.
    """
    if params.head.ndim != 2 or params.head.shape[0] < 2:
        raise ValueError(
            f"heads: params.head has shape {params.head.shape}, expected [members, dim] with two "
            "members or more; models.heads.init makes them"
        )

    def reward(params: Any, prompts: Ragged, responses: Ragged) -> Array:
        return many.rewards(model, params, prompts, responses, pooling=pooling)

    step = fitting.compile(
        heads_task(reward, centring=centring, preference=preference, resample=resample)
    )
    program = mapped(
        lambda *given: jnp.moveaxis(reward(*given), 0, 1), rows=rows, mesh=fitting.mesh
    )

    def fit(
        key: Any, belief: Any, comparisons: Sequence[Comparisons], policies: Policies
    ) -> RewardParams:
        del belief, policies
        return step(key, params, Mixture(comparisons, None)).params if comparisons else params

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        ask = lambda responses: np.moveaxis(program(belief, prompts, responses), 1, 0)  # noqa: E731
        found = ask(responses)
        beside = found if origin is None else ask(origin(policies, prompts))
        return beliefs.combined(found, beside, combine or beliefs.mean)

    return Reward(init=params, fit=fit, score=score)


class Played(NamedTuple):
    """The members' states, their weights, and what the policy was last worth to each of them."""

    members: tuple[Any, ...]
    weight: Float[np.ndarray, " M"]
    value: Float[np.ndarray, " M"]


MAX_MIN = partial(saddle.simplex_step, rate=1.0)


def worst_mixture(
    members: Sequence[Reward],
    *,
    key: Key[Array, ""],
    prompts: Ragged,
    draw: Draw,
    step: Callable[[Array, Array], Array] = MAX_MIN,
    weight: Sequence[float] | None = None,
    threshold: Sequence[float] | None = None,
    nominal: Reward | None = None,
) -> Reward:
    r"""The reward ``nominal + sum_m w_m r_m``, whose weights play against the policy.

    At each fit the policy's worth to each member is measured, in nats over pi0: the mean over
    ``prompts`` and ``draw.samples`` responses of the policy, less that over as many of pi0; then
    ``weight <- step(weight, value - threshold)``. :func:`core.saddle.simplex_step` (the default, at
    rate 1) is max-min over groups (MaxMin-RLHF, arXiv 2402.08925);
    :func:`core.saddle.cone_step` with a ``threshold`` and a ``nominal`` reward is constrained and
    safe RLHF, for which the weights begin at 0. The *averaged* policy converges; keep several.

    Raises:
        ValueError: where a length differs from the number of members.
    """
    members = tuple(members)
    count = len(members)
    first = np.full(count, 1 / count) if weight is None else np.asarray(weight, float)
    bar = np.zeros(count) if threshold is None else np.asarray(threshold, float)
    if first.shape != (count,) or bar.shape != (count,):
        raise ValueError(
            f"worst_mixture: {count} members, {first.size} weights, {bar.size} thresholds"
        )

    def of_members(
        belief: Any, policies: Policies, prompts: Ragged, responses: Ragged
    ) -> Float[np.ndarray, "M B K"]:
        pairs = zip(members, belief.members, strict=True)
        scored = [m.score(b, policies, prompts, responses).reward for m, b in pairs]
        return np.stack(scored)

    def fit(key_fit: Any, belief: Any, comparisons: Any, policies: Policies) -> Played:
        states = tuple(
            member.fit(jax.random.fold_in(key_fit, number), state, comparisons, policies)
            for number, (member, state) in enumerate(zip(members, belief.members, strict=True))
        )
        belief = belief._replace(members=states)
        worth = [
            of_members(belief, policies, prompts, draw(key, params, prompts)).mean((1, 2))
            for params in (policies.current, policies.base)
        ]
        value = (worth[0] - worth[1]).astype(np.float32)
        moved = step(jnp.asarray(belief.weight), jnp.asarray(value - bar.astype(np.float32)))
        return Played(states, np.asarray(moved), value)

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        found = of_members(belief, policies, prompts, responses)
        mixed = np.tensordot(belief.weight, found, 1)
        if nominal is not None:
            mixed = mixed + nominal.score(nominal.init, policies, prompts, responses).reward
        centred = found - found.mean(-1, keepdims=True)
        return Scored(mixed.astype(np.float32), centred.std(0).astype(np.float32))

    start = Played(
        tuple(member.init for member in members),
        first.astype(np.float32),
        np.zeros(count, np.float32),
    )
    return Reward(init=start, fit=fit, score=score)
