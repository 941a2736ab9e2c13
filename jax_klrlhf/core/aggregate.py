r"""One reward out of several: ensemble members, posterior draws, groups, users, objectives.

All of them are one leading axis, ``rewards [members, *batch, actions]``, and a rule that reduces it
*inside* the expectation over actions gives a reward again, for any policy improvement. (A rule
*outside* the expectation, such as max-min over groups, is a saddle point: :mod:`core.saddle`.)

**Centre first.** Preferences identify a reward up to a constant for each context, so members differ
by offsets that mean nothing. The mean ignores them; a minimum, a variance, a conjunction doesn't.
:func:`centre` gives every member the same origin, pi0's mean.

**When does caution pay?** J is linear in the reward, so under a right posterior the mean is optimal
and any pessimism loses; only one-sided misspecification can pay for it [derived].

Axes: ``members``, ``batch`` (free), ``actions`` (what is chosen among, always last).
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core import bradley_terry, numerics
from jax_klrlhf.core.numerics import Scalar


def centre(
    rewards: Float[Array, "members *batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "members *batch actions"]:
    r"""Each member less its mean under pi0 in each context: the common origin.

    Masked actions are 0. ``ref_log_prob`` need not be normalized: the uniform law over drawn
    responses is ``jnp.zeros``.

    >>> centre(jnp.array([[1.0, 3.0], [7.0, 5.0]]), jnp.log(jnp.array([0.5, 0.5]))).tolist()
    [[-1.0, 1.0], [1.0, -1.0]]
    """
    keep = numerics.support(ref_log_prob, where)
    shift = numerics.masked_max(ref_log_prob, keep)[..., None]
    weight = jnp.where(keep, jnp.exp(jnp.where(keep, ref_log_prob, 0) - shift), 0)
    total = jnp.maximum(jnp.sum(weight, -1), jnp.finfo(weight.dtype).tiny)

    def member(reward: Array) -> Array:
        safe = jnp.where(keep, reward, 0)
        return jnp.where(keep, safe - (jnp.sum(weight * safe, -1) / total)[..., None], 0)

    return jax.vmap(member)(rewards)


def mean(rewards: Float[Array, "members *rest"]) -> Float[Array, "*rest"]:
    """The members' mean: optimal for J under a right posterior (arXiv 2310.02743, eq. 2)."""
    return jnp.mean(rewards, 0)


def minimum(rewards: Float[Array, "members *rest"]) -> Float[Array, "*rest"]:
    """The least member, action by action: worst-case optimization (arXiv 2310.02743, eq. 3).

    It is the limit of :func:`entropic` at temperature 0, and not the max-min over groups, whose
    minimum stands outside the expectation (:func:`core.saddle.simplex`).
    """
    return jnp.min(rewards, 0)


def entropic(
    rewards: Float[Array, "members *rest"],
    *,
    temperature: Scalar,
    log_weight: Float[Array, " members"] | None = None,
) -> Float[Array, "*rest"]:
    r"""The family from the mean to the minimum and beyond.

    .. math:: r_\tau = -\tau \log E_m\, e^{-r_m/\tau}

    tau = inf is the mean, tau to 0 the minimum (the maximum from below), tau < 0 optimism; to
    second order the mean less var / (2 tau). ``log_weight`` weighs the members (it is normalized);
    uniform by default. The temperature is its own: tying it to kl_coef costs (see the module).

    >>> two = jnp.log(jnp.array([[1.0], [3.0]]))
    >>> entropic(two, temperature=1.0).tolist()  # -log((1 + 1/3) / 2)
    [0.405...]
    """
    members = rewards.shape[0]
    tail = (1,) * (rewards.ndim - 1)
    log_weight = jnp.zeros(members, rewards.dtype) if log_weight is None else log_weight
    weight = jax.nn.softmax(log_weight).reshape(members, *tail)
    middle = jnp.sum(weight * rewards, 0)
    temperature = jnp.asarray(temperature, rewards.dtype)
    zero, endless = temperature == 0, jnp.isinf(temperature)
    tau = jnp.where(zero | endless, 1, temperature)
    scaled = -(rewards - middle[None]) / tau
    # Near the mean log E exp cancels, far from it expm1 overflows: each where it is right.
    near = jnp.max(jnp.abs(scaled), 0) < 1
    small = jnp.log1p(jnp.sum(weight * jnp.expm1(jnp.where(near[None], scaled, 0)), 0))
    large = jax.nn.logsumexp(scaled, axis=0, b=jnp.broadcast_to(weight, scaled.shape))
    found = middle - tau * jnp.where(near, small, large)
    return jnp.where(endless, middle, jnp.where(zero, jnp.min(rewards, 0), found))


def penalized(
    rewards: Float[Array, "members *rest"],
    *,
    variance: Scalar = 0.0,
    deviation: Scalar = 0.0,
    ddof: int = 0,
) -> Float[Array, "*rest"]:
    r"""Mean less ``variance`` times the variance and ``deviation`` times the standard deviation.

    "UWO" is ``variance`` alone, with the population variance (arXiv 2310.02743, eq. 4, and its
    code); "mean - std" is ``deviation=1``. Uncertainty in one's own reward model is the same with
    its own two moments (Ctrl-U, Laplace-LoRA). Can fall below the least member.

    >>> penalized(jnp.array([[0.0], [2.0]]), variance=0.5).tolist()  # 1 - 0.5 * 1
    [0.5]
    """
    if ddof >= rewards.shape[0]:
        raise ValueError(f"ddof={ddof} leaves nothing of {rewards.shape[0]} members")
    spread = jnp.var(rewards, 0, ddof=ddof)
    return jnp.mean(rewards, 0) - variance * spread - deviation * numerics.safe_sqrt(spread)


def linear(
    rewards: Float[Array, "members *rest"], weight: Float[Array, "..."]
) -> Float[Array, "*rest"]:
    r"""``sum_m w_m r_m``: several objectives as one.

    ``weight`` is ``[members]``, one for all, or ``[members, *batch]``, one for each context: a
    user's direction (DPA, arXiv 2402.18571), a router's, a prompt's (the effective reward of arXiv
    2507.20150). Its scale is a KL coefficient: unit vectors are not equal optimization.

    >>> linear(jnp.array([[1.0, 2.0], [10.0, 20.0]]), jnp.array([1.0, 0.5])).tolist()
    [6.0, 12.0]
    """
    if weight.shape not in (rewards.shape[:1], rewards.shape[:-1]):
        raise ValueError(
            f"weight has shape {weight.shape}, expected {rewards.shape[:1]} or {rewards.shape[:-1]}"
        )
    weight = weight.reshape(*weight.shape, *(1,) * (rewards.ndim - weight.ndim))
    return jnp.sum(weight * rewards, 0)


def product(
    utilities: Float[Array, "members *rest"], weight: Float[Array, " members"] | None = None
) -> Float[Array, "*rest"]:
    r"""``prod_m u_m^{w_m}``: Cobb-Douglas or Nash welfare (GTAlign; R3, arXiv 2402.03469).

    Weights are 1 by default. A product needs a true zero, which a preference reward lacks: hand in
    utilities (win rates, relevance, length ratios).

    Raises:
      ValueError: on a utility <= 0 (where the values are concrete).
    """
    if not isinstance(utilities, Tracer) and bool(jnp.any(utilities <= 0)):
        raise ValueError(
            "product: a utility is <= 0; a reward from preferences has no zero, so make a utility "
            "of it first (reshape.win_rate is one)"
        )
    logs = jnp.log(utilities)
    return jnp.exp(jnp.sum(logs, 0) if weight is None else linear(logs, weight))


def conjunction(
    rewards: Float[Array, "members *batch actions"], reference: Float[Array, "members *batch"]
) -> Float[Array, "*batch actions"]:
    r"""``sum_m log sigma(r_m - ref_m)``: all of them good, a logical AND (arXiv 2402.00742, 4).

    With "good" an event of probability sigma(r - ref), the optimum at kl_coef = 1 is pi0 given that
    all are good, if they are independent. ``reference`` as in :func:`core.reshape.log_sigmoid`.
    """
    return jnp.sum(bradley_terry.log_likelihood(rewards - reference[..., None]), 0)
