r"""The bounds of the theory as numbers, to be plotted beside what is measured.

Unproved constants are arguments. [P] marks a form given in the paper named, [D] one derived in
the lines below it, [M] the usual form in this literature with a constant C that must be handed in.
beta is `radius` throughout: a number with ||theta_hat - theta*||_Sigma <= beta. On the event that
this holds, the offline bounds are theorems without a constant.

Axes: ``batch`` (free), ``dim``.
"""

import jax.numpy as jnp
from jax import nn
from jaxtyping import Array, Float

from jax_klrlhf.core import ellipsoid
from jax_klrlhf.core.ellipsoid import Ellipsoid
from jax_klrlhf.core.numerics import Scalar, check_between, check_positive


def gamma(margin_bound: Scalar) -> Float[Array, "..."]:
    r"""Least curvature of the likelihood, :math:`1 / (2 + e^{-m} + e^m) = \sigma'(m)`.

    The paper evaluates it at m = B (arXiv 2312.11456). With ||phi|| <= 1 and ||theta|| <= B the
    margin is bounded by 2B, so a strict check passes 2B [D].

    >>> float(gamma(0.0))
    0.25
    """
    check_positive("margin_bound", margin_bound, or_zero=True)
    margin_bound = _float(margin_bound)
    return nn.sigmoid(margin_bound) * nn.sigmoid(-margin_bound)


def radius(
    *,
    dim: int,
    delta: Scalar,
    ridge: Scalar,
    bound: Scalar,
    curvature: Scalar,
    constant: Scalar,
) -> Float[Array, "..."]:
    r"""Radius beta: ||theta_hat - theta*||_Sigma <= beta with probability 1 - delta.

    .. math:: \beta = C \sqrt{\frac{d + \log(1/\delta)}{\gamma^2} + \lambda B^2}

    [M] arXiv 2312.11456, lemma on the MLE; 2301.11270, lemma 3.1.

    Args:
      dim: d.
      delta: probability of failure, in (0, 1).
      ridge: lambda of Sigma, on the scale of a sum over comparisons.
      bound: B, ||theta*|| <= B.
      curvature: gamma, from :func:`gamma`.
      constant: C. Not given by the papers.

    >>> float(radius(dim=4, delta=1.0, ridge=0.0, bound=1.0, curvature=0.25, constant=1.0))
    8.0
    """
    check_positive("dim", dim)
    check_between("delta", delta, 0, 1, low_open=True)
    check_positive("ridge", ridge, or_zero=True)
    check_positive("bound", bound, or_zero=True)
    check_positive("curvature", curvature)
    check_positive("constant", constant)
    count = dim + jnp.log(1.0 / _float(delta))
    return constant * jnp.sqrt(count / _float(curvature) ** 2 + ridge * _float(bound) ** 2)


def offline_expected(uncertainty: Scalar, *, radius: Scalar) -> Float[Array, "..."]:
    """Offline, Option I: J(pi) - J(pi_hat) <= 2 beta ||E phi(pi) - nu||_{Sigma^-1} [D].

    For any comparator pi, `uncertainty` its :func:`.uncertainty.expected` under Sigma of the
    offline data. Source: arXiv 2312.11456, theorem on offline GSHF. Needs no data on other
    policies than pi.
    """
    return 2.0 * radius * _float(uncertainty)


def offline_pointwise(uncertainty: Scalar, *, radius: Scalar) -> Float[Array, "..."]:
    """Offline, Option II: 2 beta E_pi ||phi - nu||_{Sigma^-1} [D], arXiv 2312.11456.

    It bounds J(pi) - J(pi_hat) + eta E KL(pi || pi_hat), for any comparator pi, `uncertainty` its
    :func:`.uncertainty.pointwise`.
    """
    return 2.0 * radius * _float(uncertainty)


def online(
    *,
    radius: Scalar,
    information_gain: Scalar,
    rounds: Scalar,
    batch_size: Scalar,
    constant: Scalar,
) -> Float[Array, "..."]:
    r"""Batch online GSHF, Option I: the best of T rounds has a gap of at most

    .. math:: C \beta \sqrt{\frac{\exp(G / T) - 1}{m}}, \qquad G = \log\det\Sigma_T / \det\lambda I

    [D] from arXiv 2312.11456, theorem on online GSHF. The gap of round t is at most beta ||v_t||,
    v_t the enhancer's direction, as pi* lies in its set. Round t adds m E[z z^T] >= m v_t v_t^T to
    Sigma, so sum_t log(1 + m ||v_t||^2) <= G, and the least term is at most G / T. C >= 1 pays for
    the m draws standing for their expectation (C = 1 if Sigma is built of expectations). T >= G and
    m = (2 C beta / eps)^2 make it at most eps: the O~(d) rounds of O~(d / (gamma^2 eps^2)) of T2.
    """
    check_positive("rounds", rounds)
    check_positive("batch_size", batch_size)
    check_positive("information_gain", information_gain, or_zero=True)
    check_positive("constant", constant)
    per_round = jnp.expm1(_float(information_gain) / rounds)
    return constant * radius * jnp.sqrt(per_round / batch_size)


def hybrid(
    state: Ellipsoid,
    direction: Float[Array, " dim"],
    *,
    radius: Scalar,
    information_gain: Scalar,
    rounds: Scalar,
    batch_size: Scalar,
    constant: Scalar,
) -> Float[Array, ""]:
    """Hybrid (enhancer pi0): the online bound plus beta ||E[phi(pi*) - phi(pi0)]||_{Sigma^-1}.

    [P] arXiv 2312.11456, theorem on hybrid GSHF. `state` holds offline and online data
    (:func:`ellipsoid.merge`), `direction` is E phi(pi*) - E phi(pi0): small where the offline data
    cover the way from pi0 to pi*.
    """
    online_part = online(
        radius=radius,
        information_gain=information_gain,
        rounds=rounds,
        batch_size=batch_size,
        constant=constant,
    )
    return radius * ellipsoid.norm(state, direction) + online_part


def information_gain(state: Ellipsoid) -> Float[Array, ""]:
    """log (det Sigma / det lambda I), in nats: what the data can tell about theta (L4)."""
    dim = state.precision.shape[-1]
    return ellipsoid.log_det(state) - dim * jnp.log(state.ridge)


def information_gain_cap(
    *, dim: int, count: Scalar, ridge: Scalar, max_norm: Scalar = 2.0
) -> Float[Array, "..."]:
    r"""Largest information gain of `count` directions, :math:`d \log(1 + T b^2 / (\lambda d))`.

    b = `max_norm` bounds ||z||; a difference of features in the unit ball has b = 2, which gives
    the d log(1 + 4T/(lambda d)) of L4. By the inequality of arithmetic and geometric means, with
    equality for directions spread evenly over an orthogonal frame (Abbasi-Yadkori et al. 2011,
    lemma 10).

    >>> float(information_gain_cap(dim=2, count=2, ridge=1.0, max_norm=1.0))  # 2 log 2
    1.386...
    """
    check_positive("dim", dim)
    check_positive("count", count, or_zero=True)
    check_positive("ridge", ridge)
    check_positive("max_norm", max_norm)
    return dim * jnp.log1p(_float(count) * max_norm**2 / (_float(ridge) * dim))


def elliptical_potential(norms: Float[Array, "*batch rounds"]) -> Float[Array, "*batch"]:
    """sum_t log(1 + ||z_t||^2_{Sigma_t^-1}), Sigma_t that of the rounds before t.

    For single directions it *equals* the information gain, by the matrix determinant lemma; with
    further data in each round it is at most that (L4).
    """
    return jnp.sum(jnp.log1p(norms**2), axis=-1)


def _float(value: Scalar) -> Array:
    return jnp.asarray(value, jnp.result_type(float, value))
