r"""Preference losses: functions of log-ratios, one per name, one number per example.

Every loss takes explicit arrays with free leading axes and returns the loss of each example, so
that the caller weights and averages. A *log-ratio* is :math:`\log \pi(a|x) - \log \pi_0(a|x)`,
summed over the tokens of a response; ``kl_coef`` is eta of Xiong et al. (arXiv 2312.11456), beta
of DPO. Most losses are the Bradley-Terry likelihood of a margin of implicit rewards,

.. math:: \ell = -\log \sigma\big(r_\pi(x, a^w) - r_\pi(x, a^l)\big),

and differ in the implicit reward :math:`r_\pi` alone.

============================ ==================================== ==================
loss                         implicit reward or difference        source (arXiv)
============================ ==================================== ==================
:func:`sigmoid`              eta log(pi/pi0)                      2305.18290
:func:`ipo`                  squared error instead of likelihood  2310.12036
:func:`hinge`                hinge instead of likelihood          2305.10425
:func:`robust`               labels flipped at a known rate       2403.00409
:func:`rpo`                  + cross-entropy on the chosen        2405.16436
:func:`simpo`                no reference, per token              2405.14734
:func:`length_normalized`    eta log(pi/pi0) / length             2411.15124
:func:`chi_po`               eta (pi/pi0 + log(pi/pi0))           2407.13399
:func:`f_divergence`         eta f'(pi/pi0)                       2309.16240
:func:`pessimistic`          eta log(pi/pi0) + bonus              2312.11456
:func:`exploratory`          + optimism                           2405.21046
============================ ==================================== ==================

Axes: ``batch`` (free axes, one entry per pair), ``responses`` (chosen at 0, rejected at 1).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_klrlhf.core import bradley_terry, numerics
from jax_klrlhf.core.numerics import Scalar

Link = Callable[[Array], Array]
"""From a log-ratio to f'(ratio), up to a constant: a member of the f-divergence family."""


class Scores(NamedTuple):
    """What a loss may look at: the log-probabilities of the responses of each pair, with lengths.

    The last axis is what is chosen among: the chosen response at 0, the rejected one at 1.
    ``ref_log_prob`` is None where no reference was scored, for losses that need none.

    >>> pair = Scores(jnp.array([-3.0, -5.0]), jnp.array([-4.0, -4.0]), jnp.array([7, 9]))
    >>> float(pair.chosen_log_ratio), float(pair.rejected_log_ratio), int(pair.chosen_length)
    (1.0, -1.0, 7)
    """

    log_prob: Float[Array, "*batch responses"]
    ref_log_prob: Float[Array, "*batch responses"] | None
    length: Int[Array, "*batch responses"]
    """Tokens of each response."""

    @property
    def log_ratio(self) -> Float[Array, "*batch responses"]:
        """``log pi - log pi_0`` of each response; ValueError without a reference."""
        if self.ref_log_prob is None:
            raise ValueError(
                "this loss compares with the reference policy, and ref_log_prob is None: score "
                "the reference too, or take a loss without one (objectives.simpo)"
            )
        return self.log_prob - self.ref_log_prob

    @property
    def chosen_log_prob(self) -> Float[Array, "*batch"]:
        """Log-probability of the chosen response."""
        return self.log_prob[..., 0]

    @property
    def rejected_log_prob(self) -> Float[Array, "*batch"]:
        """Log-probability of the rejected response."""
        return _second(self.log_prob)

    @property
    def chosen_log_ratio(self) -> Float[Array, "*batch"]:
        """Log-ratio of the chosen response."""
        return self.log_ratio[..., 0]

    @property
    def rejected_log_ratio(self) -> Float[Array, "*batch"]:
        """Log-ratio of the rejected response."""
        return _second(self.log_ratio)

    @property
    def chosen_length(self) -> Int[Array, "*batch"]:
        """Tokens of the chosen response."""
        return self.length[..., 0]

    @property
    def rejected_length(self) -> Int[Array, "*batch"]:
        """Tokens of the rejected response."""
        return _second(self.length)


def sigmoid(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
    label_smoothing: Scalar = 0.0,
) -> Float[Array, "*batch"]:
    r"""DPO: the Bradley-Terry likelihood of the implicit reward.

    .. math:: -(1-\epsilon) \log \sigma(m) - \epsilon \log \sigma(-m), \qquad
        m = \eta (\log \tfrac{\pi}{\pi_0}(a^w) - \log \tfrac{\pi}{\pi_0}(a^l))

    ``label_smoothing`` (eps, at most 1/2) is "conservative DPO": labels are taken to be wrong at
    that rate; compare :func:`robust`. Source: arXiv 2305.18290, eq. 7.

    >>> float(sigmoid(jnp.array(1.0), jnp.array(1.0), kl_coef=0.1))  # log 2
    0.693...
    """
    margin = kl_coef * (chosen_log_ratio - rejected_log_ratio)
    return bradley_terry.nll(margin, label=1 - label_smoothing)


def ipo(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "*batch"]:
    r"""IPO: squared error of the log-ratio margin to a finite target, so that it stays finite.

    .. math:: \Big(\log \tfrac{\pi}{\pi_0}(a^w) - \log \tfrac{\pi}{\pi_0}(a^l)
        - \frac{1}{2\eta}\Big)^2

    ``kl_coef`` is tau. The log-ratios are sums over tokens, as in the paper; some trainers put
    averages there: divide by the lengths before the call to have that variant. Not decreasing
    beyond the target. Source: arXiv 2310.12036, eq. 17.

    >>> float(ipo(jnp.array(3.0), jnp.array(0.0), kl_coef=0.5))  # (3 - 1)^2
    4.0
    """
    return (chosen_log_ratio - rejected_log_ratio - 1 / (2 * kl_coef)) ** 2


def hinge(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "*batch"]:
    r"""Hinge loss on the margin of implicit rewards: SLiC normalized by the reference.

    .. math:: \max(0,\; 1 - \eta (\log \tfrac{\pi}{\pi_0}(a^w) - \log \tfrac{\pi}{\pi_0}(a^l)))

    Source: arXiv 2305.10425 (SLiC-HF), in the form "hinge-norm" of arXiv 2309.06657 (RSO).

    >>> hinge(jnp.array([0.0, 4.0]), jnp.array([0.0, 0.0]), kl_coef=0.5).tolist()
    [1.0, 0.0]
    """
    return jax.nn.relu(1 - kl_coef * (chosen_log_ratio - rejected_log_ratio))


def robust(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
    flip_rate: Scalar,
) -> Float[Array, "*batch"]:
    r"""rDPO: an unbiased estimate of the DPO loss on clean labels, from labels flipped at a rate.

    .. math:: \frac{(1-\epsilon)\, \ell(m) - \epsilon\, \ell(-m)}{1 - 2\epsilon}, \qquad
        \ell(m) = -\log \sigma(m)

    Its mean over flips at rate eps is the clean :math:`\ell(m)`. Unbounded below, where the
    conservative ``sigmoid(label_smoothing=eps)`` is biased but bounded. ``flip_rate`` (eps) below
    1/2. Source: arXiv 2403.00409, section 3.

    >>> float(robust(jnp.array(1.0), jnp.array(1.0), kl_coef=0.1, flip_rate=0.2))  # log 2 again
    0.693...
    """
    if not isinstance(flip_rate, Array) and not 0 <= flip_rate < 0.5:
        raise ValueError(
            f"flip_rate must lie in [0, 0.5): got {flip_rate}. Labels that are wrong more often "
            "than right should be swapped; at 0.5 they carry no information."
        )
    margin = kl_coef * (chosen_log_ratio - rejected_log_ratio)
    right, wrong = bradley_terry.nll(margin), bradley_terry.nll(-margin)
    return ((1 - flip_rate) * right - flip_rate * wrong) / (1 - 2 * flip_rate)


def rpo(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    chosen_log_prob: Float[Array, "*batch"],
    chosen_length: Int[Array, "*batch"],
    *,
    kl_coef: Scalar,
    sft_coef: Scalar,
) -> Float[Array, "*batch"]:
    r"""RPO: DPO with cross-entropy on the chosen response, which is pessimism in disguise.

    .. math:: -\log \sigma(m) - \frac{c}{|a^w|} \log \pi(a^w)

    The cross-entropy is per token, as trainers have it. The paper's is a sum: give lengths of 1,
    and its eta times beta for c. Source: arXiv 2405.16436, the practical objective, with the
    chosen responses as the baseline policy.

    >>> zero, log_prob, length = jnp.array(0.0), jnp.array(-6.0), jnp.array(3)
    >>> float(rpo(zero, zero, log_prob, length, kl_coef=0.1, sft_coef=0.5))  # log 2 + 6/3 * 0.5
    1.693...
    """
    dpo = sigmoid(chosen_log_ratio, rejected_log_ratio, kl_coef=kl_coef)
    return dpo - sft_coef * _per_token(chosen_log_prob, chosen_length)


def simpo(
    chosen_log_prob: Float[Array, "*batch"],
    rejected_log_prob: Float[Array, "*batch"],
    chosen_length: Int[Array, "*batch"],
    rejected_length: Int[Array, "*batch"],
    *,
    kl_coef: Scalar,
    margin: Scalar,
) -> Float[Array, "*batch"]:
    r"""SimPO: the mean log-probability per token as the reward, and a target margin; no reference.

    .. math:: -\log \sigma\Big(\frac{\eta}{|a^w|} \log \pi(a^w) - \frac{\eta}{|a^l|} \log \pi(a^l)
        - \gamma\Big)

    ``margin`` is gamma, in nats of the logit. Source: arXiv 2405.14734, eq. 6.

    >>> log_prob, length = jnp.array([-2.0, -6.0]), jnp.array([2, 2])  # one and three nats a token
    >>> float(simpo(log_prob[0], log_prob[1], length[0], length[1], kl_coef=1.0, margin=2.0))
    0.693...
    """
    chosen = _per_token(chosen_log_prob, chosen_length)
    rejected = _per_token(rejected_log_prob, rejected_length)
    return bradley_terry.nll(kl_coef * (chosen - rejected) - margin)


def length_normalized(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    chosen_length: Int[Array, "*batch"],
    rejected_length: Int[Array, "*batch"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "*batch"]:
    r"""DPO with the log-ratio per token, which takes the length out of the implicit reward.

    .. math:: -\log \sigma\Big(\frac{\eta}{|a^w|} \log \tfrac{\pi}{\pi_0}(a^w)
        - \frac{\eta}{|a^l|} \log \tfrac{\pi}{\pi_0}(a^l)\Big)

    ``kl_coef`` is then larger than in DPO by about a response's length (the paper: 5).
    Source: arXiv 2411.15124 (Tulu 3), section 5.

    >>> ratio, length = jnp.array([2.0, 4.0]), jnp.array([5, 10])  # 0.4 nats a token, both
    >>> float(length_normalized(ratio[0], ratio[1], length[0], length[1], kl_coef=5.0))
    0.693...
    """
    chosen = _per_token(chosen_log_ratio, chosen_length)
    rejected = _per_token(rejected_log_ratio, rejected_length)
    return sigmoid(chosen, rejected, kl_coef=kl_coef)


def f_divergence(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
    derivative: Link,
) -> Float[Array, "*batch"]:
    r"""f-DPO: the implicit reward under regularization by the f-divergence of pi from pi0.

    .. math:: -\log \sigma\big(\eta f'(z^w) - \eta f'(z^l)\big), \qquad z = \pi/\pi_0, \qquad
        D_f(\pi \| \pi_0) = E_{\pi_0}[f(z)]

    For the policy that maximizes :math:`E_\pi r - \eta D_f` satisfies
    :math:`r = \eta f'(z) + \lambda(x)`. ``derivative`` maps a log-ratio to f'(z), up to a
    constant: :func:`reverse_kl` (that is :func:`sigmoid`), :func:`forward_kl`,
    :func:`jensen_shannon`, :func:`alpha` of a number, or a function of one's own.
    Source: arXiv 2309.16240, theorem 1.

    >>> ratio = jnp.log(jnp.array([2.0, 0.5]))  # f'(z) = -1/z: -1/2 against -2
    >>> margin = 1.5
    >>> loss = f_divergence(ratio[0], ratio[1], kl_coef=1.0, derivative=forward_kl)
    >>> bool(jnp.isclose(loss, jnp.log1p(jnp.exp(-margin))))
    True
    """
    margin = kl_coef * (derivative(chosen_log_ratio) - derivative(rejected_log_ratio))
    return bradley_terry.nll(margin)


def reverse_kl(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Member of :func:`f_divergence`: KL(pi || pi0), :math:`f = z \log z`, :math:`f' = \log z`.

    >>> float(reverse_kl(jnp.array(2.0)))
    2.0
    """
    return log_ratio


def forward_kl(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Member of :func:`f_divergence`: KL(pi0 || pi), :math:`f = -\log z`, :math:`f' = -1/z`.

    Below :math:`z = e^{-30}` continued linearly in the log-ratio (see ``numerics.linear_exp``).

    >>> float(forward_kl(jnp.log(jnp.array(0.25))))
    -4.0
    """
    return -numerics.linear_exp(-log_ratio)


def jensen_shannon(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Member of :func:`f_divergence`: Jensen-Shannon, :math:`f' = \log \frac{2 z}{1 + z}`.

    :math:`f = z \log z - (z + 1) \log \frac{z + 1}{2}`. Bounded above by log 2.

    >>> jensen_shannon(jnp.array([0.0, 1e4])).tolist()
    [0.0, 0.693...]
    """
    return math.log(2) + bradley_terry.log_likelihood(log_ratio)


def alpha(order: float) -> Link:
    r"""Member of :func:`f_divergence`: alpha-divergence, :math:`f' = (1 - z^{-\alpha})/\alpha`.

    :math:`f = (z^{1-\alpha} - (1-\alpha) z - \alpha)/(\alpha(\alpha-1))`, alpha in [0, 1]: from
    the reverse KL (``order`` 0, the limit) to the forward KL (``order`` 1). Where
    :math:`z^{-\alpha} > e^{30}` continued linearly in the log-ratio.

    >>> float(alpha(0.5)(jnp.log(jnp.array(0.25))))  # (1 - 2) / 0.5
    -2.0
    """
    if not 0 <= order <= 1:
        raise ValueError(
            f"alpha must lie in [0, 1]: got {order}. 0 is reverse KL, 1 is forward KL."
        )
    if order == 0:
        return reverse_kl

    def link(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        exponent = -order * log_ratio
        # expm1 where it matters, near 1, so that small orders do not cancel.
        small = jnp.expm1(jnp.minimum(exponent, 1.0))
        return -jnp.where(exponent < 1.0, small, numerics.linear_exp(exponent) - 1) / order

    return link


def chi_po(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
    clip: Scalar,
) -> Float[Array, "*batch"]:
    r"""Chi-squared preference optimization: DPO with :math:`z + \log z` in the place of log z.

    .. math:: -\log \sigma\big(\mathrm{clip}_{[-c, c]}(\eta \phi(z^w) - \eta \phi(z^l))\big),
        \qquad \phi(z) = z + \log z

    The regularizer is chi-squared plus KL, which is pessimism enough for single-policy coverage.
    ``clip`` is c = 2 R_max, the largest difference of rewards; beyond it the gradient is 0, by
    the paper's intention. ``jnp.inf`` leaves the margin unclipped.
    Source: arXiv 2407.13399, algorithm 1.

    >>> ratio = jnp.log(jnp.array([2.0, 1.0]))  # (2 + log 2) - 1
    >>> loss = chi_po(ratio[0], ratio[1], kl_coef=1.0, clip=10.0)
    >>> bool(jnp.isclose(loss, jnp.log1p(jnp.exp(-(1 + jnp.log(2.0))))))
    True
    """
    chosen, rejected = (
        numerics.linear_exp(log_ratio) + log_ratio
        for log_ratio in (chosen_log_ratio, rejected_log_ratio)
    )
    margin = kl_coef * (chosen - rejected)
    return bradley_terry.nll(jnp.clip(margin, -clip, clip))


def pessimistic(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    chosen_bonus: Float[Array, "*batch"],
    rejected_bonus: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "*batch"]:
    r"""DPO whose optimum is the Gibbs policy of the reward less its uncertainty.

    .. math:: -\log \sigma\big(\eta \log \tfrac{\pi}{\pi_0}(a^w) + \Gamma(a^w)
        - \eta \log \tfrac{\pi}{\pi_0}(a^l) - \Gamma(a^l)\big)

    The pessimistic policy is :math:`\pi \propto \pi_0 e^{(r - \Gamma)/\eta}`, so the reward that
    explains the preferences is :math:`r = \eta \log(\pi/\pi_0) + \Gamma`. The bonus Gamma is the
    radius times the uncertainty of each response, in units of reward. Offline GSHF, Option II,
    with DPO as the oracle: arXiv 2312.11456 (derivation here).

    >>> one = jnp.array(1.0)  # an uncertain winner: explained by its bonus, the ratio need not grow
    >>> float(pessimistic(0 * one, 0 * one, one, 0 * one, kl_coef=0.1))  # log(1 + 1/e)
    0.313...
    """
    margin = kl_coef * (chosen_log_ratio - rejected_log_ratio)
    return bradley_terry.nll(margin + chosen_bonus - rejected_bonus)


def exploratory(
    chosen_log_ratio: Float[Array, "*batch"],
    rejected_log_ratio: Float[Array, "*batch"],
    exploration_log_prob: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
    optimism: Scalar,
) -> Float[Array, "*batch"]:
    r"""DPO with an optimistic (or pessimistic) estimate of the optimal value.

    .. math:: -\log \sigma(m) + c\, \log \pi(\tilde a)

    For the implicit reward the optimal value is :math:`V(x) = E_{\tilde a}[r] -
    \eta E_{\tilde a}[\log \tfrac{\pi}{\pi_0}(\tilde a)]`, whatever the law of the exploration
    response. With the first term held fixed, a *smaller* log-probability of it means a *larger*
    value. So ``optimism`` c > 0 is the online bonus: XPO (arXiv 2405.21046, algorithm 1) with
    responses from pi_0 and c its alpha; SELM (2405.19332) with responses of the current policy,
    c its alpha times ``kl_coef``; VPO online (2405.19320), likewise. And c < 0 is VPO offline:
    pessimism, a cross-entropy on trusted responses as in :func:`rpo`.

    >>> zero = jnp.array(0.0)
    >>> float(exploratory(zero, zero, jnp.array(-5.0), kl_coef=0.1, optimism=0.01))  # log 2 - 0.05
    0.643...
    """
    dpo = sigmoid(chosen_log_ratio, rejected_log_ratio, kl_coef=kl_coef)
    return dpo + optimism * exploration_log_prob


def _second(x: Array) -> Array:
    """Entry 1 of a last axis of two; jax would clamp the index on an axis of one."""
    if x.shape[-1] != 2:
        raise ValueError(
            f"a pair has two responses on its last axis, chosen and rejected; got shape {x.shape}: "
            "choose two of them first (core.pairs)"
        )
    return x[..., 1]


def _per_token(total: Float[Array, "*batch"], length: Int[Array, "*batch"]) -> Array:
    """Mean per token; a response of length 0 counts as length 1."""
    return total / jnp.maximum(length, 1).astype(total.dtype)
