r"""Bandits with a learned reward: in one the model is right, in others wrong in a known way.

One context, many actions, pi0 known; the proxy is what Bradley-Terry learns from comparisons of
draws from pi0, as an ensemble of members. Rewards are centred at pi0.

Axes: ``members``, ``actions``, ``dim``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_klrlhf.core import aggregate, estimation, measure

DIM = 6
REGIMES = ("well specified", "extrapolating", "shared hacks", "shared bias")


class World(NamedTuple):
    """Gold, what the members believe, and pi0."""

    gold: Float[Array, "1 actions"]
    members: Float[Array, "members 1 actions"]
    ref_log_prob: Float[Array, "1 actions"]


def _fit(
    key: Key[Array, ""],
    features: Float[Array, "actions dim"],
    gold: Float[Array, " actions"],
    ref_log_prob: Float[Array, " actions"],
    members: int,
    labels: int,
    noise: float,
) -> Float[Array, "members actions"]:
    """Members differ by their bootstrap sample of the comparisons."""
    key_pairs, key_labels, key_flips, key_boot = jax.random.split(key, 4)
    first, second = jax.random.categorical(key_pairs, ref_log_prob, shape=(2, labels))
    differences = features[first] - features[second]
    said = jax.random.bernoulli(key_labels, jax.nn.sigmoid(gold[first] - gold[second]))
    said = said ^ jax.random.bernoulli(key_flips, noise, said.shape)

    def member(key: Array) -> Array:
        drawn = jax.random.randint(key, (labels,), 0, labels)
        times = jnp.zeros(labels).at[drawn].add(1.0)
        fit = estimation.fit(differences, said, ridge=1.0, weights=times)
        return features @ fit.theta

    return jax.vmap(member)(jax.random.split(key_boot, members))


def make(regime: str, *, actions: int, members: int, labels: int, noise: float = 0.0):
    """``world(key) -> World`` of a regime.

    * well specified: gold is linear in the features that the model has.
    * extrapolating: a tenth of pi0's mass is on half of the actions, whose features are three times
      as long; gold saturates there, the linear model does not.
    * shared hacks: as well specified, but every member finds 6 too much in 5 % of the actions,
      where gold is 3 lower.
    * shared bias: gold has a part along a feature that no member has.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime {regime!r}: choose from {', '.join(REGIMES)}")

    def world(key: Key[Array, ""]) -> World:
        keys = jax.random.split(key, 6)
        features = jax.random.normal(keys[0], (actions, DIM)) / jnp.sqrt(DIM)
        theta = 2 * jax.random.normal(keys[1], (DIM,))
        ref = jnp.full(actions, -jnp.log(actions))
        gold = features @ theta
        if regime == "extrapolating":
            far = jnp.arange(actions) >= actions // 2
            features = jnp.where(far[:, None], 3 * features, features)
            gold = 1.5 * jnp.tanh(features @ theta / 1.5)
            mass = jnp.where(far, 0.1, 0.9) / (actions / 2)
            ref = jnp.log(mass)
        if regime == "shared bias":
            gold = gold + 1.5 * jax.random.normal(keys[2], (actions,))
        believed = _fit(keys[3], features, gold, ref, members, labels, noise)
        if regime == "shared hacks":
            hacked = jax.random.permutation(keys[4], actions) < actions // 20
            believed = believed + jnp.where(hacked, 6.0, 0.0)[None]
            gold = gold - jnp.where(hacked, 3.0, 0.0)
        rewards = aggregate.centre(believed[:, None], ref[None])
        return World(measure.canonical(gold[None], ref[None]), rewards, ref[None])

    return world


Rule = Callable[[World], Float[Array, "1 actions"]]
"""A proxy reward made of the members."""
