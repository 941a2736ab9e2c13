r"""The objective regularized by any f-divergence over enumerated actions, and its optimum.

.. math::
    J_f(\pi | x) = E_{a \sim \pi}[r(x, a)] - \eta\, D_f(\pi(\cdot|x) \| \pi_0(\cdot|x)), \qquad
    \pi_r = \pi_0\, {f'}^{-1}\big((r - \lambda)/\eta\big)

with lambda(x) such that the policy sums to 1. Of the reverse KL this is :mod:`.gibbs`, in closed
form: use that; here everything takes a ``divergence`` of :mod:`.fdivergence`. ``kl_coef`` is eta.
``ref_log_prob`` must be normalized over all actions, also those that ``where`` masks: they keep
their share of pi_0, and cost what pi = 0 costs there (but that constant is left out). An action is
out of play where it is masked, its pi_0 is 0, or its reward is -inf. Sources: f-DPO (arXiv
2309.16240), theorem 1; the bracket of lambda is derived here.

Axes: ``batch`` (free leading axes), ``actions`` (what is chosen among, always last).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core import fdivergence, numerics
from jax_klrlhf.core.fdivergence import FDivergence
from jax_klrlhf.core.numerics import Scalar

_HALVINGS = 60


def log_prob(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    divergence: FDivergence,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    r"""Log-probabilities of the optimum; -inf at actions out of play.

    With u the log-ratio of the action of largest reward, every other one is
    :math:`{f'}^{-1}(f'(e^u) - (r_{max} - r)/\eta)`, and u lies between 0 (-log of pi_0's mass in
    play) and -log pi_0 of that action. It is found there by bisection; a Newton step at the root
    then carries the gradient, that of the implicit function (first derivatives, of reward,
    reference and kl_coef).

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> r = jnp.array([1 - 2 / 3, 1 - 2.0])  # 1 - 1/z at z = 3/2 and 1/2
    >>> jnp.exp(log_prob(r, uniform, kl_coef=1.0, divergence=fdivergence.forward_kl)).tolist()
    [0.75, 0.25]
    """
    return _optimum(reward, ref_log_prob, kl_coef, divergence, where)


def _optimum(
    reward: Array,
    ref_log_prob: Array,
    kl_coef: Scalar,
    divergence: FDivergence,
    where: Array | None,
) -> Array:
    """Body of :func:`log_prob`, whose name other functions use for an argument."""
    numerics.check_positive("kl_coef", kl_coef)
    keep = numerics.support(ref_log_prob, where) & (reward != -jnp.inf)
    some = jnp.any(keep, axis=-1)
    ref = jnp.where(keep, ref_log_prob, 0)
    reward = jnp.where(keep, reward, 0)
    best = jnp.max(jnp.where(keep, reward, -jnp.inf), axis=-1, keepdims=True)
    best = jnp.where(some[..., None], best, 0)
    behind = (reward - best) / kl_coef

    def log_ratio(top: Array) -> Array:
        """Of every action, given that of the best."""
        below = divergence.inverse(behind + divergence.link(top)[..., None])
        # The best one's, exactly: near the supremum the link has no digits left.
        top = jnp.broadcast_to(top[..., None], below.shape)
        return jnp.where(behind == 0, top, below)

    def excess(top: Array) -> Array:
        """Log of the sum of the probabilities."""
        total = numerics.masked_logsumexp(ref + log_ratio(top), keep)
        return jnp.where(some, total, 0)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        over = excess(middle) > 0
        return jnp.where(over, low, middle), jnp.where(over, middle, high)

    mass = jnp.where(some, numerics.masked_logsumexp(ref, keep), 0)
    highest = jnp.max(jnp.where(keep & (behind == 0), ref, -jnp.inf), axis=-1)
    ends = -mass, jnp.where(some, -highest, 0)
    low, high = lax.fori_loop(0, _HALVINGS, halve, lax.stop_gradient(ends))
    top = lax.stop_gradient((low + high) / 2)
    off, slope = jax.jvp(excess, (top,), (jnp.ones_like(top),))
    top = top - off / jnp.where(slope > 0, slope, 1)
    found = ref + log_ratio(top)
    return jnp.where(keep, found - excess(top)[..., None], -jnp.inf)


def implicit_reward(
    log_prob: Float[Array, "*batch"],
    ref_log_prob: Float[Array, "*batch"],
    *,
    kl_coef: Scalar,
    divergence: FDivergence,
) -> Float[Array, "*batch"]:
    r"""Reward whose regularized optimum is the given policy, :math:`\eta f'(\pi/\pi_0)`.

    Up to a constant per context. -inf where only pi is 0; ``kl_coef`` times the supremum of f'
    where only pi_0 is; 0 where both are.
    """
    numerics.check_positive("kl_coef", kl_coef)
    in_policy, known = log_prob > -jnp.inf, ref_log_prob > -jnp.inf
    both = in_policy & known
    ratio = jnp.where(both, log_prob, 0) - jnp.where(both, ref_log_prob, 0)
    found = kl_coef * divergence.link(ratio)
    found = jnp.where(known & ~in_policy, -jnp.inf, found)
    return jnp.where(in_policy & ~known, kl_coef * divergence.supremum, found)


def value(
    log_prob: Float[Array, "*batch actions"],
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    divergence: FDivergence,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    """The objective J_f of a policy, in units of reward; -inf where the divergence is infinite."""
    numerics.check_positive("kl_coef", kl_coef)
    expected = numerics.expectation(log_prob, reward, where=where)
    keep = reward != -jnp.inf if where is None else where & (reward != -jnp.inf)
    cost = fdivergence.categorical(log_prob, ref_log_prob, divergence=divergence, where=keep)
    infinite = jnp.isinf(cost)
    return expected - jnp.where(infinite, jnp.inf, kl_coef * jnp.where(infinite, 0, cost))


def gap(
    log_prob: Float[Array, "*batch actions"],
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    divergence: FDivergence,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Suboptimality :math:`J_f(\pi_r) - J_f(\pi)`, in units of reward.

    The difference of two values: rounding may leave it slightly negative. (Only the reverse KL's
    is a divergence between the two policies: :func:`.gibbs.gap`.)
    """
    given = {"kl_coef": kl_coef, "divergence": divergence, "where": where}
    optimum = _optimum(reward, ref_log_prob, kl_coef, divergence, where)
    return value(optimum, reward, ref_log_prob, **given) - value(
        log_prob, reward, ref_log_prob, **given
    )
