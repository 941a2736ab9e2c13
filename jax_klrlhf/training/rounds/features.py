r"""A linear reward on frozen features of a language model: the theory's own objects, at scale.

.. math:: r(x, y) = \langle \hat\theta, \phi(x, y) \rangle, \qquad
          \Gamma(x, y) = \beta \|\phi(x, y) - \nu\|_{\Sigma^{-1}}

theta_hat is the core's maximum-likelihood fit on all comparisons and Sigma the core's ellipsoid,
both unchanged. Features are computed a piece at a time and Sigma is summed over pieces; with a
mesh the rows of a piece, and the rows that the fit sums over, lie over its devices.
Source: arXiv 2312.11456, section 2 and Algorithm 1 (Option II).

Axes: ``B`` prompts, ``K`` responses, ``N`` comparisons, ``D`` features.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jax_klrlhf import placement
from jax_klrlhf.core import ellipsoid, estimation
from jax_klrlhf.core.ellipsoid import Ellipsoid
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models import sampling
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training.rounds.compute import fill, mapped
from jax_klrlhf.training.rounds.parts import Comparisons, Policies, Reward, Scored, join

Features = Callable[[Ragged, Ragged], Float[np.ndarray, "B K D"]]
"""``features(prompts, responses)``, on the host."""


class Linear(NamedTuple):
    """The belief."""

    theta: Float[Array, " D"]
    ellipsoid: Ellipsoid
    nu: Float[Array, " D"]
    """Uncertainty is measured from it, since preferences identify differences alone."""
    converged: Array
    """False where the fit did not reach its optimum."""


def hidden_features(
    model: LanguageModel,
    params: Any,
    *,
    scale: float,
    pooling: Callable[[Array, Array, Array], Array] = rewards.mean,
    rows: int = 64,
    mesh: Mesh | None = None,
) -> Features:
    """Pooled hidden states over ``scale``, drawn back to the unit ball where they lie outside.

    The theory's ||phi|| <= 1; a ``scale`` of about the largest norm leaves most as they are.
    """

    def compute(params: Any, prompts: Ragged, responses: Ragged) -> Float[Array, "B K D"]:
        found = rewards.features(model, params, prompts, responses, pooling=pooling) / scale
        norm = jnp.sqrt(jnp.sum(found**2, -1, keepdims=True))
        return found / jnp.maximum(norm, 1)

    program = mapped(compute, rows=rows, mesh=mesh)
    return lambda prompts, responses: program(params, prompts, responses)


def linear(
    features: Features,
    *,
    dim: int,
    ridge: float,
    radius: float,
    bound: float | None = None,
    nu: Float[np.ndarray, " D"] | None = None,
    rows: int = 4096,
    mesh: Mesh | None = None,
    dtype: Any = np.float32,
    preference: PreferenceModel = bradley_terry,
) -> Reward:
    """Linear reward with its confidence ellipsoid.

    Args:
        features: of responses; frozen, so that all rounds share them.
        dim: D.
        ridge: lambda, of the fit and of Sigma.
        radius: beta, the scale of the uncertainty in units of reward (:func:`bounds.radius`).
        bound: B, the largest norm of theta; None: the ridge alone.
        nu: what uncertainty is measured from. None: the mean feature of the responses compared.
        rows: comparisons whose features are computed, and of which Sigma is summed, at one time;
            of each only the difference [D] is kept, for the fit.
        mesh: rows lie over its devices; one device without.
        dtype: of the fit and of Sigma, whose factor is sound to (largest eigenvalue) / ridge of
            about 1 / (D eps).
        preference: what labels mean.
    """
    empty = _empty(dim, ridge, nu, dtype)
    lower = Last(factor)

    def fit(
        key: Any, belief: Any, comparisons: Sequence[Comparisons], policies: Policies
    ) -> Linear:
        del key, belief, policies
        if not comparisons:
            return empty
        data = join(comparisons)
        differences, centre = _differences(features, data, rows=rows, dtype=dtype)
        state = estimate(
            differences,
            data.label,
            data.weight,
            ridge=ridge,
            bound=bound,
            rows=rows,
            mesh=mesh,
            preference=preference,
        )
        return state._replace(nu=jnp.asarray(centre, dtype) if nu is None else empty.nu)

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        del policies
        found = jnp.asarray(features(prompts, responses), dtype)
        return as_scored(*_score(belief, lower(belief.ellipsoid), found, radius))

    return Reward(init=empty, fit=fit, score=score)


def as_scored(reward: Float[Array, "B K"], white: Float[Array, "B K P"]) -> Scored:
    """Rewards and whitened directions as a belief gives them."""
    return Scored(
        np.asarray(reward), np.asarray(jnp.sqrt(jnp.sum(white**2, -1))), np.asarray(white)
    )


def pieces(
    features: Features, data: Comparisons, *, rows: int, dtype: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features ``[n, 2, D]`` of the comparisons, and their weights, ``rows`` at a time."""
    for begin in range(0, len(data.weight), rows):
        piece = jax.tree.map(lambda x, at=begin: x[at : at + rows], data)
        yield np.asarray(features(piece.prompts, piece.responses), dtype), piece.weight


def _differences(
    features: Features, data: Comparisons, *, rows: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Feature differences ``[N, D]``, and the weighted mean feature of the responses compared."""
    found, total = [], np.zeros(())
    for both, weight in pieces(features, data, rows=rows, dtype=dtype):
        found.append(both[:, 0] - both[:, 1])
        total = total + np.einsum("nkd,n->d", both.astype(np.float64), weight)
    return np.concatenate(found), total / (2 * max(float(data.weight.sum()), 1e-9))


def estimate(
    differences: Float[np.ndarray, "N D"],
    label: Float[np.ndarray, " N"],
    weight: Float[np.ndarray, " N"],
    *,
    ridge: float,
    bound: float | None = None,
    rows: int = 4096,
    mesh: Mesh | None = None,
    preference: PreferenceModel = bradley_terry,
) -> Linear:
    """theta_hat and Sigma of feature differences, with nu at 0.

    Rows are filled up with rows of weight 0 to one of a few sizes, so that a growing data set does
    not compile anew each round.
    """
    count, dim = differences.shape
    dtype = differences.dtype
    parts = placement.parts(mesh)
    size = -(-sampling.bucket(count) // parts) * parts
    weight = np.concatenate([weight, np.zeros(size - count, weight.dtype)]).astype(dtype)
    laid = _put(
        (fill(differences, size), fill(label.astype(dtype), size), weight),
        mesh,
    )
    fit, update = _programs(mesh)
    found = fit(*laid, preference, ridge, bound)
    state = ellipsoid.init(dim, ridge=ridge, dtype=dtype)
    piece = -(-min(rows, size) // parts) * parts
    for begin in range(0, count, piece):
        z, w = (fill(x[begin : begin + piece], piece) for x in (differences, weight[:count]))
        w = np.where(np.arange(piece) < count - begin, w, 0).astype(dtype)
        state = update(state, *_put((z, w), mesh))
    # Small and whole: every process holds its own, whatever mesh they were summed over.
    theta, state, converged = jax.tree.map(
        jnp.asarray, jax.device_get((found.theta, state, found.converged))
    )
    return Linear(theta, state, jnp.zeros(dim, dtype), converged)


@cache
def _programs(mesh: Mesh | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The core's fit and update, compiled for rows that lie over a mesh."""
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, static_argnums=(4, 5), out_shardings=whole)
    def fit(
        differences: Array,
        label: Array,
        weight: Array,
        preference: PreferenceModel,
        ridge: float,
        bound: Any,
    ) -> Any:
        return estimation.fit(
            differences, label, ridge=ridge, bound=bound, weights=weight, link=preference
        )

    @partial(jax.jit, out_shardings=whole)
    def update(state: Ellipsoid, directions: Array, weight: Array) -> Ellipsoid:
        return ellipsoid.update(state, directions, weights=weight)

    return fit, update


class Last:
    """A function that remembers its last value: a belief scores many batches, and is factorized
    once."""

    def __init__(self, function: Callable[[Ellipsoid], Array]):
        self._function, self._of, self._value = function, None, None

    def __call__(self, state: Ellipsoid) -> Any:
        """The value, computed anew where the precision is another array."""
        if self._of is not state.precision:
            self._of, self._value = state.precision, self._function(state)
        return self._value


factor = jax.jit(ellipsoid.factor)


@jax.jit
def _score(belief: Linear, lower: Array, features: Array, radius: Array) -> tuple[Array, Array]:
    reward = jnp.einsum("bkd,d->bk", features, belief.theta)
    return reward, whitened(lower, features - belief.nu[None, None, :], radius)


def whitened(
    lower: Float[Array, "P P"], shift: Float[Array, "B K P"], radius: Scalar
) -> Float[Array, "B K P"]:
    """``radius L^-1 shift``, whose norm is the uncertainty: L is Sigma's :data:`factor`."""
    scale = jnp.asarray(radius, shift.dtype)
    flat = shift.reshape(-1, shift.shape[-1])
    white = jax.lax.linalg.triangular_solve(lower, flat.T, left_side=True, lower=True)
    return scale * white.T.reshape(shift.shape)


def _empty(dim: int, ridge: float, nu: Any, dtype: Any) -> Linear:
    zero = jnp.zeros(dim, dtype)
    return Linear(
        zero,
        ellipsoid.init(dim, ridge=ridge, dtype=dtype),
        zero if nu is None else jnp.asarray(nu, dtype),
        jnp.array(True),
    )


def _put(arrays: Any, mesh: Mesh | None) -> Any:
    return placement.put(placement.take(arrays, mesh), mesh)
