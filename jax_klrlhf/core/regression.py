r"""Regression on groups: fit log-ratios of K responses to their rewards (family R).

The KL-regularized optimum satisfies :math:`\log \pi/\pi_0 (a|x) = r(x, a)/\eta - \log Z(x)`, so the
residual

.. math:: \Delta_i = \log \tfrac{\pi}{\pi_0}(a_i | x) - r(x, a_i) / \eta

is one and the same number at every response: minus the log-normalizer. A loss that asks for that
needs no preference and no baseline. Many systems are members:

=========================== ============================== =====================================
system                      composition                    source (arXiv)
=========================== ============================== =====================================
PRDP, over pairs            4 :func:`loss`, reverse KL     2402.08714
REBEL                       the same, reference pi_t       2404.16767
VarGrad, mean-free TB, FoR  :func:`loss`, reverse KL       2010.10436, 2201.13259, 2406.05673
RLOO on r - eta log-ratio   the same gradient, over eta    2402.14740
f-divergence forms          :func:`loss`, another member   2302.08215 for the divergences
QRPO                        ``offset=uniform_offset``      2507.08068
OP-GFN                      :func:`listwise`               2310.00386
=========================== ============================== =====================================

**Laws.** On the current policy's draws, or on anyone's whose support is pi0's, every loss here but
:func:`listwise` is least at the Gibbs law :math:`\pi_0 e^{r/\eta}/Z`, whatever the divergence: the
divergence only changes the way there. On-policy the gradient of :func:`loss` is that of
:math:`D_f(\pi \| \pi_0 e^{r/\eta}/Z)` [derived; a test]; off-policy it is not.

Axes: ``batch`` (free leading axes: prompts), ``responses`` (K draws, last).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core import numerics
from jax_klrlhf.core.fdivergence import FDivergence, forward_kl, reverse_kl
from jax_klrlhf.core.numerics import Scalar


def residual(
    log_ratio: Float[Array, "*batch responses"],
    reward: Float[Array, "*batch responses"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "*batch responses"]:
    r""":math:`\Delta = \log(\pi/\pi_0) - r/\eta`, in nats; constant in a prompt at the optimum.

    With a uniform reference and :math:`R = e^{r/\eta}` it is ``log pi - log R``, the residual of
    trajectory balance.

    ValueError for a concrete ``kl_coef`` that is not positive.

    >>> residual(jnp.array([1.0, 0.0]), jnp.array([3.0, 1.0]), kl_coef=2.0).tolist()
    [-0.5, -0.5]
    """
    numerics.check_positive("kl_coef", kl_coef)
    return log_ratio - reward / kl_coef


def log_normalizer(
    delta: Float[Array, "*batch responses"],
    *,
    divergence: FDivergence = reverse_kl,
    where: Bool[Array, "*batch responses"] | None = None,
    steps: int = 60,
) -> Float[Array, "*batch"]:
    r"""The offset c at which ``mean_i link(delta_i - c) = 0``: what the group says of -log Z.

    It is where the group's loss is least, so that a loss may hold it fixed: its gradient with
    respect to the offset vanishes. The mean for reverse KL, :math:`-\log \mathrm{mean}\,
    e^{-\Delta}` for forward KL, a root by bisection otherwise (the link increases, so the root
    lies between the least and the largest residual). Not differentiated. A row without a kept
    response gives 0.

    >>> float(log_normalizer(jnp.array([1.0, 3.0])))
    2.0
    """
    keep = jnp.ones(delta.shape, bool) if where is None else where
    delta = lax.stop_gradient(jnp.where(keep, delta, 0))
    count = jnp.maximum(jnp.sum(keep, -1), 1).astype(delta.dtype)
    if divergence is reverse_kl:
        return jnp.sum(delta, -1) / count
    if divergence is forward_kl:
        total = numerics.masked_logsumexp(-delta, keep)
        return jnp.where(jnp.any(keep, -1), jnp.log(count) - total, 0)
    low = jnp.min(jnp.where(keep, delta, jnp.inf), -1)
    high = jnp.max(jnp.where(keep, delta, -jnp.inf), -1)
    some = jnp.any(keep, -1)
    low, high = jnp.where(some, low, 0), jnp.where(some, high, 0)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        excess = jnp.sum(jnp.where(keep, divergence.link(delta - middle[..., None]), 0), -1)
        return jnp.where(excess > 0, middle, low), jnp.where(excess > 0, high, middle)

    low, high = lax.fori_loop(0, steps, halve, (low, high))
    return (low + high) / 2


def loss(
    delta: Float[Array, "*batch responses"],
    *,
    divergence: FDivergence = reverse_kl,
    offset: Float[Array, "*batch"] | None = None,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Mean surrogate of the residuals about the group's own normalizer, in nats.

    .. math:: \frac{1}{K} \sum_i s_f(\Delta_i - c), \qquad s_f' = \text{link}

    For reverse KL, :math:`s = \Delta^2/2` and the sum is divided by K - 1, as a variance is: then
    it is half the sample variance of the residuals (VarGrad), half the mean of all pairs' squared
    differences over two (PRDP), and its gradient *is* RLOO's on the reward r - eta log-ratio, over
    eta, sample by sample.

    Law: the Gibbs policy of the reward (see the head of this file). With one kept response and no
    ``offset`` there is nothing to compare: the loss is 0 identically.

    Args:
      delta: of :func:`residual`.
      divergence: a member of the family of :mod:`.divergence`.
      offset: -log Z where it is known (:func:`uniform_offset`); None: :func:`log_normalizer`.
      where: True keeps a response. Copies of one response say nothing new (`pairs.distinct`).

    >>> float(loss(jnp.array([1.0, 3.0])))  # variance 2, halved
    1.0
    """
    keep = jnp.ones(delta.shape, bool) if where is None else where
    delta = jnp.where(keep, delta, 0)
    count = jnp.sum(keep, -1).astype(delta.dtype)
    fitted = offset is None
    centre = log_normalizer(delta, divergence=divergence, where=keep) if offset is None else offset
    spread = jnp.where(keep, divergence.surrogate(delta - centre[..., None]), 0)
    total = jnp.sum(spread, -1)
    # K - 1 where the mean was fitted to the same K residuals: then the gradient is unbiased.
    degrees = count - 1 if fitted and divergence is reverse_kl else count
    return jnp.where(degrees > 0, total / jnp.where(degrees > 0, degrees, 1), 0)


def uniform_offset(kl_coef: Scalar) -> Float[Array, "..."]:
    r"""The offset -log Z of a reward that is uniform on [0, 1] under pi0 (quantile rewards).

    .. math:: Z = \int_0^1 e^{u/\eta} du = \eta\,(e^{1/\eta} - 1)

    QRPO (arXiv 2507.08068) regresses on a response's *quantile* of reward under pi0, whose law is
    uniform whatever the reward, so that log Z is known and one response is enough. With ties (a
    reward with atoms) the quantile is not uniform and this is not its normalizer.

    >>> bool(jnp.isclose(uniform_offset(1.0), -jnp.log(jnp.e - 1)))
    True
    """
    numerics.check_positive("kl_coef", kl_coef)
    inverse = 1 / jnp.asarray(kl_coef, jnp.result_type(float, kl_coef))
    # log(eta (e^{1/eta} - 1)) = 1/eta + log(1 - e^{-1/eta}) - log(1/eta), which does not overflow.
    return -(inverse + jnp.log(-jnp.expm1(-inverse)) - jnp.log(inverse))


def listwise(
    log_prob: Float[Array, "*batch responses"],
    target: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Cross-entropy of a target over the group with the policy *renormalized to the group*.

    .. math:: -\sum_i t_i \log \frac{\pi(a_i)}{\sum_j \pi(a_j)}

    OP-GFN with the (normalized) indicator of the group's non-dominated members as the target; at
    K = 2 with all mass on the winner it is Bradley-Terry on log pi.

    Law: none with a hard target. The winner's share grows without end and the policy becomes
    sparse, as arXiv 2310.00386 says; a KL term to pi0 beside it gives a minimum.

    ``target`` is non-negative and is normalized over the kept responses; a row without target mass
    gives 0.

    >>> float(listwise(jnp.log(jnp.array([0.2, 0.2])), jnp.array([1.0, 0.0])))  # log 2
    0.693...
    """
    keep = jnp.ones(log_prob.shape, bool) if where is None else where
    target = jnp.where(keep, target, 0)
    mass = jnp.sum(target, -1)
    log_total = numerics.masked_logsumexp(log_prob, keep)
    log_total = jnp.where(jnp.any(keep, -1), log_total, 0)
    log_share = jnp.where(target > 0, log_prob, 0) - log_total[..., None]
    summed = jnp.sum(jnp.where(target > 0, target * log_share, 0), -1)
    return jnp.where(mass > 0, -summed / jnp.where(mass > 0, mass, 1), 0)


def proximal(
    loss: Callable[[Array], Float[Array, "*batch"]],
    log_ratio: Float[Array, "*batch responses"],
    old_log_ratio: Float[Array, "*batch responses"],
    *,
    clip: Scalar,
) -> Float[Array, "*batch"]:
    r"""The larger of a loss and the loss at log-ratios clipped to ``old_log_ratio +- clip``.

    PRDP's trust region (arXiv 2402.08714, section 4.3): beyond the band the clipped loss stands
    still, so a step that would *lower* the loss there has no gradient, and one that raised it has.
    ``loss`` maps log-ratios ``[*batch, responses]`` to ``[*batch]``. Law: that of ``loss``, where
    it lies within the band.

    >>> at = lambda u: jnp.sum((u - 3.0) ** 2, -1)
    >>> float(proximal(at, jnp.array([2.0]), jnp.array([0.0]), clip=1.0))  # at 1, not at 2
    4.0
    """
    numerics.check_positive("clip", clip)
    clipped = old_log_ratio + jnp.clip(log_ratio - old_log_ratio, -clip, clip)
    return jnp.maximum(loss(log_ratio), loss(clipped))


def quantile(
    reward: Float[Array, "*batch responses"],
    reference: Float[Array, "*batch draws"],
) -> Float[Array, "*batch responses"]:
    r"""Share of a reference's rewards that a reward exceeds, ties counted half: QRPO's reward.

    ``reference`` are rewards of draws from pi0 at the same prompt. In [0, 1]; its law under pi0
    tends to the uniform one with the number of draws if the reward has no atoms.

    >>> quantile(jnp.array([0.5]), jnp.array([0.0, 0.5, 1.0, 2.0])).tolist()
    [0.375]
    """
    difference = reward[..., :, None] - reference[..., None, :]
    return jnp.mean(0.5 + 0.5 * jnp.sign(difference), -1)
