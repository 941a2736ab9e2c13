r"""The KL-regularized objective over enumerated actions, and its optimum, the Gibbs policy.

.. math::
    J(\pi \mid x) &= E_{a \sim \pi}[r(x, a)] - \eta\, \mathrm{KL}(\pi(\cdot|x) \| \pi_0(\cdot|x)) \\
    \pi_r(a \mid x) &= \pi_0(a \mid x)\, e^{r(x, a)/\eta} / Z_r(x), \qquad
    \max_\pi J = \eta \log Z_r(x)

``kl_coef`` is eta in Xiong et al. (arXiv 2312.11456, section 2), beta in Rafailov et al.
(arXiv 2305.18290, equations 3 and 4): a positive scalar, traced or not; sweep it by ``vmap``.
``ref_log_prob`` is log pi_0, and need not be normalized: any positive measure will do, so that
actions may be masked without renormalizing. An action is out of play where ``where`` is False,
``ref_log_prob`` is -inf, or the reward is -inf; nothing that stands there reaches a value or a
gradient. ValueError on a concrete ``kl_coef`` that is not positive.

A row without any action in play has ``log_prob`` and ``free_energy`` -inf and ``value`` 0, all
with gradient 0; never NaN.

Axes: ``batch`` (free leading axes), ``actions`` (what is chosen among, always last).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core import divergence, fdivergence, numerics
from jax_klrlhf.core.numerics import Scalar


def _log_weight(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    kl_coef: Scalar,
    where: Bool[Array, "*batch actions"] | None,
) -> tuple[Array, Array, Array]:
    """``log pi_0 + (r - shift)/eta``, with the support and the shift (the row's largest reward).

    Without the shift, r = 1e4 and eta = 1e-4 leave nothing of log pi_0 in float32.
    """
    numerics.check_positive("kl_coef", kl_coef)
    # A reward of -inf in the quotient would have a gradient in kl_coef of infinity times 0.
    keep = numerics.support(ref_log_prob, where) & (reward != -jnp.inf)
    reward = jnp.where(keep, reward, 0)
    shift = numerics.masked_max(reward, keep)
    scaled = (reward - shift[..., None]) / kl_coef
    return jnp.where(keep, ref_log_prob, 0) + scaled, keep, shift


def _log_z(
    weight: Float[Array, "*batch actions"], keep: Bool[Array, "*batch actions"]
) -> Float[Array, "*batch"]:
    """Log of the total weight; 0 for an empty row: -inf times a gradient of 0 would be NaN."""
    total = numerics.masked_logsumexp(weight, keep)
    return jnp.where(total == -jnp.inf, 0, total)


def _optimum(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    kl_coef: Scalar,
    where: Bool[Array, "*batch actions"] | None,
) -> Float[Array, "*batch actions"]:
    """Body of :func:`log_prob`, whose name other functions use for an argument."""
    weight, keep, _ = _log_weight(reward, ref_log_prob, kl_coef, where)
    return jnp.where(keep, weight - _log_z(weight, keep)[..., None], -jnp.inf)


def log_prob(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    r"""Log-probabilities of the optimum of the KL-regularized objective.

    .. math:: \log \pi_r(a|x) = \log \pi_0(a|x) + r(x, a)/\eta - \log Z_r(x)

    -inf at actions out of play. Source: arXiv 2312.11456, section 2; arXiv 2305.18290, eq. 4.

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> jnp.exp(log_prob(2 * jnp.log(jnp.array([3.0, 1.0])), uniform, kl_coef=2.0)).tolist()
    [0.75, 0.25]
    """
    return _optimum(reward, ref_log_prob, kl_coef, where)


def implicit_reward(
    log_prob: Float[Array, "*batch"],
    ref_log_prob: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "*batch"]:
    r"""Reward whose KL-regularized optimum is the given policy.

    .. math:: r(x, a) = \eta \log \frac{\pi(a \mid x)}{\pi_0(a \mid x)}

    Defined up to a constant per context, which cancels in any margin. Inverse of
    :func:`log_prob`. Source: arXiv 2305.18290, eq. 5. -inf where only pi is 0, +inf where only
    pi_0 is, both with a finite gradient; 0 where both are: an action that neither policy takes has
    no reward to speak of.

    >>> float(implicit_reward(jnp.log(0.5), jnp.log(0.25), kl_coef=2.0))  # 2 log 2
    1.386...
    """
    numerics.check_positive("kl_coef", kl_coef)
    known = ref_log_prob > -jnp.inf
    log_ratio = jnp.where(known, log_prob, 0) - jnp.where(known, ref_log_prob, 0)
    return jnp.where(~known & (log_prob > -jnp.inf), jnp.inf, kl_coef * log_ratio)


def free_energy(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The optimal value, :math:`\eta \log Z_r(x) = \max_\pi J(\pi|x)`, in units of reward.

    Its gradient in the reward is the optimal policy. It lies between the mean reward under pi_0
    (``kl_coef`` to infinity) and the largest reward (``kl_coef`` to 0), for a normalized pi_0.

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> float(free_energy(jnp.log(jnp.array([3.0, 1.0])), uniform, kl_coef=1.0))  # log(3/2 + 1/2)
    0.693...
    """
    weight, keep, shift = _log_weight(reward, ref_log_prob, kl_coef, where)
    energy = shift + kl_coef * _log_z(weight, keep)
    return jnp.where(jnp.any(keep, axis=-1), energy, -jnp.inf)


def value(
    log_prob: Float[Array, "*batch actions"],
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The objective :math:`J(\pi|x)` of a policy: expected reward less ``kl_coef`` times the KL.

    -inf for a policy that leaves the support of pi_0; the divergence then has no gradient.

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> always_first = jnp.log(jnp.array([1.0, 0.0]))
    >>> float(value(always_first, jnp.array([3.0, 0.0]), uniform, kl_coef=1.0))  # 3 - log 2
    2.306...
    """
    numerics.check_positive("kl_coef", kl_coef)
    expected = numerics.expectation(log_prob, reward, where=where)
    return expected - _scaled(divergence.categorical(log_prob, ref_log_prob, where=where), kl_coef)


def gap(
    log_prob: Float[Array, "*batch actions"],
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Suboptimality :math:`J(\pi_r|x) - J(\pi|x) = \eta\, \mathrm{KL}(\pi \| \pi_r)`.

    The right-hand side is computed, as a sum of terms of one sign: it does not cancel as a
    difference of two values does, and is never negative. The policy is taken to be normalized.

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> float(gap(uniform, jnp.array([1.0, 1.0]), uniform, kl_coef=0.1))  # already optimal
    0.0
    """
    optimum = _optimum(reward, ref_log_prob, kl_coef, where)
    cost = fdivergence.categorical(
        log_prob, optimum, divergence=fdivergence.reverse_kl, where=where
    )
    return _scaled(cost, kl_coef)


def _scaled(cost: Float[Array, "*batch"], kl_coef: Scalar) -> Float[Array, "*batch"]:
    """``kl_coef`` times a divergence; where that is infinite, without a gradient."""
    infinite = jnp.isinf(cost)
    return jnp.where(infinite, jnp.inf, kl_coef * jnp.where(infinite, 0, cost))
