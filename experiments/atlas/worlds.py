"""What the checks share: random rewards, uniform references, exact policies, correlations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_klrlhf.core import gibbs, measure
from jax_klrlhf.core.numerics import Scalar

ACTIONS, KL_COEF = 6, 0.3
CYCLE = ((0.5, 0.9, 0.2), (0.1, 0.5, 0.9), (0.8, 0.1, 0.5))
"""P(row preferred to column): a cycle, which no reward explains."""


def reward(key: Array, *shape: int) -> Array:
    """Standard normal; one context of six actions by default."""
    return jax.random.normal(key, shape or (1, ACTIONS))


def uniform(*shape: int) -> Array:
    """Log-probabilities of the uniform law over the last axis."""
    return jnp.full(shape, -jnp.log(shape[-1]))


def law(reward: Array, ref: Array, kl_coef: Scalar = KL_COEF) -> Array:
    """The optimum, as log-probabilities."""
    return gibbs.log_prob(reward, ref, kl_coef=kl_coef)


def at_kl(proxy: Array, ref: Array, level: Scalar) -> Array:
    """The optimum of a proxy that spends this KL, as log-probabilities."""
    return law(proxy, ref, measure.at_divergence(proxy, ref, divergence=level))


def worth(proxy: Array, gold: Array, ref: Array, level: Scalar) -> Array:
    """E gold of the proxy's optimum of this KL; one context."""
    return jnp.sum(jnp.exp(at_kl(proxy, ref, level)) * gold)


def cross(p: Array, margin: Array) -> Array:
    """Mean log-likelihood of labels of probability p, in nats."""
    return jnp.mean(p * jax.nn.log_sigmoid(margin) + (1 - p) * jax.nn.log_sigmoid(-margin))


def correlation(first: Array, second: Array) -> Array:
    """Pearson's, over all entries."""
    flat = lambda x: (x - x.mean()) / jnp.maximum(x.std(), 1e-9)  # noqa: E731
    return jnp.mean(flat(first) * flat(second))


def rank_correlation(first: Array, second: Array) -> Array:
    """Spearman's, of vectors."""
    rank = lambda x: jnp.argsort(jnp.argsort(x)).astype(x.dtype)  # noqa: E731
    return correlation(rank(first), rank(second))
