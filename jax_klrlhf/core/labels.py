r"""Labels before they are learned from: how strong and reliable, edited, or of ranked factors.

Editing labels mends the *scale* of a reward learned from noise, hardly its direction, and costs
where labels are clean or people really differ: the likelihood of the noise (a flip rate) does as
well or better where the rate is known. What each buys is to be tried at equal divergence.

Axes: ``members`` (leading), ``n`` (comparisons), ``batch``, ``actions``, ``factors``, ``dim``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from jax_klrlhf.core import estimation
from jax_klrlhf.core.numerics import Scalar


class Strength(NamedTuple):
    """A vote of several reward models on each comparison: its mean margin and their deviation."""

    mean: Float[Array, " n"]
    deviation: Float[Array, " n"]


def strength(margins: Float[Array, "members n"]) -> Strength:
    """Preference strength by an ensemble's vote (Secrets of RLHF II, arXiv 2401.06080, section 3).

    ``margins`` are r(chosen) - r(rejected) of each member. A member should not have been fitted on
    the comparisons that it votes on (cross-fit), or it has learned their errors.
    """
    return Strength(jnp.mean(margins, 0), jnp.std(margins, 0))


class Edited(NamedTuple):
    """Labels and weights to fit on."""

    label: Float[Array, " n"]
    weight: Float[Array, " n"]


def edit(
    label: Shaped[Array, " n"],
    strength: Float[Array, " n"],
    *,
    flip: float = 0.0,
    drop: float = 0.0,
    smooth: Scalar = 0.0,
) -> Edited:
    """Drop the weakest share ``drop`` of the labels, flip the next share ``flip``, smooth the rest.

    ``strength [n]`` is how much the *label* is believed: the vote's margin for the first where it
    says 1, against it where it says 0. Smoothing by e makes ``(1 - e) y + e / 2``.
    Source: arXiv 2401.06080.

    >>> edit(jnp.array([1.0, 1.0]), jnp.array([-2.0, 3.0]), flip=0.5).label.tolist()
    [0.0, 1.0]
    """
    if not (flip >= 0 and drop >= 0 and flip + drop <= 1):
        raise ValueError(f"flip and drop are shares of the labels, got {flip} and {drop}")
    n = strength.shape[0]
    label = label.astype(strength.dtype)
    rank = jnp.argsort(jnp.argsort(strength))
    dropped = rank < round(drop * n)
    flipped = ~dropped & (rank < round((drop + flip) * n))
    smoothed = (1 - smooth) * label + smooth / 2
    return Edited(
        jnp.where(flipped, 1 - label, smoothed), jnp.where(dropped, 0.0, 1.0).astype(label.dtype)
    )


def lexicographic(
    factors: Float[Array, "*batch actions factors"], *, margin: Float[Array, " factors"]
) -> Float[Array, "*batch actions actions"]:
    r"""Preferences of ranked factors: the first that differs by more than its margin decides.

    1 where i is preferred to j, 0 where j is, 1/2 where no factor decides. With margins above 0 it
    need not be transitive, so no reward has exactly these preferences. Source: HERON, arXiv
    2309.02633.

    >>> lexicographic(jnp.array([[1.0, 0.0], [0.9, 5.0]]), margin=jnp.array([0.5, 0.0])).tolist()
    [[0.5, 0.0], [1.0, 0.5]]
    """
    shift = factors[..., :, None, :] - factors[..., None, :, :]
    decides = jnp.abs(shift) > margin.reshape((1,) * (shift.ndim - 1) + margin.shape)
    first = jnp.argmax(decides, -1)
    wins = jnp.take_along_axis(shift, first[..., None], -1)[..., 0] > 0
    return jnp.where(jnp.any(decides, -1), jnp.where(wins, 1.0, 0.0), 0.5).astype(factors.dtype)


class Reliability(NamedTuple):
    """A reward and the rate at which each annotator flips labels."""

    theta: Float[Array, " dim"]
    flip_rate: Float[Array, " annotators"]
    flipped: Float[Array, " n"]  # posterior probability that a label was flipped


def reliability(
    differences: Float[Array, "n dim"],
    labels: Shaped[Array, " n"],
    annotator: Int[Array, " n"],
    *,
    annotators: int,
    ridge: Scalar,
    start: Scalar = 0.1,
    steps: int = 30,
) -> Reliability:
    r"""Annotators' flip rates and the reward together, by expectation maximization.

    A label is Bradley-Terry's, flipped with probability eps_j. q_i = P(flipped | y_i, eps, theta);
    eps_j the mean of its q; theta the fit on labels y (1 - q) + (1 - y) q. Rates are kept in
    [0, 1/2]: beyond, the sign of everything is not identified. The family of Crowd-BT (Chen et al.,
    2013). Needs annotators who label the same kind of comparisons, and differ.
    """
    labels = labels.astype(differences.dtype)
    count = jnp.zeros(annotators, labels.dtype).at[annotator].add(1)

    def expect(theta: Array, rate: Array) -> Array:
        margin = differences @ theta
        agree = jax.nn.log_sigmoid(jnp.where(labels > 0.5, margin, -margin))
        against = jax.nn.log_sigmoid(jnp.where(labels > 0.5, -margin, margin))
        eps = rate[annotator]
        return jax.nn.sigmoid(jnp.log(eps) - jnp.log1p(-eps) + against - agree)

    def improve(theta: Array, flipped: Array) -> tuple[Array, Array]:
        rate = jnp.zeros(annotators, labels.dtype).at[annotator].add(flipped)
        rate = jnp.clip(rate / jnp.maximum(count, 1), 1e-4, 0.5)
        soft = labels * (1 - flipped) + (1 - labels) * flipped
        return estimation.fit(differences, soft, ridge=ridge, init=theta).theta, rate

    def step(_: int | Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return improve(state[0], expect(*state))

    first = estimation.fit(differences, labels, ridge=ridge).theta
    rates = jnp.full(annotators, start, labels.dtype)
    theta, rate = lax.fori_loop(0, steps, step, (first, rates))
    return Reliability(theta, rate, expect(theta, rate))
