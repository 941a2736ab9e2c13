r"""Pessimistic policies of an estimated reward: Options I and II of offline GSHF.

With the estimate theta_hat, its ellipsoid Sigma and a radius beta of the confidence set,

.. math::
    \text{I:}\quad &\hat\pi = \arg\max_\pi E\langle\hat\theta, \phi\rangle - \eta E\,\mathrm{KL}
        - \beta \|E \phi(x, \pi) - \nu\|_{\Sigma^{-1}} \\
    \text{II:}\quad &\hat r(x, a) = \langle\hat\theta, \phi(x, a)\rangle
        - \beta \|\phi(x, a) - \nu\|_{\Sigma^{-1}}, \qquad \hat\pi = \mathrm{Gibbs}(\hat r)

Source: Xiong et al., arXiv 2312.11456, Algorithm 1. The reference vector ``nu`` is an argument:
preferences identify only differences of rewards, so uncertainty is measured from a chosen origin
(:func:`reference_vector` is the usual one). It may differ between contexts.

Axes: ``contexts``, ``actions``, ``dim``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.bandit.learner import Estimate
from jax_klrlhf.bandit.problem import Setting
from jax_klrlhf.core import ellipsoid, gibbs
from jax_klrlhf.core.numerics import Scalar


def reference_vector(
    setting: Setting, log_prob: Float[Array, "contexts actions"] | None = None
) -> Float[Array, " dim"]:
    r"""The usual :math:`\nu = E_{x \sim d_0, a \sim \pi}\, \phi(x, a)`, with pi0 by default."""
    log_prob = setting.ref_log_prob if log_prob is None else log_prob
    return setting.context_prob @ setting.mean_features(log_prob)


def bonus(
    setting: Setting,
    estimate: Estimate,
    *,
    nu: Float[Array, " dim"] | Float[Array, "contexts dim"] | None = None,
) -> Float[Array, "contexts actions"]:
    r"""Pointwise uncertainty :math:`\|\phi(x, a) - \nu\|_{\Sigma^{-1}}`, per unit of radius."""
    return ellipsoid.norm(estimate.ellipsoid, setting.features - _origin(setting, nu)[:, None, :])


def option_two(
    setting: Setting,
    estimate: Estimate,
    *,
    radius: Scalar,
    nu: Float[Array, " dim"] | Float[Array, "contexts dim"] | None = None,
) -> Float[Array, "contexts actions"]:
    """Gibbs policy of the reward less ``radius`` times the pointwise bonus.

    A negative radius is optimism. Source: arXiv 2312.11456, Algorithm 1, Option II.
    """
    reward = setting.reward(estimate.theta) - radius * bonus(setting, estimate, nu=nu)
    return gibbs.log_prob(
        reward, setting.ref_log_prob, kl_coef=setting.kl_coef, where=setting.where
    )


def _origin(
    setting: Setting, nu: Float[Array, " dim"] | Float[Array, "contexts dim"] | None
) -> Float[Array, "contexts dim"]:
    contexts, _, dim = setting.features.shape
    nu = reference_vector(setting) if nu is None else nu
    if nu.shape not in ((dim,), (contexts, dim)):
        raise ValueError(f"nu has shape {nu.shape}, expected {(dim,)} or {(contexts, dim)}")
    return jnp.broadcast_to(nu if nu.ndim == 2 else nu[None], (contexts, dim))
