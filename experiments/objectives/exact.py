"""Training one loss in a world whose every response is listed, as one scan; and what it came to.

Axes: ``B`` contexts or prompts, ``N`` all responses, ``C`` their tokens, ``K`` draws.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.core import (
    divergence,
    fdivergence,
    gibbs,
    group_losses,
    measure,
    numerics,
    regularized,
)

PARTS = 4
"""Laws are looked at after each fourth of the steps."""


class World(NamedTuple):
    """A policy class over listed responses."""

    start: Any
    """Parameters of pi0."""
    every: Callable[[Any], Float[Array, "B N C"]]
    """Log-probability of each token of all responses, under parameters."""
    at: Callable[[Any, Int[Array, "B K"]], Float[Array, "B K C"]]
    """The same of some of them, by number: what is differentiated."""
    token_where: Bool[Array, "B N C"]
    reward: Float[Array, "B N"]


def train(
    key: Key[Array, ""],
    kl_coef: Array,
    world: World,
    *,
    make: Callable[[Array], group_losses.GroupLoss],
    samples: int,
    steps: int,
    learning_rate: float,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """One loss at one coefficient, on ``samples`` draws of the policy at each context and step.

    Returns the law at the end and that after three fourths of the steps.
    """
    loss, inner = make(kl_coef), max(1, steps // PARTS)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.linear_schedule(learning_rate, 0.0, inner * PARTS)),
    )

    def law(params: Any) -> tuple[Array, Array]:
        token = jnp.where(world.token_where, world.every(params), 0)
        return token, token.sum(-1)

    ref_token, _ = law(world.start)

    def step(carry: Any, number: Array) -> tuple[Any, None]:
        params, state = carry
        token, log_prob = law(params)
        cumulative = jnp.cumsum(jnp.exp(log_prob), -1)
        uniform = jax.random.uniform(
            jax.random.fold_in(key, number), (*cumulative.shape[:-1], samples)
        )
        above = uniform[..., None] * cumulative[:, None, -1:] > cumulative[:, None]
        drawn = jnp.minimum(jnp.sum(above, -1), cumulative.shape[-1] - 1)
        of = lambda x: jnp.take_along_axis(x, drawn.reshape(drawn.shape + (1,) * (x.ndim - 2)), 1)  # noqa: E731

        def total(params: Any) -> Array:
            return jnp.mean(
                loss(
                    group_losses.Group(
                        token_log_prob=world.at(params, drawn),
                        reward=of(world.reward),
                        token_where=of(world.token_where),
                        ref_token_log_prob=of(ref_token),
                        old_token_log_prob=of(token),
                    )
                )
            )

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optimizer.update(jax.grad(total)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

    def part(carry: Any, number: Array) -> tuple[Any, Array]:
        carry, _ = jax.lax.scan(step, carry, number * inner + jnp.arange(inner))
        return carry, law(carry[0])[1]

    begin = (world.start, optimizer.init(world.start))
    _, laws = jax.lax.scan(part, begin, jnp.arange(PARTS))
    return laws[-1], laws[-2]


def listed(world: World) -> Float[Array, "B N"]:
    """log pi0 of every response."""
    return jnp.where(world.token_where, world.every(world.start), 0).sum(-1)


def variation(first: Float[Array, "B N"], second: Float[Array, "B N"]) -> Float[Array, ""]:
    """Mean total variation."""
    return jnp.mean(jnp.sum(jnp.abs(jnp.exp(first) - jnp.exp(second)), -1) / 2)


def worth(
    log_prob: Float[Array, "B N"],
    earlier: Float[Array, "B N"],
    world: World,
    kl_coef: Array,
) -> dict[str, Array]:
    """What a law is worth, and how far it is from an earlier one: all of it exact."""
    reward, ref = world.reward, listed(world)
    optimum = gibbs.log_prob(reward, ref, kl_coef=kl_coef)
    forward = regularized.log_prob(reward, ref, kl_coef=kl_coef, divergence=fdivergence.forward_kl)
    return {
        "gap": jnp.mean(gibbs.gap(log_prob, reward, ref, kl_coef=kl_coef)),
        "reward": jnp.mean(
            numerics.expectation(log_prob, reward) - numerics.expectation(ref, reward)
        ),
        "KL": jnp.mean(divergence.categorical(log_prob, ref)),
        "below the frontier": measure.frontier_gap(log_prob, reward, ref),
        "TV to Gibbs": variation(log_prob, optimum),
        "TV to forward KL": variation(log_prob, forward),
        "moved in the last fourth": variation(log_prob, earlier),
        "largest probability": jnp.mean(jnp.exp(jnp.max(log_prob, -1))),
    }
