r"""What a reward may be: a class of functions with parameters, as a value that both worlds take.

.. math:: r_\theta(x, a) = f(\theta, \phi(x, a)), \qquad
          g_\theta(x, a) = \nabla_\theta f(\theta, \phi(x, a))

f is any differentiable function of parameters and features: :data:`linear` (``<theta, phi>``, the
class of arXiv 2312.11456), a network, a sum of known rewards with unknown scales. The fit is
maximum likelihood of a preference model, with a ridge around where the parameters began. Around
the fit the class is linear in the gradient g, and there g stands where the theory has phi:
Sigma = ridge I + sum z z^T with z = g(x, a1) - g(x, a2), from which pair rules, enhancers, bonuses
and draws follow as they do from features (NeuralUCB, arXiv 1911.04462; with comparisons neural
dueling bandits, arXiv 2407.17112). For the linear class g is phi, whatever theta is; for others a
confidence set holds where the linearization does (there: for wide networks).

A class goes into a problem, ``bandit.from_arrays(..., reward_class=mine)``, and into a belief,
``rounds.parametric(features, mine, ...)``.

Axes: ``batch`` (free), ``n`` (comparisons), ``dim`` (features), ``parameters`` (of theta, flat).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jax_klrlhf.core import descent, ellipsoid, numerics, preferences
from jax_klrlhf.core.ellipsoid import Ellipsoid
from jax_klrlhf.core.estimation import Fit
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.preferences import PreferenceModel

_HIGHEST = lax.Precision.HIGHEST


@functools.partial(jax.tree_util.register_dataclass, data_fields=["init"], meta_fields=["function"])
@dataclasses.dataclass(frozen=True)
class RewardClass:
    """A function of parameters and features, and the parameters that learning begins from.

    A pytree whose leaves are those of ``init``; the function is static, so hand in a module-level
    one. Everywhere else theta is flat, ``[parameters]``, in the order of
    ``jax.flatten_util.ravel_pytree(init)``.

    >>> scaled = RewardClass(lambda p, x: p["a"] * jnp.sum(x, -1), {"a": jnp.array(2.0)})
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> scaled.reward(scaled.start(2), x).tolist(), scaled.gradient(scaled.start(2), x).tolist()
    ([6.0, 14.0], [[3.0], [7.0]])
    """

    function: Callable[[Any, Array], Array]
    """``function(parameters, features [*batch, dim]) -> reward [*batch]``, in nats."""
    init: Any = None
    """Where fits begin and what the ridge pulls to: a pytree. A network's must not be all zeros,
    where its gradient may vanish. None: as many zeros as there are features."""

    @property
    def is_linear(self) -> bool:
        """Whether it is :data:`linear`, for which there are shorter formulas."""
        return self.function is _inner

    def start(self, dim: int, dtype: DTypeLike | None = None) -> Float[Array, " parameters"]:
        """``init``, flat; where it is None, zeros of the features' ``dim`` and ``dtype``."""
        if self.init is None:
            return jnp.zeros(dim, jnp.result_type(float) if dtype is None else dtype)
        return ravel_pytree(self.init)[0]

    def reward(
        self, theta: Float[Array, " parameters"], features: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch"]:
        """r_theta of each row of features."""
        return self.function(self._whole(theta), features)

    def gradient(
        self, theta: Float[Array, " parameters"], features: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch parameters"]:
        """g_theta of each row: what stands for features near theta."""
        if self.is_linear:
            return features
        flat = features.reshape(-1, features.shape[-1])
        slope = jax.vmap(jax.grad(self.reward), (None, 0))(theta, flat)
        return slope.reshape(*features.shape[:-1], theta.shape[0])

    def _whole(self, theta: Array) -> Any:
        return theta if self.init is None else ravel_pytree(self.init)[1](theta)


def _inner(theta: Array, features: Array) -> Array:
    return features @ theta


linear = RewardClass(_inner)
"""``<theta, phi>``: arXiv 2312.11456, Assumption 1."""


def fit(
    reward_class: RewardClass,
    features: Float[Array, "n 2 dim"],
    labels: Shaped[Array, " n"],
    *,
    ridge: Scalar,
    weights: Shaped[Array, " n"] | None = None,
    init: Float[Array, " parameters"] | None = None,
    link: PreferenceModel = preferences.bradley_terry,
    iterations: int = 100,
) -> Fit:
    r"""Maximum likelihood in a class of rewards, by Gauss-Newton steps (:mod:`.descent`).

    .. math:: F(\theta) = \sum_i w_i\, \ell(r_\theta(\phi_i^1) - r_\theta(\phi_i^2), y_i)
              + \tfrac{\lambda}{2} \|\theta - \theta_0\|^2

    On :data:`linear` it is :func:`.estimation.fit`, which is faster, bounds theta and can be
    differentiated.

    Args:
        reward_class: the class; theta_0 is where it begins.
        features: of both things compared.
        labels: as in :func:`.estimation.fit`.
        ridge: lambda > 0: parameters of a network are not identified without.
        weights: a row of weight 0 is deleted: nothing in it is read.
        init: where descent begins, unless theta_0 is better (default).
        link: the preference model, of pairs.
        iterations: the most steps.

    Returns:
        `Fit`, of a stationary point: where F is not convex another start may find a lower one.
        `converged` is as :func:`.descent.descend` says.

    Raises:
        ValueError: on a ridge that is not positive.
    """
    numerics.check_positive("ridge", ridge)
    dtype = features.dtype
    start = reward_class.start(features.shape[-1], dtype)
    features, labels, weights = _kept(features, labels, weights)

    def margin(theta: Array) -> Array:
        reward = reward_class.reward(theta, features)
        return reward[:, 0] - reward[:, 1]

    def objective(theta: Array) -> Array:
        away = theta - start
        return weights @ link.nll(margin(theta), label=labels) + 0.5 * ridge * (away @ away)

    def metric(theta: Array) -> Array:
        known = _information(reward_class, theta, features, weights * of_margin(margin(theta)))
        return known + ridge * jnp.eye(theta.shape[0], dtype=dtype)

    of_margin = link.information
    begin = start
    if init is not None:
        begin = jnp.where(objective(init) <= objective(start), init, start)
    return Fit(*descent.descend(objective, metric, begin, iterations=iterations))


def confidence(
    reward_class: RewardClass,
    theta: Float[Array, " parameters"],
    features: Float[Array, "n 2 dim"],
    *,
    ridge: Scalar,
    weights: Shaped[Array, " n"] | None = None,
) -> Ellipsoid:
    """Sigma of comparisons in the gradients at theta: that of :mod:`.ellipsoid`, where linear."""
    features, _, weights = _kept(features, None, weights)
    state = ellipsoid.init(theta.shape[0], ridge=ridge, dtype=features.dtype)
    known = _information(reward_class, theta, features, weights)
    return state._replace(precision=state.precision + known)


def _kept(
    features: Array, labels: Array | None, weights: Array | None
) -> tuple[Array, Array, Array]:
    """Rows of weight 0 with nothing in them, and weights as numbers."""
    dtype = features.dtype
    labels = jnp.zeros(len(features), dtype) if labels is None else labels.astype(dtype)
    if weights is None:
        return features, labels, jnp.ones(len(features), dtype)
    keep = weights > 0 if weights.dtype != jnp.bool_ else weights
    return (
        jnp.where(keep[:, None, None], features, 0),
        jnp.where(keep, labels, 0.5),
        jnp.where(keep, weights.astype(dtype), 0),
    )


def _information(
    reward_class: RewardClass, theta: Array, features: Array, weights: Array
) -> Float[Array, "parameters parameters"]:
    slope = reward_class.gradient(theta, features)
    z = slope[:, 0] - slope[:, 1]
    return jnp.matmul(z.T, weights[:, None] * z, precision=_HIGHEST)
