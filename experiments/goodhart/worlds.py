r"""Bandits with a learned reward: in one the model is right, in others wrong in a known way.

The proxy is what Bradley-Terry learns from comparisons of draws from pi0, as an ensemble of
members. Rewards are centred at pi0. Two kinds of world:

* :func:`make`: one context, many actions, random features;
* :func:`language`: a transformer whose every response is listed (`experiments.exact_lm`), features
  its own hidden states.

Axes: ``members``, ``contexts``, ``actions``, ``dim``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from experiments.exact_lm import world as exact
from jax_klrlhf.core import aggregate, estimation, measure, numerics

DIM = 6
REGIMES = (
    "well specified",
    "extrapolating",
    "extrapolating, 25 % flips",
    "shared hacks",
    "shared bias",
)
LANGUAGE = tuple(f"language, {name}" for name in ("well specified", "saturating", "shared hacks"))


class World(NamedTuple):
    """Gold, what the members believe, and pi0."""

    gold: Float[Array, "contexts actions"]
    members: Float[Array, "members contexts actions"]
    ref_log_prob: Float[Array, "contexts actions"]


def _fit(
    key: Key[Array, ""],
    features: Float[Array, "contexts actions dim"],
    gold: Float[Array, "contexts actions"],
    ref_log_prob: Float[Array, "contexts actions"],
    members: int,
    labels: int,
    noise: float,
) -> Float[Array, "members contexts actions"]:
    """Members differ by their bootstrap sample of the comparisons."""
    key_context, key_pairs, key_labels, key_flips, key_boot = jax.random.split(key, 5)
    context = jax.random.randint(key_context, (labels,), 0, gold.shape[0])
    first, second = jax.random.categorical(
        key_pairs, ref_log_prob[context], shape=(2, labels), axis=-1
    )
    differences = features[context, first] - features[context, second]
    margin = gold[context, first] - gold[context, second]
    said = jax.random.bernoulli(key_labels, jax.nn.sigmoid(margin))
    said = said ^ jax.random.bernoulli(key_flips, noise, said.shape)

    def member(key: Array) -> Array:
        drawn = jax.random.randint(key, (labels,), 0, labels)
        times = jnp.zeros(labels).at[drawn].add(1.0)
        fit = estimation.fit(differences, said, ridge=1.0, weights=times)
        return features @ fit.theta

    return jax.vmap(member)(jax.random.split(key_boot, members))


def _finished(gold, believed, ref) -> World:
    return World(measure.canonical(gold, ref), aggregate.centre(believed, ref), ref)


def _hacked(key, gold, believed):
    """Every member finds 6 too much in 5 % of the actions, where gold is 3 lower."""
    count = gold.shape[-1]
    hacked = jax.random.permutation(key, count) < count // 20
    believed = believed + jnp.where(hacked, 6.0, 0.0)[None, None]
    return gold - jnp.where(hacked, 3.0, 0.0)[None], believed


def make(regime: str, *, actions: int, members: int, labels: int):
    """``world(key) -> World`` of a regime.

    * well specified: gold is linear in the features that the model has.
    * extrapolating: a tenth of pi0's mass is on half of the actions, whose features are three times
      as long; gold saturates there, the linear model does not. With 25 % flips, so many labels are
      the other way round.
    * shared hacks: as well specified, but every member finds 6 too much in 5 % of the actions,
      where gold is 3 lower.
    * shared bias: gold has a part along a feature that no member has.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime {regime!r}: choose from {', '.join(REGIMES)}")

    def world(key: Key[Array, ""]) -> World:
        keys = jax.random.split(key, 6)
        features = jax.random.normal(keys[0], (1, actions, DIM)) / jnp.sqrt(DIM)
        theta = 2 * jax.random.normal(keys[1], (DIM,))
        ref = jnp.full((1, actions), -jnp.log(actions))
        gold = features @ theta
        if regime.startswith("extrapolating"):
            far = jnp.arange(actions) >= actions // 2
            features = jnp.where(far[None, :, None], 3 * features, features)
            gold = 1.5 * jnp.tanh(features @ theta / 1.5)
            mass = jnp.where(far, 0.1, 0.9) / (actions / 2)
            ref = jnp.log(mass)[None]
        if regime == "shared bias":
            gold = gold + 1.5 * jax.random.normal(keys[2], (1, actions))
        noise = 0.25 if regime.endswith("flips") else 0.0
        believed = _fit(keys[3], features, gold, ref, members, labels, noise)
        if regime == "shared hacks":
            gold, believed = _hacked(keys[4], gold, believed)
        return _finished(gold, believed, ref)

    return world


def language(base: exact.World, regime: str, *, members: int, labels: int):
    """``world(key) -> World`` over all responses to the prompts of a small transformer.

    Gold is linear in its hidden states, of standard deviation 1 under pi0; *saturating*: 1.5 times
    tanh of it, so that a linear proxy extrapolates where pi0 seldom goes.
    """
    if regime not in LANGUAGE:
        raise ValueError(f"regime {regime!r}: choose from {', '.join(LANGUAGE)}")
    ref = jax.nn.log_softmax(jnp.asarray(base.base, jnp.float32))
    features = jnp.asarray(base.phi, jnp.float32)
    features = features - jnp.einsum("xa,xad->xd", jnp.exp(ref), features)[:, None]

    def world(key: Key[Array, ""]) -> World:
        keys = jax.random.split(key, 3)
        gold = features @ jax.random.normal(keys[0], features.shape[-1:])
        gold = gold / jnp.sqrt(jnp.mean(numerics.expectation(ref, gold**2)))
        if regime.endswith("saturating"):
            gold = 1.5 * jnp.tanh(2 * gold / 1.5)
        believed = _fit(keys[1], features, gold, ref, members, labels, 0.0)
        if regime.endswith("hacks"):
            gold, believed = _hacked(keys[2], gold, believed)
        return _finished(gold, believed, ref)

    return world


Rule = Callable[[World], Float[Array, "contexts actions"]]
"""A proxy reward made of the members."""
