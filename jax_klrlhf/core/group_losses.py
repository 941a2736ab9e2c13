r"""Losses on groups of K scored responses: named compositions of families R and G.

One signature, ``loss(group) -> [*batch]``, for a bandit and for a language model. A
:class:`Group` holds K draws from a policy at each context, their rewards, and log-probabilities
token by token; an action of a bandit is a response of one token. A factory binds the
hyper-parameters and returns the loss.

==================== ========================================================= =================
loss                 law it converges to, on the policy's own draws            source (arXiv)
==================== ========================================================= =================
:func:`regression`   Gibbs, :math:`\pi_0 e^{r/\eta}`, whatever the divergence  2402.08714 (PRDP)
:func:`rebel`        none: a step is pi_t e^(r/eta), which ends deterministic  2404.16767
:func:`rloo`         Gibbs                                                     2402.14740
:func:`qrpo`         Gibbs of the quantile of the reward under pi0             2507.08068
:func:`f_dpg`        Gibbs, whatever the divergence                            2302.08215
:func:`gdc`          Gibbs, as K grows                                         2012.11635
:func:`reinforce_pp` Gibbs                                                     2501.03262
:func:`grpo`         forward KL's, at eta times the deviation of the reward    2402.03300
:func:`dr_grpo`      forward KL's, :math:`\eta\,\pi_0/(\lambda - r)`           2503.20783
:func:`dapo`         none: without a KL it ends deterministic                  2503.14476
:func:`gspo`         none, as DAPO                                             2507.18071
:func:`copo`         none, as DAPO                                             COPO's own code
==================== ========================================================= =================

What a law says of GRPO is not what its paper says; `policy_gradient` has the table with its
derivations, and the suite each row with its control. Off the policy (stale draws, several epochs)
the regression losses keep their minimum; clipped policy gradients do not.

`catalogue.METHODS` has those that a name and a few numbers or words make (``klrlhf iterate``).

Axes: ``batch`` (free: contexts or prompts), ``responses`` (K), ``length`` (tokens, last).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core import numerics
from jax_klrlhf.core import policy_gradient as gradients
from jax_klrlhf.core import regression as regressions
from jax_klrlhf.core.fdivergence import FDivergence, forward_kl, reverse_kl
from jax_klrlhf.core.numerics import Scalar


class Group(NamedTuple):
    """K draws at each context with what a loss may look at; a field that is absent is None."""

    token_log_prob: Float[Array, "*batch responses length"]
    """Of each token under the policy that is trained; what stands at padding is not read."""
    reward: Float[Array, "*batch responses"]
    token_where: Bool[Array, "*batch responses length"]
    """True at the tokens of a response; from lengths."""
    ref_token_log_prob: Float[Array, "*batch responses length"] | None = None
    """Under pi0."""
    old_token_log_prob: Float[Array, "*batch responses length"] | None = None
    """Under the policy that drew, as *scored*: the ratio's denominator."""
    importance: Float[Array, "*batch responses"] | None = None
    """Weight of each response for a sampler that was not the scored policy (`truncated`)."""
    where: Bool[Array, "*batch responses"] | None = None
    """True at the responses that count; None: all."""
    classes: Int[Array, "*batch responses"] | None = None
    """Equal where two responses give the same answer."""

    @property
    def log_prob(self) -> Float[Array, "*batch responses"]:
        """Of each response, summed over its tokens."""
        return self._summed(self.token_log_prob)

    @property
    def log_ratio(self) -> Float[Array, "*batch responses"]:
        """``log pi - log pi_0`` of each response. ValueError without a reference."""
        return self.log_prob - self.ref_log_prob

    @property
    def reference(self) -> Float[Array, "*batch responses length"]:
        """``ref_token_log_prob``; ValueError where it is absent."""
        if self.ref_token_log_prob is None:
            raise ValueError(
                "this loss compares with the reference policy, and ref_token_log_prob is None: "
                "score the responses under pi0 too (rounds.on_policy does)"
            )
        return self.ref_token_log_prob

    @property
    def old(self) -> Float[Array, "*batch responses length"]:
        """``old_token_log_prob``; ValueError where it is absent."""
        if self.old_token_log_prob is None:
            raise ValueError(
                "this loss takes ratios to the policy that drew, and old_token_log_prob is None: "
                "score the responses under that policy too (rounds.on_policy does)"
            )
        return self.old_token_log_prob

    @property
    def old_log_prob(self) -> Float[Array, "*batch responses"]:
        """Of each response under the policy that drew; ValueError where it is absent."""
        return self._summed(self.old)

    @property
    def ref_log_prob(self) -> Float[Array, "*batch responses"]:
        """Of each response under pi0; ValueError where it is absent."""
        return self._summed(self.reference)

    @property
    def length(self) -> Int[Array, "*batch responses"]:
        """Tokens of each response."""
        return jnp.sum(self.token_where, -1)

    def _summed(self, token: Array) -> Array:
        return jnp.sum(jnp.where(self.token_where, token, 0), -1)


GroupLoss = Callable[[Group], Float[Array, "*batch"]]
Advantage = Callable[..., Float[Array, "*batch responses"]]
"""``advantage(reward [*batch, responses], where=)``, of :mod:`.policy_gradient`."""


def from_actions(
    log_prob: Float[Array, "*batch responses"],
    reward: Float[Array, "*batch responses"],
    *,
    ref_log_prob: Float[Array, "*batch responses"] | None = None,
    old_log_prob: Float[Array, "*batch responses"] | None = None,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Group:
    """A bandit's draws as a group: responses of one token.

    >>> group = from_actions(jnp.array([-1.0, -2.0]), jnp.array([0.0, 1.0]))
    >>> group.log_prob.tolist(), group.length.tolist()
    ([-1.0, -2.0], [1, 1])
    """
    token = lambda x: None if x is None else x[..., None]  # noqa: E731
    return Group(
        token_log_prob=log_prob[..., None],
        reward=reward,
        token_where=jnp.ones((*log_prob.shape, 1), bool),
        ref_token_log_prob=token(ref_log_prob),
        old_token_log_prob=token(old_log_prob),
        where=where,
    )


def regression(
    *, kl_coef: Scalar, divergence: FDivergence = reverse_kl, clip: Scalar | None = None
) -> GroupLoss:
    r"""Log-ratios regressed on rewards (PRDP, VarGrad, FoR; REBEL with pi_t as the reference).

    Law: the Gibbs policy at ``kl_coef``, on anyone's draws. ``clip`` is PRDP's proximal band on the
    log-ratio, in nats; it reads the policy that drew.
    """
    numerics.check_positive("kl_coef", kl_coef)

    def loss(group: Group) -> Array:
        def at(log_ratio: Array) -> Array:
            delta = regressions.residual(log_ratio, group.reward, kl_coef=kl_coef)
            return regressions.loss(delta, divergence=divergence, where=group.where)

        if clip is None:
            return at(group.log_ratio)
        old = group.old_log_prob - group.ref_log_prob
        return regressions.proximal(at, group.log_ratio, old, clip=clip)

    return loss


def rebel(*, kl_coef: Scalar) -> GroupLoss:
    r"""REBEL: log-ratios to the policy that *drew*, regressed on rewards (arXiv 2404.16767, eq. 8).

    One step, fitted exactly, is :math:`\pi_t e^{r/\eta}`: mirror ascent with step 1/eta. Law: none;
    repeated, pi0 is forgotten and the policy ends deterministic. For a KL to pi0, take
    :func:`regression`, which is this with pi0 as the reference.
    """
    numerics.check_positive("kl_coef", kl_coef)

    def loss(group: Group) -> Array:
        moved = group.log_prob - lax.stop_gradient(group.old_log_prob)
        delta = regressions.residual(moved, group.reward, kl_coef=kl_coef)
        return regressions.loss(delta, where=group.where)

    return loss


def f_dpg(
    *,
    kl_coef: Scalar,
    divergence: FDivergence = forward_kl,
    log_normalizer: Scalar | None = None,
) -> GroupLoss:
    r"""f-DPG: the policy gradient of a divergence from the target law (arXiv 2302.08215).

    .. math:: -\frac1K \sum_i \mathrm{stop}\Big(\frac{\pi}{q}(a_i)
        \big(R_i - \bar R_{-i}\big)\Big) \log \pi(a_i),
        \qquad R = -f'\Big(\frac{\pi}{p}\Big), \quad p = \frac{\pi_0 e^{r/\eta}}{Z}

    q is the policy that drew; the baseline is taken off before the weight, since the other order is
    biased. Z is estimated from the group's own draws, which biases small groups
    (``log_normalizer`` where it is known). Law: the Gibbs policy at ``kl_coef``, whatever the
    divergence; in a restricted class the divergence decides, and forward KL (:func:`gdc`'s) matches
    p's moments. For reverse KL, on the policy's own draws, it is :func:`rloo` over eta. The
    gradient of D_f is derived here and compared with autodiff; the authors' released code was read.
    """
    numerics.check_positive("kl_coef", kl_coef)

    def loss(group: Group) -> Array:
        delta = regressions.residual(group.log_ratio, group.reward, kl_coef=kl_coef)
        log_z = log_normalizer
        if log_z is None:
            log_z = _log_normalizer(_importance(group, kl_coef), group.where)[..., None]
        pseudo = lax.stop_gradient(-divergence.link(delta + log_z))
        weight = gradients.leave_one_out(pseudo, where=group.where)
        ratio = lax.stop_gradient(gradients.ratio(group.log_prob, group.old_log_prob))
        return gradients.surrogate(
            group.log_prob, _weighed(group, ratio * weight), where=group.where
        )

    return loss


def gdc(*, kl_coef: Scalar) -> GroupLoss:
    r"""GDC / DPG: likelihood of draws, weighed by the target over who drew (arXiv 2012.11635).

    .. math:: -\sum_i \mathrm{stop}(w_i) \log \pi(a_i), \qquad
        w \propto \frac{\pi_0 e^{r/\eta}}{q}(a_i)

    The forward KL to the target, by self-normalized importance sampling. Law: the Gibbs policy at
    ``kl_coef`` as K grows, on anyone's draws; at small K the weights are too even and the policy
    stays nearer to q. `targets.optimum` is the same as a target of weighted likelihood.
    """
    numerics.check_positive("kl_coef", kl_coef)

    def loss(group: Group) -> Array:
        log_weight = _importance(group, kl_coef)
        if group.importance is not None:
            log_weight = log_weight + jnp.log(group.importance)
        weight = jax.nn.softmax(log_weight, axis=-1)
        keep = jnp.ones(weight.shape, bool) if group.where is None else group.where
        return -jnp.sum(jnp.where(keep, weight * jnp.where(keep, group.log_prob, 0), 0), -1)

    return loss


def qrpo(*, kl_coef: Scalar) -> GroupLoss:
    """Regression of each response by itself on the quantile of its reward (arXiv 2507.08068).

    ``group.reward`` holds the quantile under pi0, in [0, 1] (`regression.quantile`), whose
    normalizer is known. Law: the Gibbs policy of the quantile at ``kl_coef``.
    """
    offset = regressions.uniform_offset(kl_coef)

    def loss(group: Group) -> Array:
        delta = regressions.residual(group.log_ratio, group.reward, kl_coef=kl_coef)
        at = jnp.broadcast_to(offset.astype(delta.dtype), delta.shape[:-1])
        return regressions.loss(delta, offset=at, where=group.where)

    return loss


def rloo(*, kl_coef: Scalar, divergence: FDivergence = reverse_kl) -> GroupLoss:
    """REINFORCE with the leave-one-out baseline, the KL in the reward (arXiv 2402.14740, eq. 6).

    Law: the Gibbs policy at ``kl_coef`` (another ``divergence``: its optimum). The gradient is that
    of :func:`regression` times ``kl_coef``, sample by sample.
    """
    numerics.check_positive("kl_coef", kl_coef)

    def loss(group: Group) -> Array:
        priced = gradients.regularized(
            group.reward, group.log_ratio, kl_coef=kl_coef, divergence=divergence
        )
        weight = gradients.leave_one_out(priced, where=group.where)
        return gradients.surrogate(group.log_prob, _weighed(group, weight), where=group.where)

    return loss


def clipped(
    *,
    advantage: Advantage,
    low: Scalar,
    high: Scalar,
    mean: Literal["response", "group", "constant"],
    size: Scalar | None = None,
    kl_coef: Scalar | None = None,
    kl: Literal["loss", "reward"] = "loss",
    penalty: FDivergence = forward_kl,
    dual: Scalar | None = None,
    sequence: bool = False,
) -> GroupLoss:
    r"""PPO's clipped surrogate on a group's advantages, with a divergence beside it or in them.

    Law: that of its choices, in the table of `policy_gradient`; none without a KL.

    Args:
      advantage: of :mod:`.policy_gradient`: `by_std`, `group_mean`, `leave_one_out`, ...
      low, high, dual: of `policy_gradient.clipped`.
      mean, size: over which tokens (`policy_gradient.over_tokens`); it decides what length costs.
      kl_coef: coefficient of the penalty; None: no KL, and then no law but the deterministic one.
      kl: ``loss``: the divergence's surrogate at each token's log-ratio, beside the advantages;
        ``reward``: its price taken from each response's reward, as the policy that drew has it.
      penalty: the divergence. As a loss ``forward_kl`` is k3, which GRPO has, and whose law is
        *not* Gibbs; ``reverse_kl`` is k2, whose is. In the reward ``reverse_kl`` is k1.
      sequence: GSPO's ratio of the whole response for each of its tokens.
    """
    if kl_coef is not None:
        numerics.check_positive("kl_coef", kl_coef)

    def loss(group: Group) -> Array:
        reward = group.reward
        if kl_coef is not None and kl == "reward":
            before = group.old_log_prob - group.ref_log_prob
            reward = gradients.regularized(reward, before, kl_coef=kl_coef, divergence=penalty)
        weight = _weighed(group, advantage(reward, where=group.where))[..., None]
        current, old = (
            jnp.where(group.token_where, x, 0) for x in (group.token_log_prob, group.old)
        )
        if sequence:
            ratio = gradients.sequence_ratio(group.log_prob, group.old_log_prob, group.length)
            ratio = ratio[..., None]
        else:
            ratio = gradients.ratio(current, old)
        ratio = jnp.broadcast_to(ratio, current.shape)
        weight = jnp.broadcast_to(weight, current.shape)
        term = gradients.clipped(ratio, weight, low=low, high=high, dual=dual)
        if kl_coef is not None and kl == "loss":
            ref = jnp.where(group.token_where, group.reference, 0)
            term = term + kl_coef * penalty.surrogate(current - ref)
        return gradients.over_tokens(
            term, group.token_where, mean=mean, size=size, responses=group.where
        )

    return loss


def grpo(*, kl_coef: Scalar, clip: Scalar = 0.2, eps: Scalar = 1e-4) -> GroupLoss:
    r"""GRPO as published (arXiv 2402.03300, eq. 3): over the deviation, per response, k3 as a loss.

    Law: for one-token responses and many draws :math:`\eta' \pi_0/(\lambda - r)` with
    :math:`\eta' = \eta\,\mathrm{sd}_\pi(r)`, the policy's own deviation. So ``kl_coef`` is not the
    eta of a Gibbs law, and lengths of several tokens make it a length bonus besides.
    """

    def advantage(reward: Array, *, where: Array | None = None) -> Array:
        return gradients.by_std(reward, where=where, eps=eps)

    return clipped(advantage=advantage, low=clip, high=clip, mean="response", kl_coef=kl_coef)


def dr_grpo(*, size: Scalar, kl_coef: Scalar | None = None, clip: Scalar = 0.2) -> GroupLoss:
    """Dr. GRPO (arXiv 2503.20783): no deviation, one constant in place of each length.

    ``size`` is that constant (the paper's: the most new tokens). Law: with
    ``kl_coef`` and one-token responses the forward KL's at it; without, none but the deterministic.
    """
    return clipped(
        advantage=gradients.group_mean,
        low=clip,
        high=clip,
        mean="constant",
        size=size,
        kl_coef=kl_coef,
    )


def reinforce_pp(*, kl_coef: Scalar, clip: Scalar = 0.2, eps: Scalar = 1e-4) -> GroupLoss:
    """REINFORCE++ (arXiv 2501.03262): KL in the reward, one deviation for the whole batch.

    The mean is each group's (its variant for several responses), the KL a response's. Law: the
    Gibbs policy at ``kl_coef``: a scale common to the batch moves no zero of the gradient, but near
    the optimum it does not let the noise shrink.
    """

    def advantage(reward: Array, *, where: Array | None = None) -> Array:
        return gradients.by_batch_std(reward, where=where, eps=eps)

    return clipped(
        advantage=advantage,
        low=clip,
        high=clip,
        mean="group",
        kl_coef=kl_coef,
        kl="reward",
        penalty=reverse_kl,
    )


def dapo(*, low: Scalar = 0.2, high: Scalar = 0.28, eps: Scalar = 1e-4) -> GroupLoss:
    """DAPO (arXiv 2503.14476, eq. 8): a higher upper clip, one mean over the group's tokens, no KL.

    Its filter (drop groups of equal rewards) is `policy_gradient.informative`, as the row's weight.
    Law: none but the deterministic.
    """

    def advantage(reward: Array, *, where: Array | None = None) -> Array:
        return gradients.by_std(reward, where=where, eps=eps)

    return clipped(advantage=advantage, low=low, high=high, mean="group")


def gspo(*, low: Scalar = 3e-4, high: Scalar = 4e-4, eps: Scalar = 1e-4) -> GroupLoss:
    """GSPO (arXiv 2507.18071, eq. 5): GRPO's advantage, the whole sequence's ratio, no KL.

    Law: none but the deterministic.
    """

    def advantage(reward: Array, *, where: Array | None = None) -> Array:
        return gradients.by_std(reward, where=where, eps=eps)

    return clipped(advantage=advantage, low=low, high=high, mean="response", sequence=True)


def copo(
    *,
    threshold: Scalar,
    sharpness: Scalar,
    clip: Scalar = 0.2,
    eps: Scalar = 1e-4,
) -> GroupLoss:
    r"""COPO: GRPO's own advantage blended with the group's consistency, by how much answers differ.

    .. math:: s\,\ell_{\text{local}} + (1 - s)\,\ell_{\text{global}}, \qquad
        s = \sigma(k (H_2 - b))

    The global weight of all K is `policy_gradient.consistency`, standardized over the batch's
    prompts, so that groups which all agree have a gradient. b = ``threshold`` (bits) and k =
    ``sharpness``. Reads ``group.classes``. Law: none but the deterministic, as without a KL; where
    no right answer is in reach both parts are 0 in expectation. Source: the authors' code of COPO.
    """

    def local(reward: Array, *, where: Array | None = None) -> Array:
        return gradients.by_std(reward, where=where, eps=eps)

    def loss(group: Group) -> Array:
        if group.classes is None:
            raise ValueError(
                "copo compares answers, and Group.classes is None: hand in whole numbers that are "
                "equal where two responses give the same answer"
            )
        shared = gradients.consistency(group.reward, group.classes, where=group.where)
        over = (shared - jnp.mean(shared)) / (jnp.std(shared) + eps)
        same = jnp.broadcast_to(over[..., None], group.reward.shape)

        def part(advantage: Advantage) -> Array:
            return clipped(advantage=advantage, low=clip, high=clip, mean="response")(group)

        entropy = gradients.answer_entropy(group.classes, where=group.where).astype(shared.dtype)
        share = jax.nn.sigmoid(sharpness * (entropy - threshold))
        return share * part(local) + (1 - share) * part(lambda reward, where=None: same)

    return loss


def _importance(group: Group, kl_coef: Scalar) -> Array:
    r"""log of :math:`\pi_0 e^{r/\eta}` over who drew; -inf at what is not kept."""
    log_weight = lax.stop_gradient(group.reward / kl_coef + group.ref_log_prob - group.old_log_prob)
    return log_weight if group.where is None else jnp.where(group.where, log_weight, -jnp.inf)


def _log_normalizer(log_weight: Array, where: Array | None) -> Array:
    count = log_weight.shape[-1] if where is None else jnp.maximum(jnp.sum(where, -1), 1)
    return jax.nn.logsumexp(log_weight, -1) - jnp.log(jnp.asarray(count, log_weight.dtype))


def _weighed(group: Group, weight: Array) -> Array:
    return weight if group.importance is None else weight * group.importance
