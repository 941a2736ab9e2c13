r"""Pessimistic policies of an estimated reward: Options I and II of offline GSHF.

With the estimate theta_hat, its ellipsoid Sigma and a radius beta of the confidence set,

.. math::
    \text{I:}\quad &\hat\pi = \arg\max_\pi E\langle\hat\theta, \phi\rangle - \eta E\,\mathrm{KL}
        - \beta \|E \phi(x, \pi) - \nu\|_{\Sigma^{-1}} \\
    \text{II:}\quad &\hat r(x, a) = \langle\hat\theta, \phi(x, a)\rangle
        - \beta \|\phi(x, a) - \nu\|_{\Sigma^{-1}}, \qquad \hat\pi = \mathrm{Gibbs}(\hat r)

Source: Xiong et al., arXiv 2312.11456, Algorithm 1. The reference vector ``nu`` is an argument:
preferences identify only differences of rewards, so uncertainty is measured from a chosen origin
(:func:`usual_nu` is the usual one). It may differ between contexts. Of a class of rewards that is
not linear phi is its gradient at theta_hat (:meth:`.Setting.local`).

Axes: ``contexts``, ``actions``, ``dim``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.bandit.learner import Estimate
from jax_klrlhf.bandit.problem import Setting
from jax_klrlhf.core import ellipsoid, gibbs, numerics, saddle, uncertainty
from jax_klrlhf.core.numerics import Scalar


def usual_nu(
    setting: Setting, log_prob: Float[Array, "contexts actions"] | None = None
) -> Float[Array, " dim"]:
    r"""The usual :math:`\nu = E_{x \sim d_0, a \sim \pi}\, \phi(x, a)`, with pi0 by default."""
    log_prob = setting.ref_log_prob if log_prob is None else log_prob
    return uncertainty.mean_features(
        setting.features, log_prob, context_prob=setting.context_prob, where=setting.where
    )


def nu_of_contexts(
    setting: Setting, nu: Float[Array, "..."] | None
) -> Float[Array, "contexts dim"]:
    """The reference vector of each context: ``nu`` (of all, or of each), by default the usual one.

    ValueError where its shape is neither ``[dim]`` nor ``[contexts, dim]``.
    """
    nu = usual_nu(setting) if nu is None else nu
    return uncertainty.of_contexts(nu, setting.features)


def bonus(
    setting: Setting,
    estimate: Estimate,
    *,
    nu: Float[Array, "..."] | None = None,
) -> Float[Array, "contexts actions"]:
    r"""Pointwise uncertainty :math:`\|\phi(x, a) - \nu\|_{\Sigma^{-1}}`, per unit of radius."""
    local = setting.local(estimate.theta)
    return ellipsoid.norm(estimate.ellipsoid, local.features - nu_of_contexts(local, nu)[:, None])


def option_two(
    setting: Setting,
    estimate: Estimate,
    *,
    radius: Scalar,
    nu: Float[Array, "..."] | None = None,
) -> Float[Array, "contexts actions"]:
    """Gibbs policy of the reward less ``radius`` times the pointwise bonus.

    A negative radius is optimism. Source: arXiv 2312.11456, Algorithm 1, Option II.
    """
    numerics.check_between("radius", radius, -jnp.inf, jnp.inf, low_open=True, high_open=True)
    reward = setting.reward(estimate.theta) - radius * bonus(setting, estimate, nu=nu)
    return gibbs.log_prob(
        reward, setting.ref_log_prob, kl_coef=setting.kl_coef, where=setting.where
    )


def option_one(
    setting: Setting,
    estimate: Estimate,
    *,
    radius: Scalar,
    nu: Float[Array, "..."] | None = None,
    max_iterations: int = 60,
) -> saddle.Saddle:
    r"""The policy that maximizes the value less ``radius`` times its expected uncertainty.

    With :math:`\Sigma = L L^\top` and :math:`w = L^{-1}(\phi - \nu)`, the norm is a maximum over
    ``||u|| <= 1`` and the maximum over policies is in closed form, which leaves the convex problem
    [derived]

    .. math:: \min_{\|u\| \le 1} D(u) = E_x\, \eta \log Z_x(u), \qquad
        \pi_u = \mathrm{Gibbs}\big(\langle\hat\theta, \phi\rangle - \beta \langle u, w\rangle\big)

    in ``dim`` variables: :func:`core.saddle.ball`, whose duality gap is the certificate; its weight
    is u.

    ``nu`` enters by its mean over contexts only. Source: arXiv 2312.11456, Algorithm 1, Option I.
    ValueError on a negative radius, where the problem is not convex.
    """
    numerics.check_positive("radius", radius, or_zero=True)
    local = setting.local(estimate.theta)
    shift = setting.context_prob @ nu_of_contexts(local, nu)
    white = ellipsoid.whiten(estimate.ellipsoid, local.features - shift[None, None, :])
    return saddle.ball(
        -jnp.asarray(radius, white.dtype) * jnp.moveaxis(white, -1, 0),
        setting.ref_log_prob,
        kl_coef=setting.kl_coef,
        context_prob=setting.context_prob,
        nominal=setting.reward(estimate.theta),
        where=setting.where,
        max_iterations=max_iterations,
    )
