r"""What to ask, and whom: pairs by what a label tells, over contexts; annotators; fronts; trees.

The information of a label is small where the answer is known, however far apart the features:
asking by feature distance alone, :math:`\|z\|_{\Sigma^{-1}}`, is no better than random at large
margins, and worse where pairs compete over all contexts. Both scores here know the curvature; the
:class:`Ellipsoid` should be the Hessian of the likelihood (:func:`core.estimation.hessian`).

Axes: ``batch`` (free: contexts or prompts), ``choices``, ``members``, ``length`` (tokens).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jax_klrlhf.core import bradley_terry, ellipsoid, posterior, welfare
from jax_klrlhf.core.choices import Choices
from jax_klrlhf.core.pairs import Pair

Score = Callable[[Array, Array], Array]
"""``score(mean, variance) -> value`` of a pair's margin."""


def fisher(
    mean: Float[Array, "*batch"], variance: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r""":math:`\sigma'(m)\, \|z\|^2_{H^{-1}}`: information to first order, from the best guess."""
    return bradley_terry.curvature(mean) * variance


def value(choices: Choices, *, score: Score = posterior.information) -> Float[Array, "..."]:
    """What the label of each pair is worth, ``[*batch, choices, choices]``; 0 where none can be.

    Needs `reward`, `features` and `ellipsoid`. Symmetric, 0 on the diagonal.
    """
    features, shape, reward = choices.require("features", "ellipsoid", "reward", by="select.value")
    keep = choices.where & ~jnp.isnan(reward)
    reward = jnp.where(keep, reward, 0)
    white = ellipsoid.whiten(shape, jnp.where(keep[..., None], features, 0))
    shift = white[..., :, None, :] - white[..., None, :, :]
    margin = reward[..., :, None] - reward[..., None, :]
    variance = jnp.sum(shift**2, -1)
    worth = score(margin, variance)
    # Of equal features a label tells nothing; the score's quadrature would leave rounding.
    both = keep[..., :, None] & keep[..., None, :] & (variance > 0)
    return jnp.where(both, worth, 0)


def most_informative(
    key: Key[Array, ""], choices: Choices, *, score: Score = posterior.information
) -> Pair:
    """The pair whose label tells most of theta, in random order; a pair rule.

    `score` is the mutual information or :func:`fisher`. `valid` is False where no label would tell
    anything.
    """
    worth = value(choices, score=score)
    count = worth.shape[-1]
    key_tie, key_swap = jax.random.split(key)
    # Both orders of a pair stand in the matrix: a random tie-break is a random order too.
    noise = jax.random.uniform(key_tie, (*worth.shape[:-2], count * count))
    flat = worth.reshape(noise.shape)
    top = jnp.max(flat, -1, keepdims=True)
    best = jnp.argmax(jnp.where(flat >= top, noise, -1), -1)
    swap = jax.random.bernoulli(key_swap, shape=best.shape)
    row, column = best // count, best % count
    valid = top[..., 0] > 0
    first, second = jnp.where(swap, column, row), jnp.where(swap, row, column)
    return Pair(jnp.where(valid, first, 0), jnp.where(valid, second, 0), valid)


def contexts(worth: Float[Array, " contexts"], *, count: int) -> Int[Array, " count"]:
    """The contexts most worth a question, best first: ``worth`` is the value of each one's pair.

    Contexts of one round are chosen by what is known before it, and may repeat each other.
    """
    if not 1 <= count <= worth.shape[0]:
        raise ValueError(f"count must be in 1..{worth.shape[0]}, got {count}")
    return jax.lax.top_k(worth, count)[1]


def for_annotator(
    mean: Float[Array, "*batch"],
    variance: Float[Array, "*batch"],
    *,
    flip_rate: Float[Array, " annotators"],
    cost: Float[Array, " annotators"] | None = None,
) -> Int[Array, "*batch"]:
    """Who should label each pair: most information, or most for its cost, at their flip rates."""
    last = (1,) * mean.ndim + (-1,)
    told = posterior.information(
        jnp.broadcast_to(mean[..., None], (*mean.shape, flip_rate.shape[0])),
        jnp.broadcast_to(variance[..., None], (*mean.shape, flip_rate.shape[0])),
        flip_rate=flip_rate.reshape(*last[:-1], -1, 1),
    )
    return jnp.argmax(told if cost is None else told / cost.reshape(last), -1)


def non_dominated(choices: Choices) -> Bool[Array, "*batch choices"]:
    """True at choices that no other one beats in all of `rewards` (Parrot's training set).

    Masked choices neither beat nor stay.
    """
    rewards = choices.require("rewards", by="select.non_dominated")
    points = jnp.moveaxis(jnp.where(choices.where[None], rewards, -jnp.inf), 0, -1)
    return choices.where & ~welfare.dominated(points)


def shared_prefix(
    ids: Shaped[Array, "*batch choices length"],
    lengths: Int[Array, "*batch choices"],
    *,
    depth: int,
) -> Bool[Array, "*batch choices choices"]:
    """True for pairs whose first ``depth`` tokens are the same: comparisons within a tree.

    Source: arXiv 2402.10184. It helps where margins saturate; at moderate ones pairs of
    independent responses tell more.
    """
    if not 0 <= depth <= ids.shape[-1]:
        raise ValueError(f"depth must be in 0..{ids.shape[-1]}, got {depth}")
    head = ids[..., :depth]
    same = jnp.all(head[..., :, None, :] == head[..., None, :, :], -1)
    enough = lengths >= depth
    off = ~jnp.eye(lengths.shape[-1], dtype=bool)
    both = enough[..., :, None] & enough[..., None, :]
    return same & both & jnp.broadcast_to(off, same.shape)
