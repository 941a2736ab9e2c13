r"""The honest ideal of offline learning: the Gibbs policy of the posterior mean.

J is linear in the reward, so of all policies that can be made of the data the Gibbs policy of the
mean reward under the posterior has the largest expected J: what any estimate, greedy or
pessimistic, is at best. In the studies' problems theta* is uniform on the sphere of radius B, and
the posterior is that times the likelihood. It is sampled by the geodesic slice sampler (arXiv
2301.08056, its shrinkage form): a random great circle through the present point, and on it a slice
by shrinking the bracket, which needs no step size.

Axes: ``contexts``, ``actions``, ``dim``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_klrlhf import bandit
from jax_klrlhf.bandit import history
from jax_klrlhf.core import gibbs
from jax_klrlhf.core.numerics import Scalar


def posterior_mean(
    key: Key[Array, ""],
    differences: Float[Array, "rows dim"],
    wins: Float[Array, " rows"],
    losses: Float[Array, " rows"],
    *,
    bound: Scalar,
    chains: int = 4,
    steps: int = 300,
    warm: int = 60,
) -> Float[Array, " dim"]:
    """E theta given comparisons, for theta uniform on the sphere of radius ``bound``.

    A mean over ``chains`` of ``steps`` each, after ``warm`` that do not count.
    """
    dim = differences.shape[1]

    def log_likelihood(theta: Array) -> Array:
        margin = differences @ theta
        return wins @ jax.nn.log_sigmoid(margin) + losses @ jax.nn.log_sigmoid(-margin)

    def onto_sphere(direction: Array) -> Array:
        return bound * direction / jnp.linalg.norm(direction)

    def step(state: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        theta, total = state
        keys = jax.random.split(key, 4)
        away = jax.random.normal(keys[0], (dim,))
        away = onto_sphere(away - theta * (away @ theta) / (theta @ theta))
        level = log_likelihood(theta) + jnp.log(jax.random.uniform(keys[1], minval=1e-30))
        start = jax.random.uniform(keys[2], maxval=2 * jnp.pi)

        def at(angle: Array) -> Array:
            return theta * jnp.cos(angle) + away * jnp.sin(angle)

        def outside(search: tuple[Array, ...]) -> Array:
            angle, low, high, _ = search
            # A bracket of nothing is the present point, which is inside but for rounding.
            return (log_likelihood(at(angle)) < level) & (high - low > 1e-5)

        def shrink(search: tuple[Array, ...]) -> tuple[Array, ...]:
            angle, low, high, key = search
            low, high = jnp.where(angle < 0, angle, low), jnp.where(angle < 0, high, angle)
            key, key_angle = jax.random.split(key)
            drawn = low + (high - low) * jax.random.uniform(key_angle)
            return drawn, low, high, key

        begin = (start, start - 2 * jnp.pi, start, keys[3])
        # Angles around 0, the present point: the first bracket is the whole circle.
        angle = jax.lax.while_loop(outside, shrink, begin)[0]
        theta = onto_sphere(at(angle))
        return (theta, total + theta), None

    def chain(key: Array) -> Array:
        key_start, key_warm, key_run = jax.random.split(key, 3)
        theta = onto_sphere(jax.random.normal(key_start, (dim,)))
        zero = jnp.zeros(dim, theta.dtype)
        (theta, _), _ = jax.lax.scan(step, (theta, zero), jax.random.split(key_warm, warm))
        (_, total), _ = jax.lax.scan(step, (theta, zero), jax.random.split(key_run, steps))
        return total / steps

    return jnp.mean(jax.vmap(chain)(jax.random.split(key, chains)), 0)


def policy(
    key: Key[Array, ""], problem: bandit.Problem, seen: history.History, *, bound: Scalar
) -> Float[Array, "contexts actions"]:
    """The Gibbs policy of the posterior mean of the comparisons seen."""
    setting = problem.setting
    rows = history.view(seen)
    theta = posterior_mean(
        key, history.differences(setting, seen), rows.wins, rows.losses, bound=bound
    )
    return gibbs.log_prob(
        setting.reward(theta), setting.ref_log_prob, kl_coef=setting.kl_coef, where=setting.where
    )
