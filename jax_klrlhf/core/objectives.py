r"""Preference losses, one per name, ``Scores -> [batch]``, for bandits and language models.

Each is a composition of :mod:`.pairwise` (a score, a margin, a shape) with its hyper-parameters as
keywords; bind them: ``functools.partial(objectives.sigmoid, kl_coef=0.1)`` is a loss. Losses come
one per pair, so that the caller weights and averages. ``kl_coef`` is eta of Xiong et al. (arXiv
2312.11456), beta of DPO; it may be one number per pair. Losses that look at each response by itself
are in :mod:`.onesided`.

**Law**: what the population's minimizer over all policies is, where labels are Bradley-Terry of a
reward r; "none" where it depends on who is compared with whom.

=========================== =================================== ==============================
loss                        implicit reward or difference       law
=========================== =================================== ==============================
:func:`sigmoid`             eta log(pi/pi0)                     pi0 e^(r/eta): Gibbs
:func:`ipo`                 squared error instead of likelihood none
:func:`hinge`               hinge instead of likelihood         none
:func:`robust`              labels flipped at a known rate      Gibbs, of the clean r
:func:`rpo`                 + cross-entropy on the chosen       none; Gibbs at coefficient 0
:func:`cpo`                 no reference                        softmax(r/eta); as rpo
:func:`simpo`               no reference, per token, a margin   none; at 0 e^(length (r-l)/eta)
:func:`length_normalized`   eta log(pi/pi0) / length            pi0 e^(length (r-l)/eta)
:func:`f_divergence`        eta f'(pi/pi0)                      :func:`.regularized.log_prob`
:func:`chi_po`              eta (pi/pi0 + log(pi/pi0))          the same, where no clip binds
:func:`pessimistic`         eta log(pi/pi0) + bonus             pi0 e^((r - bonus)/eta)
:func:`exploratory`         + optimism                          none; Gibbs at coefficient 0
:func:`modpo`               (eta log(pi/pi0) - w' R) / w        pi0 e^((w r + w' R)/eta)
:func:`orpo`                odds, + cross-entropy on chosen     none
:func:`odpo`                a margin that grows with R          none
:func:`mm_dpo`              eta grows with R's margin           none
:func:`exo`                 KL from the label's law             none
:func:`discopop`            logistic and exponential, mixed     none
:func:`aot`                 of the sorted batch                 none
=========================== =================================== ==============================

:func:`orpo` has no reference and no regularizer: no law. LD-DPO changes the log-probabilities, not
the loss: ``training.tasks.preference(tail=)``. Token-level losses aren't of this form.

Axes: ``batch`` (free axes, one entry per pair), ``responses`` (chosen at 0, rejected at 1).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.core import bradley_terry, fdivergence, numerics, pairwise, preferences
from jax_klrlhf.core.fdivergence import FDivergence
from jax_klrlhf.core.numerics import Scalar, check_between, check_positive
from jax_klrlhf.core.pairwise import hinge as _hinge_shape
from jax_klrlhf.core.pairwise import logistic, margin, score, squared
from jax_klrlhf.core.preferences import PreferenceModel
from jax_klrlhf.core.scores import Scores, second

__all__ = [
    "Scores",
    "aot",
    "chi_po",
    "cpo",
    "discopop",
    "exo",
    "exploratory",
    "f_divergence",
    "hinge",
    "ipo",
    "length_normalized",
    "mm_dpo",
    "modpo",
    "odpo",
    "orpo",
    "pessimistic",
    "robust",
    "rpo",
    "sigmoid",
    "simpo",
    "weighted",
    "wpo_weight",
]


def sigmoid(
    scores: Scores,
    *,
    kl_coef: Scalar,
    label_smoothing: Scalar = 0.0,
    preference: PreferenceModel = preferences.bradley_terry,
) -> Float[Array, "*batch"]:
    r"""DPO: the likelihood of the implicit reward. Law: Gibbs (with smoothing: none).

    .. math:: -(1-\epsilon) \log \sigma(m) - \epsilon \log \sigma(-m), \qquad
        m = \eta (\log \tfrac{\pi}{\pi_0}(a^w) - \log \tfrac{\pi}{\pi_0}(a^l))

    ``label_smoothing`` (eps, at most 1/2) is "conservative DPO": labels are taken to be wrong at
    that rate; compare :func:`robust`. With another ``preference`` model than Bradley-Terry the
    label is read from ``scores.label`` (1 where that is None): a tie is then a tie, where a half
    label under Bradley-Terry is a win and a loss, which draws the policy to pi0. Source: arXiv
    2305.18290, eq. 7.

    >>> same = Scores(jnp.array([1.0, 1.0]), jnp.zeros(2), jnp.array([1, 1]))
    >>> float(sigmoid(same, kl_coef=0.1))  # log 2
    0.693...
    """
    check_between("label_smoothing", label_smoothing, 0, 0.5)
    label = 1 - label_smoothing
    if not preference.logistic and scores.label is not None:
        label = label_smoothing + (1 - 2 * label_smoothing) * scores.label
    return logistic(margin(score(scores), kl_coef=kl_coef), label=label, preference=preference)


def ipo(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""IPO: squared error of the log-ratio margin to a finite target, so that it stays finite.

    .. math:: \Big(\log \tfrac{\pi}{\pi_0}(a^w) - \log \tfrac{\pi}{\pi_0}(a^l)
        - \frac{1}{2\eta}\Big)^2

    ``kl_coef`` is tau. The log-ratios are sums over tokens, as in the paper. Not decreasing beyond
    the target. Law: none; with both responses from one mu,
    :math:`\pi_0 e^{P(\cdot \succ \mu)/\tau}`: win rates, not rewards. Source: arXiv 2310.12036,
    eq. 17.

    >>> float(ipo(Scores(jnp.array([3.0, 0.0]), jnp.zeros(2), jnp.array([1, 1])), kl_coef=0.5))
    4.0
    """
    check_positive("kl_coef", kl_coef)
    return squared(margin(score(scores), kl_coef=1), target=1 / (2 * kl_coef))


def hinge(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""Hinge loss on the margin of implicit rewards: SLiC normalized by the reference. Law: none.

    .. math:: \max(0,\; 1 - \eta (\log \tfrac{\pi}{\pi_0}(a^w) - \log \tfrac{\pi}{\pi_0}(a^l)))

    Source: arXiv 2305.10425 (SLiC-HF), in the form "hinge-norm" of arXiv 2309.06657 (RSO).

    >>> float(hinge(Scores(jnp.array([4.0, 0.0]), jnp.zeros(2), jnp.array([1, 1])), kl_coef=0.5))
    0.0
    """
    return _hinge_shape(margin(score(scores), kl_coef=kl_coef))


def robust(scores: Scores, *, kl_coef: Scalar, flip_rate: Scalar) -> Float[Array, "*batch"]:
    r"""rDPO: an unbiased estimate of the DPO loss on clean labels, from labels flipped at a rate.

    .. math:: \frac{(1-\epsilon)\, \ell(m) - \epsilon\, \ell(-m)}{1 - 2\epsilon}, \qquad
        \ell(m) = -\log \sigma(m)

    Its mean over flips at rate eps is the clean :math:`\ell(m)`. Bounded below if every observed
    probability lies in (eps, 1 - eps). Law: Gibbs of the reward behind the clean labels. The
    *likelihood* of flipped labels, always bounded, is ``sigmoid(preference=flipped(eps))``.
    ``flip_rate`` (eps) below 1/2. Source: arXiv 2403.00409, section 3.

    >>> same = Scores(jnp.array([1.0, 1.0]), jnp.zeros(2), jnp.array([1, 1]))
    >>> float(robust(same, kl_coef=0.1, flip_rate=0.2))  # log 2 again
    0.693...
    """
    return pairwise.robust(margin(score(scores), kl_coef=kl_coef), flip_rate=flip_rate)


def rpo(scores: Scores, *, kl_coef: Scalar, sft_coef: Scalar) -> Float[Array, "*batch"]:
    r"""RPO: DPO with cross-entropy on the chosen response, which is pessimism in disguise.

    .. math:: -\log \sigma(m) - \frac{c}{|a^w|} \log \pi(a^w)

    The cross-entropy is per token, as trainers have it. The paper's is a sum: give lengths of 1,
    and its eta times beta for c. Law: none but at c = 0; the population's gap grows with c, so c
    should fall with the data. Source: arXiv 2405.16436, with the chosen responses as the baseline
    policy.

    >>> pair = Scores(jnp.array([-6.0, -6.0]), jnp.array([-6.0, -6.0]), jnp.array([3, 3]))
    >>> float(rpo(pair, kl_coef=0.1, sft_coef=0.5))  # log 2 + 6/3 * 0.5
    1.693...
    """
    return sigmoid(scores, kl_coef=kl_coef) - sft_coef * _chosen_per_token(scores)


def cpo(scores: Scores, *, kl_coef: Scalar, sft_coef: Scalar) -> Float[Array, "*batch"]:
    r"""CPO: :func:`rpo` with a uniform reference, which need not be scored.

    .. math:: -\log \sigma(\eta \log \pi(a^w) - \eta \log \pi(a^l)) - \frac{c}{|a^w|} \log \pi(a^w)

    Law: softmax(r/eta) at c = 0. Source: arXiv 2401.08417, eq. 6.
    """
    found = logistic(margin(score(scores, reference=0), kl_coef=kl_coef))
    return found - sft_coef * _chosen_per_token(scores)


def simpo(scores: Scores, *, kl_coef: Scalar, margin: Scalar) -> Float[Array, "*batch"]:
    r"""SimPO: the mean log-probability per token as the reward, and a target margin; no reference.

    .. math:: -\log \sigma\Big(\frac{\eta}{|a^w|} \log \pi(a^w) - \frac{\eta}{|a^l|} \log \pi(a^l)
        - \gamma\Big)

    ``margin`` is gamma, in nats of the logit. Law: none; at gamma = 0
    :math:`e^{|a| (r - \lambda)/\eta}`, of no regularizer where lengths differ. Source: arXiv
    2405.14734, eq. 6.

    >>> pair = Scores(jnp.array([-2.0, -6.0]), None, jnp.array([2, 2]))  # 1 and 3 nats a token
    >>> float(simpo(pair, kl_coef=1.0, margin=2.0))
    0.693...
    """
    each = score(scores, reference=0, per_token=True)
    return logistic(pairwise.margin(each, kl_coef=kl_coef) - margin)


def length_normalized(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""DPO with the log-ratio per token, which takes the length out of the implicit reward.

    .. math:: -\log \sigma\Big(\frac{\eta}{|a^w|} \log \tfrac{\pi}{\pi_0}(a^w)
        - \frac{\eta}{|a^l|} \log \tfrac{\pi}{\pi_0}(a^l)\Big)

    ``kl_coef`` is then larger than in DPO by about a response's length (the paper: 5). Law:
    :math:`\pi_0 e^{|a| (r - \lambda)/\eta}`, of no regularizer where lengths differ. Source: arXiv
    2411.15124 (Tulu 3), section 5.

    >>> pair = Scores(jnp.array([2.0, 4.0]), jnp.zeros(2), jnp.array([5, 10]))  # 0.4 nats a token
    >>> float(length_normalized(pair, kl_coef=5.0))
    0.693...
    """
    return logistic(margin(score(scores, per_token=True), kl_coef=kl_coef))


def f_divergence(
    scores: Scores, *, kl_coef: Scalar, divergence: FDivergence
) -> Float[Array, "*batch"]:
    r"""f-DPO: the implicit reward under regularization by the f-divergence of pi from pi0.

    .. math:: -\log \sigma\big(\eta f'(z^w) - \eta f'(z^l)\big), \qquad z = \pi/\pi_0

    ``divergence`` is a member of :mod:`.fdivergence`; of the reverse KL it is :func:`sigmoid`. Law:
    the optimum of that regularizer, :func:`.regularized.log_prob`. Source: arXiv 2309.16240,
    theorem 1.

    >>> pair = Scores(jnp.log(jnp.array([2.0, 0.5])), jnp.zeros(2), jnp.array([1, 1]))
    >>> loss = f_divergence(pair, kl_coef=1.0, divergence=fdivergence.forward_kl)
    >>> bool(jnp.isclose(loss, jnp.log1p(jnp.exp(-1.5))))  # f'(z) = 1 - 1/z: 1/2 against -1
    True
    """
    return logistic(margin(score(scores, divergence=divergence), kl_coef=kl_coef))


def chi_po(scores: Scores, *, kl_coef: Scalar, clip: Scalar) -> Float[Array, "*batch"]:
    r"""Chi-squared preference optimization: DPO with :math:`z + \log z` in the place of log z.

    .. math:: -\log \sigma\big(\mathrm{clip}_{[-c, c]}(\eta \phi(z^w) - \eta \phi(z^l))\big),
        \qquad \phi(z) = z + \log z

    The regularizer is chi-squared plus KL, which is pessimism enough for single-policy coverage.
    ``clip`` is c = 2 R_max, the largest difference of rewards; beyond it the gradient is 0, by
    the paper's intention. ``jnp.inf`` leaves the margin unclipped. Law: that of
    :data:`.fdivergence.chi_po`, where no clip binds. Source: arXiv 2407.13399, algorithm 1.

    >>> pair = Scores(jnp.log(jnp.array([2.0, 1.0])), jnp.zeros(2), jnp.array([1, 1]))
    >>> loss = chi_po(pair, kl_coef=1.0, clip=10.0)  # (2 + log 2) - 1
    >>> bool(jnp.isclose(loss, jnp.log1p(jnp.exp(-(1 + jnp.log(2.0))))))
    True
    """
    each = score(scores, divergence=fdivergence.chi_po)
    return logistic(margin(each, kl_coef=kl_coef, clip=clip))


def pessimistic(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""DPO whose optimum is the Gibbs policy of the reward less its uncertainty.

    .. math:: -\log \sigma\big(\eta \log \tfrac{\pi}{\pi_0}(a^w) + \Gamma(a^w)
        - \eta \log \tfrac{\pi}{\pi_0}(a^l) - \Gamma(a^l)\big)

    The pessimistic policy is :math:`\pi \propto \pi_0 e^{(r - \Gamma)/\eta}`, so the reward that
    explains the preferences is :math:`r = \eta \log(\pi/\pi_0) + \Gamma`. The bonus Gamma is
    ``scores.bonus``. Law: :math:`\pi_0 e^{(r - \Gamma)/\eta}`. Offline GSHF, Option
    II, with DPO as the oracle: arXiv 2312.11456 (derivation here).

    >>> pair = Scores(jnp.zeros(2), jnp.zeros(2), jnp.array([1, 1]), bonus=jnp.array([1.0, 0.0]))
    >>> float(pessimistic(pair, kl_coef=0.1))  # an uncertain winner is explained: log(1 + 1/e)
    0.313...
    """
    bonus = scores.given("bonus")
    return logistic(margin(score(scores), kl_coef=kl_coef) + bonus[..., 0] - second(bonus))


def exploratory(scores: Scores, *, kl_coef: Scalar, optimism: Scalar) -> Float[Array, "*batch"]:
    r"""DPO with an optimistic (or pessimistic) estimate of the optimal value.

    .. math:: -\log \sigma(m) + c\, \log \pi(\tilde a)

    For the implicit reward the optimal value is :math:`V(x) = E_{\tilde a}[r] -
    \eta E_{\tilde a}[\log \tfrac{\pi}{\pi_0}(\tilde a)]`, whatever the law of the exploration
    response. With the first term held fixed, a *smaller* log-probability of it means a *larger*
    value. So ``optimism`` c > 0 is the online bonus: XPO (arXiv 2405.21046, algorithm 1) with
    responses from pi_0 and c its alpha; SELM (2405.19332) with responses of the current policy,
    c its alpha times ``kl_coef``; VPO online (2405.19320), likewise. And c < 0 is VPO offline:
    pessimism, a cross-entropy on trusted responses as in :func:`rpo`. Law: none but at c = 0; with
    c > 0 unbounded below where an action is in no comparison.

    >>> zero = Scores(jnp.zeros(2), jnp.zeros(2), jnp.array([1, 1]))
    >>> zero = zero._replace(exploration_log_prob=jnp.array(-5.0))
    >>> float(exploratory(zero, kl_coef=0.1, optimism=0.01))  # log 2 - 0.05
    0.643...
    """
    explored = scores.given("exploration_log_prob")
    return sigmoid(scores, kl_coef=kl_coef) + optimism * explored


def modpo(scores: Scores, *, kl_coef: Scalar, weight: Scalar) -> Float[Array, "*batch"]:
    r"""MODPO: DPO on one of several objectives, with the others' weighted reward as a margin.

    .. math:: -\log \sigma\Big(\frac{1}{w}\big(\eta \log \tfrac{\pi}{\pi_0}(a^w)
        - \eta \log \tfrac{\pi}{\pi_0}(a^l) - (R^w - R^l)\big)\Big)

    R = ``scores.reward`` is the weighted sum of the *other* objectives' rewards, w = ``weight`` is
    that of the labels' own. Law: :math:`\pi_0 e^{(w r + R)/\eta}`, so R's scale is not free.
    Source: arXiv 2310.03708, as in the authors' code.
    """
    other = scores.given("reward")
    offset = second(other) - other[..., 0]
    return logistic(margin(score(scores), kl_coef=kl_coef, offset=offset, scale=weight))


def orpo(scores: Scores, *, odds_coef: Scalar) -> Float[Array, "*batch"]:
    r"""ORPO: cross-entropy on the chosen response, and the odds of it against the rejected one.

    .. math:: -\log p_w - \lambda \log \sigma\Big(\log \frac{p_w}{1 - p_w}
        - \log \frac{p_l}{1 - p_l}\Big), \qquad p = e^{\log \pi(a) / |a|}

    lambda = ``odds_coef``. Without a reference, and p no probability of a whole response. Law:
    none. Source: arXiv 2403.07691, eqs. 4 to 7; trainers take the cross-entropy over the prompt
    too, here it is the response's.
    """
    check_positive("odds_coef", odds_coef)
    each = score(scores, reference=0, per_token=True)
    # A response that is certain has odds of infinity, and no gradient: the next lower number.
    odds = each - jnp.log(jnp.maximum(-jnp.expm1(each), jnp.finfo(each.dtype).tiny))
    return -odds_coef * bradley_terry.log_likelihood(odds[..., 0] - second(odds)) - each[..., 0]


def odpo(scores: Scores, *, kl_coef: Scalar, margin_coef: Scalar) -> Float[Array, "*batch"]:
    r"""ODPO: the better the winner is said to be, the larger the margin asked for. Law: none.

    .. math:: -\log \sigma(m - c \log (1 + R^w - R^l))

    of R = ``scores.reward``, c = ``margin_coef``; where R contradicts the label nothing is asked.
    The 1, ours, keeps the logarithm finite at R^w = R^l. Source: arXiv 2402.10571.
    """
    reward = scores.given("reward")
    apart = jnp.log1p(jnp.maximum(reward[..., 0] - second(reward), 0))
    return logistic(margin(score(scores), kl_coef=kl_coef) - margin_coef * apart)


def mm_dpo(
    scores: Scores, *, kl_coef: Scalar, growth: Scalar = 0.5, rate: Scalar = 0.5
) -> Float[Array, "*batch"]:
    r"""MM-DPO: a coefficient that grows with the margin of a reward model.

    .. math:: \eta(d) = \eta (1 + w (1 - e^{-k d})), \qquad d = \max(R^w - R^l, 0)

    of R = ``scores.reward``, w = ``growth``, k = ``rate``. Law: none (Gibbs at w = 0): it weighs
    trust, and regularizes nothing. Source: arXiv 2502.10391, section 4.2.
    """
    check_positive("kl_coef", kl_coef)
    reward = scores.given("reward")
    apart = jnp.maximum(reward[..., 0] - second(reward), 0)
    return sigmoid(scores, kl_coef=kl_coef * (1 - growth * jnp.expm1(-rate * apart)))


def exo(scores: Scores, *, kl_coef: Scalar, label_smoothing: Scalar) -> Float[Array, "*batch"]:
    r"""EXO on pairs: the reverse KL from the policy's law of the two to the label's. Law: none.

    .. math:: \sigma(m) \log \frac{\sigma(m)}{1 - \epsilon}
        + \sigma(-m) \log \frac{\sigma(-m)}{\epsilon}

    ``label_smoothing`` (eps) in (0, 1/2]. Source: arXiv 2402.00856, eq. 18, for K = 2.
    """
    check_between("label_smoothing", label_smoothing, 0, 0.5, low_open=True)
    found = margin(score(scores), kl_coef=kl_coef)
    won, lost = (bradley_terry.log_likelihood(s * found) for s in (1, -1))
    return jnp.exp(won) * (won - jnp.log1p(-label_smoothing)) + jnp.exp(lost) * (
        lost - jnp.log(label_smoothing)
    )


def discopop(
    scores: Scores, *, kl_coef: Scalar, temperature: Scalar = 0.05
) -> Float[Array, "*batch"]:
    r"""DiscoPOP: logistic and exponential loss, mixed by the margin itself. Law: none.

    .. math:: (1 - \sigma(m/\tau))\, {-\log \sigma(m)} + \sigma(m/\tau)\, e^{-m}

    Not convex: it has a second, shallow minimum at small margins. Source: arXiv 2406.08414, eq. 5.
    """
    check_positive("temperature", temperature)
    found = margin(score(scores), kl_coef=kl_coef)
    mix = jax.nn.sigmoid(found / temperature)
    # Far below 0, where e^-m overflows, its share is nothing.
    return bradley_terry.nll(found) * (1 - mix) + numerics.linear_exp(-found) * mix


def aot(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""AOT: DPO of the *sorted* batch, chosen against rejected of equal rank. Law: none.

    First-order stochastic dominance of the chosen responses' implicit rewards over the rejected
    ones': rows are coupled, so it means something for one batch ``[B]`` of equal weights, which
    micro-batches change. Source: arXiv 2406.05882 (the unpaired form).
    """
    ratio = jnp.sort(score(scores), axis=0)
    return logistic(margin(ratio, kl_coef=kl_coef))


def wpo_weight(scores: Scores) -> Float[Array, "*batch"]:
    r"""WPO's weight of a pair: how likely the policy is to give these responses now; no gradient.

    :math:`\exp(\frac{1}{|a^w|} \log \pi(a^w) + \frac{1}{|a^l|} \log \pi(a^l))`, in (0, 1]. Source:
    arXiv 2406.11827, without its alignment of weights by the vocabulary's.
    """
    each = score(scores, reference=0, per_token=True)
    return jax.lax.stop_gradient(jnp.exp(each[..., 0] + second(each)))


def weighted(
    loss: Float[Array, "*batch"], weight: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """A loss times a weight of each pair, which has no gradient: ``weighted(sigmoid(s, ..), w)``.

    Where the weight is one of the pair, and not of its label, a proper loss keeps its law.
    """
    return jax.lax.stop_gradient(weight) * loss


def _chosen_per_token(scores: Scores) -> Float[Array, "*batch"]:
    return score(scores, reference=0, per_token=True)[..., 0]
