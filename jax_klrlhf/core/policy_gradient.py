r"""Policy gradients on groups of K draws: reward, baseline, scale, length and clip (family G).

A named method is a composition of a few choices:

.. math:: -\frac{1}{K} \sum_i \mathrm{stop}(w_i)\, \log \pi(a_i|x), \qquad
    w = \text{scale}\big(\text{centre}(r - \eta\,\text{link}(\log \pi/\pi_0))\big)

============ ========================================== =============================== ==========
method       reward and KL                              advantage                       clip
============ ========================================== =============================== ==========
RLOO         :func:`regularized`                        :func:`leave_one_out`           none
GRPO         reward; k3 as a loss                       :func:`by_std` of group mean    symmetric
Dr. GRPO     reward; k3 as a loss, or none              :func:`group_mean`              symmetric
DAPO         reward; none                               :func:`by_std`, filtered        asymmetric
GSPO         reward                                     :func:`by_std`                  of sequence
REINFORCE++  :func:`regularized`                        :func:`by_batch_std`            symmetric
============ ========================================== =============================== ==========

**What each converges to** is not what each is said to [derived; every line is a test on exact
expectations of a tabular softmax policy]:

================================================== ==============================================
choice                                             fixed point
================================================== ==============================================
KL in the reward (k1), leave-one-out, no scale     Gibbs, :math:`\pi_0 e^{r/\eta}`
k2 as a loss, no scale                             Gibbs
k3 as a loss (GRPO's published form), no scale     forward KL's law, :math:`\eta\pi_0/(\lambda-r)`
k3 as a loss, divided by the standard deviation    the same at :math:`\eta\,\mathrm{sd}_\pi(r)`
k2 as a loss, divided by the standard deviation    Gibbs at :math:`\eta\,\mathrm{sd}_\pi(r)`, and
                                                   none below the least of tau / sd_Gibbs(tau)(r)
K = 2, divided by the deviation, k2 as a loss      win rates: :math:`\pi_0 e^{(2F_\pi(r)-1)/\eta}`
each response over its length, KL as a loss        Gibbs of r plus a *bonus* on length
================================================== ==============================================

Axes: ``batch`` (free leading axes: prompts), ``responses`` (K draws of the policy), ``length``.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_klrlhf.core import numerics
from jax_klrlhf.core.fdivergence import FDivergence, reverse_kl
from jax_klrlhf.core.numerics import Scalar


def regularized(
    reward: Float[Array, "*batch responses"],
    log_ratio: Float[Array, "*batch responses"],
    *,
    kl_coef: Scalar,
    divergence: FDivergence = reverse_kl,
) -> Float[Array, "*batch responses"]:
    r"""Reward less the divergence's price at each draw, a constant to the gradient.

    .. math:: r - \eta\, \text{link}(\log \pi/\pi_0)

    Since :math:`\nabla D_f(\pi\|\pi_0) = E_\pi[f'(\pi/\pi_0) \nabla \log\pi]`, with this as the
    reward a policy gradient climbs :math:`E r - \eta D_f`, whose maximum is the divergence's
    optimum (`divergence.optimum`; Gibbs for reverse KL, where the price is the k1 estimate).

    >>> regularized(jnp.array([1.0]), jnp.array([0.5]), kl_coef=2.0).tolist()
    [0.0]
    """
    numerics.check_positive("kl_coef", kl_coef)
    return lax.stop_gradient(reward - kl_coef * divergence.link(log_ratio))


def leave_one_out(
    x: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch responses"]:
    r"""Less the mean of the *other* draws: RLOO's baseline (arXiv 2402.14740), unbiased.

    K / (K - 1) times :func:`group_mean`, exactly. 0 where a row has fewer than two kept draws, and
    at what is not kept.

    >>> leave_one_out(jnp.array([0.0, 2.0])).tolist()
    [-2.0, 2.0]
    """
    keep = _kept(x, where)
    count = jnp.sum(keep, -1, keepdims=True).astype(x.dtype)
    scale = count / jnp.maximum(count - 1, 1)
    return jnp.where(count > 1, scale * group_mean(x, where=keep), 0)


def group_mean(
    x: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch responses"]:
    """Less the mean of the group, itself included: (K - 1) / K of :func:`leave_one_out`.

    Dr. GRPO's advantage (arXiv 2503.20783). 0 at what is not kept.

    >>> group_mean(jnp.array([0.0, 2.0])).tolist()
    [-1.0, 1.0]
    """
    keep = _kept(x, where)
    count = jnp.maximum(jnp.sum(keep, -1, keepdims=True), 1).astype(x.dtype)
    kept = jnp.where(keep, x, 0)
    return jnp.where(keep, kept - jnp.sum(kept, -1, keepdims=True) / count, 0)


def by_std(
    x: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
    eps: Scalar = 0.0,
    ddof: int = 0,
) -> Float[Array, "*batch responses"]:
    r"""Centred and divided by the group's standard deviation: GRPO's advantage (2402.03300, 4.1.2).

    A group whose rewards are all equal gives exactly 0, whatever ``eps`` (which is added to the
    deviation and decides how near-ties count). What it does to the law: the coefficient becomes
    ``kl_coef`` times the *policy's own* deviation of the reward, which shrinks as the policy
    sharpens; for large K, k2 as a loss and a small coefficient nothing stops it. See the table.

    >>> by_std(jnp.array([0.0, 2.0])).tolist()
    [-1.0, 1.0]
    """
    keep = _kept(x, where)
    centred = group_mean(x, where=keep)
    count = jnp.maximum(jnp.sum(keep, -1, keepdims=True) - ddof, 1).astype(x.dtype)
    deviation = numerics.safe_sqrt(jnp.sum(centred**2, -1, keepdims=True) / count)
    return _divided(centred, deviation, eps)


def by_batch_std(
    x: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
    eps: Scalar = 0.0,
) -> Float[Array, "*batch responses"]:
    """Centred at the prompt, divided by the deviation over *all* prompts (REINFORCE++, 2501.03262).

    One scale for the batch: prompts keep their relative weight, and the law is Gibbs at ``kl_coef``
    times that one number.

    >>> by_batch_std(jnp.array([[0.0, 2.0], [5.0, 5.0]])).tolist()
    [[-1.414..., 1.414...], [0.0, 0.0]]
    """
    keep = _kept(x, where)
    centred = group_mean(x, where=keep)
    count = jnp.maximum(jnp.sum(keep), 1).astype(x.dtype)
    return _divided(centred, numerics.safe_sqrt(jnp.sum(centred**2) / count), eps)


def informative(
    x: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Bool[Array, "*batch"]:
    """True where a group's rewards are not all equal: DAPO's filter (arXiv 2503.14476, 3.2).

    The others have advantage 0, so dropping them changes the weights of prompts and nothing else.

    >>> informative(jnp.array([[1.0, 1.0], [0.0, 1.0]])).tolist()
    [False, True]
    """
    keep = _kept(x, where)
    high = jnp.max(jnp.where(keep, x, -jnp.inf), -1)
    low = jnp.min(jnp.where(keep, x, jnp.inf), -1)
    return high > low


def surrogate(
    log_prob: Float[Array, "*batch responses"],
    weight: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch"]:
    """-mean_i stop(weight_i) log pi_i: its gradient is the policy gradient, its value is no return.

    >>> float(surrogate(jnp.array([-1.0, -2.0]), jnp.array([1.0, -1.0])))
    -0.5
    """
    keep = _kept(log_prob, where)
    count = jnp.maximum(jnp.sum(keep, -1), 1).astype(log_prob.dtype)
    term = jnp.where(keep, lax.stop_gradient(weight) * jnp.where(keep, log_prob, 0), 0)
    return -jnp.sum(term, -1) / count


def ratio(
    log_prob: Float[Array, "*batch"], old_log_prob: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """pi / pi_old, the importance weight of a draw that an older policy (or a sampler) made.

    Finite and increasing beyond 30 nats (`numerics.linear_exp`).

    >>> float(ratio(jnp.log(jnp.array(0.5)), jnp.log(jnp.array(0.25))))
    2.0
    """
    return numerics.linear_exp(log_prob - lax.stop_gradient(old_log_prob))


def sequence_ratio(
    log_prob: Float[Array, "*batch"],
    old_log_prob: Float[Array, "*batch"],
    length: Int[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """GSPO's ratio: the geometric mean over a response's tokens (arXiv 2507.18071, eq. 7).

    ``log_prob`` are sums over tokens. It is no importance weight of anything; it keeps the clip's
    range the same for every length.

    >>> float(sequence_ratio(jnp.array(-2.0), jnp.array(-4.0), jnp.array(2)))  # e
    2.718...
    """
    tokens = jnp.maximum(length, 1).astype(log_prob.dtype)
    return numerics.linear_exp((log_prob - lax.stop_gradient(old_log_prob)) / tokens)


def clipped(
    ratio: Float[Array, "*batch"],
    weight: Float[Array, "*batch"],
    *,
    low: Scalar,
    high: Scalar,
    dual: Scalar | None = None,
) -> Float[Array, "*batch"]:
    r"""PPO's clipped surrogate, elementwise, as a loss.

    .. math:: -\min(\rho w,\; \mathrm{clip}(\rho, 1 - low, 1 + high)\, w)

    Args:
      ratio: rho, of :func:`ratio` per token or response, or :func:`sequence_ratio`.
      weight: the advantage, a constant to the gradient.
      low, high: PPO has 0.2 and 0.2 (arXiv 1707.06347, eq. 7), DAPO a larger ``high``
        (2503.14476, eq. 10). The clip is no trust region in KL: it only takes the gradient away.
      dual: at a negative advantage the loss is at most ``-dual * weight`` (1912.09729, c > 1).

    At ``ratio`` 1 its gradient is :func:`surrogate`'s.

    >>> clipped(jnp.array([2.0, 0.5]), jnp.array([1.0, 1.0]), low=0.2, high=0.2).tolist()
    [-1.2000000476837158, -0.5]
    """
    numerics.check_positive("high", high)
    if isinstance(low, int | float) and not 0 < low < 1:
        raise ValueError(f"low must lie in (0, 1), got {low}: ratios are clipped to at least 1-low")
    if isinstance(dual, int | float) and not dual > 1:
        raise ValueError(f"dual must exceed 1, got {dual}")
    weight = lax.stop_gradient(weight)
    objective = jnp.minimum(ratio * weight, jnp.clip(ratio, 1 - low, 1 + high) * weight)
    if dual is not None:
        objective = jnp.where(weight < 0, jnp.maximum(objective, dual * weight), objective)
    return -objective


def truncated(ratio: Float[Array, "*batch"], *, limit: Scalar) -> Float[Array, "*batch"]:
    """min(rho, limit), a constant to the gradient: the weight of a draw whose sampler was another.

    Corrects what a sampler in another precision, or a stale policy, drew; biased where the limit
    is met, of bounded variance (Ionides 2008, truncated importance sampling).

    >>> truncated(jnp.array([0.5, 9.0]), limit=2.0).tolist()
    [0.5, 2.0]
    """
    numerics.check_positive("limit", limit)
    return lax.stop_gradient(jnp.minimum(ratio, limit))


def over_tokens(
    value: Float[Array, "*batch responses length"],
    where: Bool[Array, "*batch responses length"],
    *,
    mean: Literal["response", "group", "constant"],
    size: Scalar | None = None,
    responses: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch"]:
    """From per-token terms to one number a prompt; where the mean is taken is a choice of law.

    ``response``: each response's mean over its own tokens, then over responses (GRPO). With the KL
    as a loss beside it, this is a *length bonus* (see the table). ``group``: one mean over all
    tokens of the prompt's responses (DAPO): long responses weigh more. ``constant``: the sum over
    tokens divided by ``size``, the same for all (Dr. GRPO): the gradient of the sequence's own
    log-probability. ``responses`` is True at those that count, an empty one among them too; by
    default all do.

    ValueError where ``size`` is given without ``constant``, or missing with it.
    """
    if (mean == "constant") != (size is not None):
        raise ValueError(f"size goes with mean='constant' and with nothing else, got {mean!r}")
    if responses is not None:
        where = where & responses[..., None]
    tokens = jnp.sum(where, -1).astype(value.dtype)
    summed = jnp.sum(jnp.where(where, value, 0), -1)
    if mean == "group":
        return jnp.sum(summed, -1) / jnp.maximum(jnp.sum(tokens, -1), 1)
    each = summed / (jnp.maximum(tokens, 1) if size is None else jnp.asarray(size, value.dtype))
    count = jnp.maximum(jnp.sum(_kept(each, responses), -1), 1).astype(value.dtype)
    return jnp.sum(each, -1) / count


def consistency(
    reward: Float[Array, "*batch responses"],
    classes: Shaped[Array, "*batch responses"],
    *,
    coef: Scalar | None = None,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch"]:
    r"""COPO's group reward: the mean reward, less by how much the answers disagree.

    .. math:: G = \bar r\,(1 - \lambda H_2), \qquad \lambda = (1 - 1/K)/\log_2 K

    H_2 is the entropy in bits of the group's answers (``classes``, equal where two responses give
    the same one). Shared by all K, standardized over prompts, it gives groups that all agree, whose
    own advantages are 0, a gradient. ``coef`` replaces lambda. Source: the authors' code of COPO.

    ``where`` is True at the responses that count.

    >>> float(consistency(jnp.array([1.0, 1.0]), jnp.array([3, 3])))
    1.0
    """
    keep = _kept(reward, where)
    entropy = answer_entropy(classes, where=where).astype(reward.dtype)
    count = jnp.maximum(jnp.sum(keep, -1), 1).astype(reward.dtype)
    if coef is None:
        coef = (1 - 1 / count) / jnp.log2(jnp.maximum(count, 2))
    return jnp.sum(jnp.where(keep, reward, 0), -1) / count * (1 - coef * entropy)


def answer_entropy(
    classes: Shaped[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch"]:
    """Entropy, in bits, of the classes among a group's responses, those at which ``where`` is True.

    >>> float(answer_entropy(jnp.array([0, 0, 1, 1])))
    1.0
    """
    same = classes[..., :, None] == classes[..., None, :]
    keep = _kept(classes, where)
    count = jnp.maximum(jnp.sum(keep, -1), 1).astype(jnp.result_type(float))
    share = jnp.sum(same & keep[..., None, :], -1).astype(count.dtype) / count[..., None]
    # Each response carries 1/K of the mass of its class, so a mean over responses is the sum.
    return -jnp.sum(jnp.log2(jnp.where(keep, share, 1)), -1) / count


def _kept(x: Array, where: Array | None) -> Array:
    return jnp.ones(x.shape, bool) if where is None else where


def _divided(centred: Array, deviation: Array, eps: Scalar) -> Array:
    """``centred / (deviation + eps)``, and 0 at a deviation of 0 whatever eps."""
    positive = deviation > 0
    return jnp.where(positive, centred / (jnp.where(positive, deviation, 1) + eps), 0)
