r"""Pessimistic policies of an estimated reward: Options I and II of offline GSHF.

With the estimate theta_hat, its ellipsoid Sigma and a radius beta of the confidence set,

.. math::
    \text{I:}\quad &\hat\pi = \arg\max_\pi E\langle\hat\theta, \phi\rangle - \eta E\,\mathrm{KL}
        - \beta \|E \phi(x, \pi) - \nu\|_{\Sigma^{-1}} \\
    \text{II:}\quad &\hat r(x, a) = \langle\hat\theta, \phi(x, a)\rangle
        - \beta \|\phi(x, a) - \nu\|_{\Sigma^{-1}}, \qquad \hat\pi = \mathrm{Gibbs}(\hat r)

Source: Xiong et al., arXiv 2312.11456, Algorithm 1. The reference vector ``nu`` is an argument:
preferences identify only differences of rewards, so uncertainty is measured from a chosen origin
(:func:`usual_nu` is the usual one). It may differ between contexts.

Axes: ``contexts``, ``actions``, ``dim``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_klrlhf.bandit.learner import Estimate
from jax_klrlhf.bandit.problem import Setting
from jax_klrlhf.core import ellipsoid, gibbs, numerics, uncertainty
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
    return ellipsoid.norm(
        estimate.ellipsoid, setting.features - nu_of_contexts(setting, nu)[:, None, :]
    )


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


class Saddle(NamedTuple):
    """Solution of Option I, with the certificate of its accuracy."""

    log_prob: Float[Array, "contexts actions"]
    direction: Float[Array, " dim"]  # u of the saddle point, ||u|| <= 1, whitened by L^-1
    duality_gap: Float[Array, ""]  # the policy's objective is at most this below the optimum
    iterations: Int[Array, ""]


def option_one(
    setting: Setting,
    estimate: Estimate,
    *,
    radius: Scalar,
    nu: Float[Array, "..."] | None = None,
    max_iterations: int = 60,
) -> Saddle:
    r"""The policy that maximizes the value less ``radius`` times its expected uncertainty.

    With :math:`\Sigma = L L^\top` and :math:`w = L^{-1}(\phi - \nu)`, the norm is a maximum over
    ``||u|| <= 1`` and the maximum over policies is in closed form, which leaves the convex problem
    [derived]

    .. math:: \min_{\|u\| \le 1} D(u) = E_x\, \eta \log Z_x(u), \qquad
        \pi_u = \mathrm{Gibbs}\big(\langle\hat\theta, \phi\rangle - \beta \langle u, w\rangle\big)

    in ``dim`` variables. It is solved by Newton steps on the quadratic model *inside the ball*, the
    length the best of a grid that holds the self-concordant one. The value of pi_u is within
    :math:`D(u) - P(\pi_u) = \beta (\|m\| - \langle u, m\rangle)`, m = E w(pi_u), of the optimum:
    this duality gap is returned. Iteration ends when it is at the level of rounding.

    ``nu`` enters by its mean over contexts only. Source: arXiv 2312.11456, Algorithm 1, Option I.
    ValueError on a negative radius, where the problem is not convex.
    """
    numerics.check_positive("radius", radius, or_zero=True)
    kl_coef, dtype = setting.kl_coef, setting.features.dtype
    radius = jnp.asarray(radius, dtype)
    eps = jnp.finfo(dtype).eps
    shift = setting.context_prob @ nu_of_contexts(setting, nu)
    white = ellipsoid.whiten(estimate.ellipsoid, setting.features - shift[None, None, :])
    reward = setting.reward(estimate.theta)
    identity = jnp.eye(white.shape[-1], dtype=dtype)

    def policy(u: Float[Array, " dim"]) -> Float[Array, "contexts actions"]:
        return gibbs.log_prob(
            reward - radius * (white @ u),
            setting.ref_log_prob,
            kl_coef=kl_coef,
            where=setting.where,
        )

    def dual(u: Float[Array, " dim"]) -> Float[Array, ""]:
        return setting.context_prob @ gibbs.free_energy(
            reward - radius * (white @ u),
            setting.ref_log_prob,
            kl_coef=kl_coef,
            where=setting.where,
        )

    def certificate(u: Float[Array, " dim"], mean: Float[Array, " dim"]) -> Float[Array, ""]:
        return radius * (numerics.safe_sqrt(mean @ mean) - u @ mean)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        u, _, iterations = state
        conditional = jnp.exp(policy(u))
        prob = setting.context_prob[:, None] * conditional
        per_context = jnp.einsum("xa,xad->xd", conditional, white)
        centred = white - per_context[:, None, :]
        mean = setting.context_prob @ per_context
        gradient = -radius * mean
        hessian = jnp.einsum("xa,xad,xae->de", prob, centred, centred) * radius**2 / kl_coef
        hessian = hessian + (eps * jnp.trace(hessian) + jnp.finfo(dtype).tiny) * identity
        move = _ball_minimum(hessian, hessian @ u - gradient) - u
        size = jnp.max(jnp.abs(centred @ move)) * 2 * radius / kl_coef
        safe = jnp.where(size > 0, jnp.log1p(size) / jnp.where(size > 0, size, 1), 1)
        lengths = jnp.append(2.0 ** -jnp.arange(8, dtype=dtype), safe)
        values = jax.vmap(lambda length: dual(u + length * move))(lengths)
        now = dual(u)
        better = jnp.min(values) < now
        # So near the end values are rounding, and the full step is better than comparing them.
        decrease = -(gradient @ move + 0.5 * move @ hessian @ move)
        small = decrease <= 100 * eps * (1 + jnp.abs(now))
        length = jnp.where(small, 1, jnp.where(better, lengths[jnp.argmin(values)], 0))
        return u + length * move, small | ~better, iterations + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, done, iterations = state
        return ~done & (iterations < max_iterations)

    start = (jnp.zeros(white.shape[-1], dtype), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    u, _, iterations = jax.lax.while_loop(unfinished, step, start)
    log_prob = policy(u)
    mean = setting.context_prob @ jnp.einsum("xa,xad->xd", jnp.exp(log_prob), white)
    return Saddle(log_prob, u, certificate(u, mean), iterations)


def _ball_minimum(
    model: Float[Array, "dim dim"], target: Float[Array, " dim"]
) -> Float[Array, " dim"]:
    r"""Minimize :math:`\tfrac12 u^\top M u - b^\top u` over the unit ball.

    u = (M + mu I)^-1 b with the least mu >= 0 that makes it fit: Newton on 1/||u(mu)||, which is
    concave, rises to the root from the left (Moré and Sorensen, 1983).
    """
    curvature, axes = jnp.linalg.eigh(model)
    curvature = jnp.maximum(curvature, jnp.finfo(model.dtype).tiny)
    along = axes.T @ target

    def rise(_: Array, mu: Array) -> Array:
        scaled = along / (curvature + mu)
        square = scaled @ scaled
        slope = scaled @ (scaled / (curvature + mu))
        change = (jnp.sqrt(square) - 1) * square / jnp.where(slope > 0, slope, 1)
        return jnp.maximum(mu + change, 0)

    mu = jax.lax.fori_loop(0, 25, rise, jnp.zeros((), model.dtype))
    u = axes @ (along / (curvature + mu))
    return u / jnp.maximum(jnp.sqrt(u @ u), 1)
