r"""Losses on groups of K scored responses: named compositions of families R and G.

One signature, ``loss(group) -> [*batch]``, for a bandit and for a language model. A
:class:`Group` holds K draws from a policy at each context, their rewards, and log-probabilities
token by token; an action of a bandit is a response of one token. A factory binds the
hyper-parameters and returns the loss.

==================== ========================================================= =================
loss                 law it converges to, on the policy's own draws            source (arXiv)
==================== ========================================================= =================
:func:`regression`   Gibbs, :math:`\pi_0 e^{r/\eta}`, whatever the divergence  2402.08714 (PRDP)
:func:`rloo`         Gibbs                                                     2402.14740
:func:`qrpo`         Gibbs of the quantile of the reward under pi0             2507.08068
:func:`grpo`         forward KL's, at eta times the deviation of the reward    2402.03300
:func:`dr_grpo`      forward KL's, :math:`\eta\,\pi_0/(\lambda - r)`           2503.20783
:func:`dapo`         none: without a KL it ends deterministic                  2503.14476
:func:`gspo`         none, as DAPO                                             2507.18071
==================== ========================================================= =================

What a law says of GRPO is not what its paper says; `policy_gradient` has the table with its
derivations, and the suite each row with its control. Off the policy (stale draws, several epochs)
the regression losses keep their minimum; clipped policy gradients do not.

Axes: ``batch`` (free: contexts or prompts), ``responses`` (K), ``length`` (tokens, last).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
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


Loss = Callable[[Group], Float[Array, "*batch"]]
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
) -> Loss:
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


def qrpo(*, kl_coef: Scalar) -> Loss:
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


def rloo(*, kl_coef: Scalar, divergence: FDivergence = reverse_kl) -> Loss:
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
    penalty: FDivergence = forward_kl,
    dual: Scalar | None = None,
    sequence: bool = False,
) -> Loss:
    r"""PPO's clipped surrogate on a group's advantages, with a divergence as a loss beside it.

    Args:
      advantage: of :mod:`.policy_gradient`: `by_std`, `group_mean`, `leave_one_out`, ...
      low, high, dual: of `policy_gradient.clipped`.
      mean, size: over which tokens (`policy_gradient.over_tokens`); it decides what length costs.
      kl_coef: coefficient of the penalty, per token; None: no KL, and then no law but the
        deterministic one.
      penalty: the surrogate of a divergence on token log-ratios: ``forward_kl`` is k3, which GRPO
        has, and whose law is *not* Gibbs; ``reverse_kl`` is k2, whose is.
      sequence: GSPO's ratio of the whole response for each of its tokens.
    """
    if kl_coef is not None:
        numerics.check_positive("kl_coef", kl_coef)

    def loss(group: Group) -> Array:
        weight = _weighed(group, advantage(group.reward, where=group.where))[..., None]
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
        if kl_coef is not None:
            ref = jnp.where(group.token_where, group.reference, 0)
            term = term + kl_coef * penalty.surrogate(current - ref)
        keep = group.token_where
        if group.where is not None:
            keep = keep & group.where[..., None]
        return gradients.over_tokens(term, keep, mean=mean, size=size)

    return loss


def grpo(*, kl_coef: Scalar, clip: Scalar = 0.2, eps: Scalar = 1e-4) -> Loss:
    r"""GRPO as published (arXiv 2402.03300, eq. 3): over the deviation, per response, k3 as a loss.

    Law, for one-token responses and many draws: :math:`\eta' \pi_0/(\lambda - r)` with
    :math:`\eta' = \eta\,\mathrm{sd}_\pi(r)`, the policy's own deviation. So ``kl_coef`` is not the
    eta of a Gibbs law, and lengths of several tokens make it a length bonus besides.
    """

    def advantage(reward: Array, *, where: Array | None = None) -> Array:
        return gradients.by_std(reward, where=where, eps=eps)

    return clipped(advantage=advantage, low=clip, high=clip, mean="response", kl_coef=kl_coef)


def dr_grpo(*, size: Scalar, kl_coef: Scalar | None = None, clip: Scalar = 0.2) -> Loss:
    """Dr. GRPO (arXiv 2503.20783): no deviation, one constant in place of each length.

    ``size`` is that constant (the paper's: the most new tokens). Law with ``kl_coef``, for
    one-token responses: forward KL's at ``kl_coef``; without it, none but the deterministic.
    """
    return clipped(
        advantage=gradients.group_mean,
        low=clip,
        high=clip,
        mean="constant",
        size=size,
        kl_coef=kl_coef,
    )


def dapo(*, low: Scalar = 0.2, high: Scalar = 0.28, eps: Scalar = 1e-4) -> Loss:
    """DAPO (arXiv 2503.14476, eq. 8): a higher upper clip, one mean over the group's tokens, no KL.

    Its filter (drop groups of equal rewards) is `policy_gradient.informative`, as the row's weight.
    Law: none but the deterministic.
    """

    def advantage(reward: Array, *, where: Array | None = None) -> Array:
        return gradients.by_std(reward, where=where, eps=eps)

    return clipped(advantage=advantage, low=low, high=high, mean="group")


def gspo(*, low: Scalar = 3e-4, high: Scalar = 4e-4, eps: Scalar = 1e-4) -> Loss:
    """GSPO (arXiv 2507.18071, eq. 5): GRPO's advantage, the whole sequence's ratio, no KL."""

    def advantage(reward: Array, *, where: Array | None = None) -> Array:
        return gradients.by_std(reward, where=where, eps=eps)

    return clipped(advantage=advantage, low=low, high=high, mean="response", sequence=True)


def _weighed(group: Group, weight: Array) -> Array:
    return weight if group.importance is None else weight * group.importance
