r"""What labels have taught: a linear reward of the answers, how sure it is, and the set it lies in.

The objects are the core's: :math:`\hat\theta` the maximum-likelihood fit with a ridge
(:mod:`core.estimation`), :math:`\Sigma = \lambda I + \sum z z^\top` the ellipsoid of the compared
differences (:mod:`core.ellipsoid`), and the Laplace posterior, whose precision is the Hessian
(:mod:`core.posterior`), for standard errors. The confidence set
:math:`\{\theta : \|\theta - \hat\theta\|_\Sigma \le \beta\}` shrinks as its log-volume, which is
:math:`-\tfrac12 \log\det\Sigma` up to a constant, and as its radius in the direction of the pool's
widest difference.

Axes: ``N`` labelled pairs, ``A`` answers, ``D`` features, ``P`` points of a curve.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_klrlhf.core import ellipsoid, estimation, posterior
from jax_klrlhf.core.ellipsoid import Ellipsoid
from jax_klrlhf.label.pool import Pool
from jax_klrlhf.labelling import Label, votes

POINTS = 40
"""Of a curve over the labels."""


class Taught(NamedTuple):
    """What is believed after some labels."""

    theta: Float[np.ndarray, " D"]
    precision: Float[np.ndarray, "D D"]
    """Sigma."""
    reward: Float[np.ndarray, " A"]
    """Of each answer, less the mean over its prompt's answers; nats of the Bradley-Terry logit."""
    stderr: Float[np.ndarray, " A"]
    """Of these, by the Laplace posterior."""
    labelled: Float[np.ndarray, " P"]
    """Labelled pairs at the points of the two curves."""
    information: Float[np.ndarray, " P"]
    """log det Sigma - log det (lambda I), in nats: twice the log-volume that the set has lost."""
    width: Float[np.ndarray, " P"]
    """Largest norm ||phi - mean of its prompt||_{Sigma^-1} of an answer, at the same points: the
    set's radius in the direction that the pool knows least, per unit of beta."""
    agrees: float | None
    """Share of decided labels whose sign the fit has."""


def taught(
    pool: Pool, labels: Sequence[Label], *, ridge: float = 0.1, rows: dict[Any, int] | None = None
) -> Taught:
    """The belief of labels about the answers of a pool.

    Args:
        pool: the answers and their features.
        labels: in their order; of pairs whose answers the pool has.
        ridge: lambda of the fit and of Sigma; the prior of theta is N(0, I / lambda).
        rows: of ``pool.rows()``, where it is at hand.
    """
    at = pool.rows() if rows is None else rows
    pairs = {x.pair.name: x.pair for x in labels}
    said = {
        name: vote
        for name, vote in votes(labels).items()
        if vote.weight > 0
        and _key(pairs[name], "first") in at
        and _key(pairs[name], "second") in at
    }
    dim = pool.features.shape[1]
    size = max(64, 1 << (len(said) - 1).bit_length())  # few sizes: each is compiled
    z, label, weight = np.zeros((size, dim), np.float32), np.full(size, 0.5), np.zeros(size)
    for row, (name, vote) in enumerate(said.items()):
        pair = pairs[name]
        first, second = (at[_key(pair, which)] for which in ("first", "second"))
        z[row] = pool.features[first] - pool.features[second]
        label[row], weight[row] = vote.label, vote.weight
    total = len(said)
    count = np.unique(np.linspace(0, total, min(total, POINTS - 1) + 1).round().astype(np.int32))
    # As many points always, so that one program serves.
    points = np.concatenate([count, np.full(POINTS - len(count), count[-1], np.int32)])
    sizes = [len(some) for some in pool.answers]
    group = np.repeat(np.arange(len(sizes)), sizes)
    sums = np.zeros((len(sizes), dim))
    np.add.at(sums, group, pool.features)
    centred = pool.features - (sums / np.array(sizes)[:, None])[group].astype(np.float32)
    found = jax.device_get(
        _believe(
            jnp.asarray(z),
            jnp.asarray(label, jnp.float32),
            jnp.asarray(weight, jnp.float32),
            jnp.asarray(centred),
            jnp.asarray(points),
            ridge=float(ridge),
        )
    )
    theta, precision, reward, variance, information, width = found
    margins = z[:total] @ theta
    decided = label[:total] != 0.5
    agrees = None
    if decided.any():
        agrees = float(np.mean((margins > 0)[decided] == (label[:total] > 0.5)[decided]))
    kept = slice(0, len(count))
    return Taught(
        np.asarray(theta),
        np.asarray(precision),
        np.asarray(reward),
        np.sqrt(np.maximum(np.asarray(variance), 0)),
        count.astype(np.float64),
        np.asarray(information, np.float64)[kept],
        np.asarray(width, np.float64)[kept],
        agrees,
    )


def _key(pair: Any, which: str) -> tuple[str, str]:
    return repr(pair.prompt), getattr(pair, which)


@partial(jax.jit, static_argnames="ridge")
def _believe(
    z: Float[Array, "N D"],
    label: Float[Array, " N"],
    weight: Float[Array, " N"],
    centred: Float[Array, "A D"],
    points: Array,
    *,
    ridge: float,
) -> Any:
    fitted = estimation.fit(z, label, ridge=ridge, weights=weight)
    hessian = estimation.hessian(fitted.theta, z, ridge=ridge, weights=weight)
    reward, variance = posterior.margin(posterior.laplace(fitted.theta, hessian), centred)
    start = ellipsoid.init(z.shape[-1], ridge=ridge, dtype=z.dtype)

    def after(count: Array) -> Ellipsoid:
        seen = jnp.where(jnp.arange(z.shape[0]) < count, weight, 0)
        return ellipsoid.update(start, z, weights=seen)

    def at(count: Array) -> tuple[Array, Array]:
        state = after(count)
        return ellipsoid.log_det(state), jnp.max(ellipsoid.norm(state, centred))

    log_det, width = jax.lax.map(at, points)
    precision = after(jnp.asarray(z.shape[0])).precision
    return (
        fitted.theta, precision, reward, variance, log_det - ellipsoid.log_det(start), width,
    )  # fmt: skip
