r"""Rejection sampling from the Gibbs policy, in one step or several.

A draw a from the proposal pi_{i-1} is accepted with probability

.. math:: \exp\!\big( (1/\eta_i - 1/\eta_{i-1}) (r(x, a) - r_{\max}(x)) \big),

which turns pi0 exp(r / eta_{i-1}) into pi0 exp(r / eta_i); the first step proposes from pi0, the
eta = infinity end. Sources: Liu et al., RSO (arXiv 2309.06657), algorithm 1; the multi-step form is
Xiong et al. (arXiv 2312.11456), section 5. `kl_coef` is eta there, beta in RSO.

The accepted law is exact only for r_max >= every reward that the proposal can give. The maximum
over a batch stands in for it when no bound is known; :func:`batch_maximum_log_prob` is the law that
results. An acceptance probability below 2^-23 counts as 0 in float32, the resolution of a uniform
draw: use more steps. :func:`accept` passes once over the draws, and says how far its law is from
the target; :func:`until` passes again until enough were accepted, as the code in RSO's appendix.

Axes: ``batch`` (free: contexts or prompts), ``actions`` (draws, or enumerated actions).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core.choices import Choices
from jax_klrlhf.core.numerics import Scalar


class Acceptance(NamedTuple):
    """Which draws were accepted, and whether their law is the exact one.

    `exact [*batch]`: a bound was given and no reward exceeded it. `bound_violated [*batch]`: a
    bound was given and some reward exceeded it; such draws are accepted with probability 1 and the
    accepted law is the Gibbs law of min(r, bound).
    """

    accepted: Bool[Array, "*batch actions"]
    log_prob: Float[Array, "*batch actions"]
    exact: Bool[Array, "*batch"]
    bound_violated: Bool[Array, "*batch"]


class Taken(NamedTuple):
    """`indices [*batch, k]` of the first accepted draws; where `valid` is False the index is 0."""

    indices: Int[Array, "*batch k"]
    valid: Bool[Array, "*batch k"]


def accept(
    key: Key[Array, ""],
    reward: Float[Array, "*batch actions"],
    *,
    reward_bound: Scalar | None,
    kl_coef: Scalar,
    kl_coef_prev: Scalar = jnp.inf,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Acceptance:
    """Accept each draw with probability exp((1/kl_coef - 1/kl_coef_prev) (reward - reward_bound)).

    Args:
      key: one key for the whole batch.
      reward: rewards of draws from the proposal.
      reward_bound: an upper bound of the reward, a scalar or one per row `[*batch]`. None: the
        largest kept reward of the row stands in for it, and `exact` is False.
      kl_coef: eta of the target.
      kl_coef_prev: eta of the proposal; infinity when the draws come from pi0.
      where: True keeps a draw. A masked draw is never accepted.
    """
    _check_order(kl_coef, kl_coef_prev)
    keep = jnp.ones(reward.shape, bool) if where is None else where
    reward = jnp.where(keep, reward, 0.0)
    if reward_bound is None:
        top = jnp.max(reward, axis=-1, where=keep, initial=-jnp.inf)
        bound = jnp.where(jnp.any(keep, axis=-1), top, 0.0)
        violated = exact = jnp.zeros(bound.shape, bool)
    else:
        bound = jnp.broadcast_to(jnp.asarray(reward_bound, reward.dtype), reward.shape[:-1])
        violated = jnp.any(keep & (reward > bound[..., None]), axis=-1)
        exact = ~violated
    log_prob = _log_acceptance(reward, bound, _inverse_step(kl_coef, kl_coef_prev))
    log_prob = jnp.where(keep, log_prob, -jnp.inf)
    # -log U >= -log p rather than U < p: no underflow, and p = 1 always accepts.
    accepted = keep & (jax.random.exponential(key, reward.shape, reward.dtype) >= -log_prob)
    return Acceptance(accepted, log_prob, exact, violated)


def until(
    key: Key[Array, ""],
    reward: Float[Array, "*batch actions"],
    *,
    count: int,
    kl_coef: Scalar,
    kl_coef_prev: Scalar = jnp.inf,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Bool[Array, "*batch actions"]:
    """Which draws are accepted by passes without replacement, until `count` of each row are.

    The code of RSO (arXiv 2309.06657, appendix): a pass goes through the draws left in their order,
    the largest reward left stands for the bound, what is accepted leaves, and passes go on until
    there are `count`. So every row has ``min(count, kept)``, and the law is not the target's: the
    last ones are accepted because few are left. Mask copies first, as that code's dictionary does.

    ValueError for a count below 1.
    """
    _check_order(kl_coef, kl_coef_prev)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    keep = jnp.ones(reward.shape, bool) if where is None else where
    wanted = jnp.minimum(jnp.sum(keep, axis=-1), count)
    inverse = _inverse_step(kl_coef, kl_coef_prev)
    reward = jnp.where(keep, reward, 0)

    def unfinished(state: tuple[Array, Array]) -> Array:
        return jnp.any(jnp.sum(state[0], axis=-1) < wanted)

    def once_more(state: tuple[Array, Array]) -> tuple[Array, Array]:
        accepted, number = state
        left = keep & ~accepted
        top = jnp.max(jnp.where(left, reward, -jnp.inf), axis=-1)
        top = jnp.where(jnp.any(left, axis=-1), top, 0)
        noise = jax.random.exponential(jax.random.fold_in(key, number), reward.shape, reward.dtype)
        passed = left & (noise >= -_log_acceptance(reward, top, inverse))
        room = (wanted - jnp.sum(accepted, axis=-1))[..., None]
        return accepted | (passed & (jnp.cumsum(passed, axis=-1) <= room)), number + 1

    # A pass accepts its best draw for certain, so there are at most as many passes as draws.
    begin = (jnp.zeros(keep.shape, bool), jnp.zeros((), jnp.int32))
    return lax.while_loop(unfinished, once_more, begin)[0]


def accepted_choices(
    key: Key[Array, ""],
    choices: Choices,
    *,
    reward_bound: Scalar | None = None,
    kl_coef: Scalar,
    kl_coef_prev: Scalar = jnp.inf,
    count: int | None = None,
) -> Choices:
    """The choices that are left after acceptance, as a choice set: for a rule, a fit, a next step.

    Draws are accepted one by one by :func:`accept`, copies each for itself, or by :func:`until`
    where a `count` is given. What is left of listed choices is a listed set whose mass is the law
    of an accepted draw, ``choices.law`` tells which.

    ValueError where the choices have no reward, for a listed set without a `reward_bound` or with
    a `count`, and for a bound beside a count, which has none.
    """
    reward = choices.require("reward", by="rejection sampling")
    step = {"kl_coef": kl_coef, "kl_coef_prev": kl_coef_prev}
    if choices.law == choice_sets.ENUMERATED:
        if reward_bound is None or count is not None:
            raise ValueError(
                "the law of what is accepted from a listed set needs reward_bound= and no count; "
                "without a bound it is batch_maximum_log_prob's."
            )
        law = accepted_log_prob(
            reward, choices.log_mass, reward_bound=reward_bound, where=choices.where, **step
        )
        return choices._replace(log_mass=law, log_prob=law)
    number = choices.require("number", by="rejection sampling")
    if count is not None:
        if reward_bound is not None:
            raise ValueError("passes until a count take the largest reward left for their bound")
        accepted = until(key, reward, count=count, where=choices.where, **step)
    else:
        # A masked draw with the number of a kept one is its copy and stands for itself here.
        drawn = jnp.any(
            (number[..., :, None] == number[..., None, :]) & choices.where[..., None, :], axis=-1
        )
        accepted = accept(key, reward, reward_bound=reward_bound, where=drawn, **step).accepted
    left = choice_sets.drawn(number[..., None], where=accepted, agent=choices.agent, reward=reward)
    return choices._replace(where=left.where, log_mass=left.log_mass)


def take(accepted: Bool[Array, "*batch actions"], k: int) -> Taken:
    """The first `k` accepted draws of each row, in their order.

    >>> taken = take(jnp.array([False, True, False, True]), 3)
    >>> taken.indices.tolist(), taken.valid.tolist()
    ([1, 3, 0], [True, True, False])
    """
    if not 1 <= k <= accepted.shape[-1]:
        raise ValueError(f"k must be in 1..{accepted.shape[-1]}, the number of draws, got {k}")
    order = jnp.argsort(~accepted, axis=-1, stable=True)[..., :k]
    valid = jnp.take_along_axis(accepted, order, axis=-1)
    return Taken(indices=jnp.where(valid, order, 0), valid=valid)


def schedule(kl_coef: Scalar, steps: int, *, start: Scalar = jnp.inf) -> Float[Array, " steps"]:
    """The eta of each step, equally spaced in 1/eta from `start` (left out) to `kl_coef` exactly.

    Equal steps in 1/eta equalize the acceptance rates to first order in the step.

    >>> schedule(0.5, 4).tolist()
    [2.0, 1.0, 0.6666..., 0.5]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    _check_order(kl_coef, start)
    last = jnp.asarray(kl_coef, dtype=jnp.result_type(float, kl_coef))
    first = 1.0 / jnp.asarray(start, last.dtype)
    share = jnp.arange(1, steps + 1, dtype=last.dtype) / steps
    inner = 1.0 / (first + share * (1.0 / last - first))
    return inner.at[-1].set(last)


def acceptance_rate(
    reward: Float[Array, "*batch actions"],
    log_prob: Float[Array, "*batch actions"],
    *,
    reward_bound: Scalar,
    kl_coef: Scalar,
    kl_coef_prev: Scalar = jnp.inf,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    """Expected share of accepted draws, over enumerated actions with proposal `log_prob`.

    Its inverse is the expected number of proposals for one accepted draw.
    """
    _check_order(kl_coef, kl_coef_prev)
    joint = _log_joint(reward, log_prob, reward_bound, kl_coef, kl_coef_prev, where)
    return jnp.exp(jax.nn.logsumexp(joint, axis=-1))


def accepted_log_prob(
    reward: Float[Array, "*batch actions"],
    log_prob: Float[Array, "*batch actions"],
    *,
    reward_bound: Scalar,
    kl_coef: Scalar,
    kl_coef_prev: Scalar = jnp.inf,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    """Law of an accepted draw, over enumerated actions with proposal `log_prob`.

    The target if `reward_bound` is one; else that of min(reward, reward_bound). -inf where masked.
    """
    _check_order(kl_coef, kl_coef_prev)
    joint = _log_joint(reward, log_prob, reward_bound, kl_coef, kl_coef_prev, where)
    return _normalize(joint)


def batch_maximum_log_prob(
    reward: Float[Array, "*batch actions"],
    log_prob: Float[Array, "*batch actions"],
    *,
    samples: int,
    kl_coef: Scalar,
    kl_coef_prev: Scalar = jnp.inf,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    r"""Law of an accepted draw when the maximum of `samples` draws stands in for the bound.

    Pooled over many batches of n = `samples` independent draws, an accepted draw has the law

    .. math:: q_n(a) \propto p(a)\, e^{c r(a)}\, E\big[ e^{-c \max(r(a), M_{n-1})} \big],
              \qquad c = 1/\eta - 1/\eta_{prev},

    M_{n-1} the maximum of the other n - 1 draws. q_1 is the proposal, q_n tends to the target, and
    the distance between them is the error of not knowing the bound [derived here].
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    _check_order(kl_coef, kl_coef_prev)
    keep = jnp.isfinite(log_prob) if where is None else where & jnp.isfinite(log_prob)
    scaled = _inverse_step(kl_coef, kl_coef_prev) * jnp.where(keep, reward, 0.0)
    # Masked actions sort first and have no mass, so they change no maximum.
    order = jnp.argsort(jnp.where(keep, scaled, -jnp.inf), axis=-1)
    mass = jnp.take_along_axis(jnp.where(keep, log_prob, -jnp.inf), order, axis=-1)
    scaled = jnp.take_along_axis(scaled, order, axis=-1)
    prob = jnp.exp(_normalize(mass))
    # A sum taken in parallel can step down by a rounding, which no distribution function may.
    below = lax.cummax(jnp.minimum(jnp.cumsum(prob, axis=-1), 1.0), axis=prob.ndim - 1)
    # P(max of the others is at most / exactly this action), ties ordered by the sort.
    at_most = below ** (samples - 1)
    exactly = jnp.diff(at_most, axis=-1, prepend=jnp.zeros_like(at_most[..., :1]))
    above = lax.cumlogsumexp(jnp.log(exactly) - scaled, axis=exactly.ndim - 1, reverse=True)
    above = jnp.concatenate([above[..., 1:], jnp.full_like(above[..., :1], -jnp.inf)], axis=-1)
    weight = jnp.logaddexp(jnp.log(at_most) - scaled, above)
    law = jnp.where(mass > -jnp.inf, mass + scaled + weight, -jnp.inf)
    return _normalize(jnp.take_along_axis(law, jnp.argsort(order, axis=-1), axis=-1))


def _check_order(kl_coef: Scalar, kl_coef_prev: Scalar) -> None:
    if isinstance(kl_coef, (int, float)):
        if not kl_coef > 0:
            raise ValueError(f"kl_coef must be > 0, got {kl_coef}")
        if isinstance(kl_coef_prev, (int, float)) and kl_coef_prev < kl_coef:
            raise ValueError(
                f"kl_coef falls from step to step: got {kl_coef_prev} and then {kl_coef}"
            )


def _inverse_step(kl_coef: Scalar, kl_coef_prev: Scalar) -> Array:
    return 1.0 / jnp.asarray(kl_coef) - 1.0 / jnp.asarray(kl_coef_prev)


def _log_acceptance(
    reward: Float[Array, "*batch actions"], bound: Float[Array, "*batch"], inverse: Array
) -> Float[Array, "*batch actions"]:
    gap = jnp.minimum(reward - bound[..., None], 0.0)
    return inverse.astype(reward.dtype) * gap


def _log_joint(reward, log_prob, reward_bound, kl_coef, kl_coef_prev, where):
    """log P(drawn and accepted), -inf where masked or outside the proposal's support."""
    keep = jnp.isfinite(log_prob) if where is None else where & jnp.isfinite(log_prob)
    bound = jnp.broadcast_to(jnp.asarray(reward_bound, reward.dtype), reward.shape[:-1])
    inverse = _inverse_step(kl_coef, kl_coef_prev)
    log_accept = _log_acceptance(jnp.where(keep, reward, 0.0), bound, inverse)
    return jnp.where(keep, jnp.where(keep, log_prob, 0.0) + log_accept, -jnp.inf)


def _normalize(logits: Float[Array, "*batch actions"]) -> Float[Array, "*batch actions"]:
    """log-softmax; a row without support stays -inf."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return logits - jnp.where(jnp.isfinite(total), total, 0.0)
