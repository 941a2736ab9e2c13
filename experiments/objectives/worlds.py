"""The two exact worlds: a linear bandit with a tabular policy, and a transformer whose every
response is listed.

Axes: ``B`` contexts or prompts, ``N`` all responses, ``C`` their tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from experiments.exact_lm import world as exact_lm
from experiments.objectives.exact import World
from jax_klrlhf import bandit
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring

Build = Callable[[Key[Array, ""], Array], World]
"""A world of a seed and a coefficient."""


def linear(*, contexts: int, actions: int, dim: int, bound: float, coverage: float) -> Build:
    """A reward linear in features; a logit for each action of each context."""

    def build(key: Key[Array, ""], kl_coef: Array) -> World:
        problem = bandit.sphere(
            key, contexts=contexts, actions=actions, dim=dim, kl_coef=kl_coef, bound=bound,
            coverage=coverage,
        )  # fmt: skip
        every = lambda logits: jax.nn.log_softmax(logits)[..., None]  # noqa: E731
        return World(
            start=problem.setting.ref_log_prob,
            every=every,
            at=lambda logits, drawn: jnp.take_along_axis(every(logits), drawn[..., None], 1),
            token_where=jnp.ones((contexts, actions, 1), bool),
            reward=problem.reward,
        )

    return build


def language(size: exact_lm.Config, *, seed: int) -> Build:
    """`experiments/exact_lm`'s network, pi0 trained once; every seed has a reward of its own,
    linear in pi0's hidden features."""
    made = exact_lm.build(size, seed=seed)
    prompts = Ragged(*(jnp.asarray(x) for x in made.prompts))
    every = Ragged(*(jnp.asarray(np.asarray(x)) for x in made.every))
    rows, count = prompts.ids.shape[0], every.ids.shape[0]
    wide = Ragged(*(jnp.broadcast_to(x[None], (rows, *x.shape)) for x in every))
    where = jnp.broadcast_to(every.mask[None], (rows, count, every.ids.shape[1]))
    phi, base = jnp.asarray(made.phi, jnp.float32), jnp.asarray(np.exp(made.base), jnp.float32)

    def tokens(params, responses):
        return scoring.token_log_prob(
            made.model, params, prompts, responses, chunk=responses.ids.size
        )

    def build(key: Key[Array, ""], kl_coef: Array) -> World:
        del kl_coef
        reward = phi @ jax.random.normal(key, (phi.shape[-1],))
        centred = reward - jnp.sum(base * reward, -1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(jnp.sum(base * centred**2, -1)))
        return World(
            start=made.params,
            every=lambda params: tokens(params, wide),
            at=lambda params, drawn: tokens(params, Ragged(every.ids[drawn], every.lengths[drawn])),
            token_where=where,
            reward=reward * size.reward_std / deviation,
        )

    return build
