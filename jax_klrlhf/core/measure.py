r"""How far two rewards or policies are apart, what optimizing a proxy costs, what a model is worth.

* :func:`at_divergence`: the KL coefficient with a given KL. Rewards of different scale are compared
  at equal KL, since under a KL penalty scale is behaviour.
* Distances: :func:`starc`, :func:`epic` (which forget scale, and so bound the *unregularized*
  regret), :func:`span` with :func:`variation_bound` and :func:`gap_bound` (which bound ours).
* :func:`frontier`, :func:`frontier_gap`: gold reward against KL.
* :func:`calibration`, :func:`brier`, :func:`one_of_n`, :func:`win_rate`,
  :func:`controlled_win_rate`: of preference models and policies.

Diversity is in :mod:`core.diversity`, several objectives or people in :mod:`core.welfare`.

Axes: ``contexts``, ``batch`` (free), ``actions`` (what is chosen among, always last).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from jax_klrlhf.core import (
    aggregate,
    choices,
    divergence,
    estimation,
    gibbs,
    links,
    numerics,
    targets,
)
from jax_klrlhf.core.numerics import Scalar

_HIGHEST = lax.Precision.HIGHEST


def _over_contexts(values: Array, context_prob: Array | None) -> Array:
    return jnp.mean(values) if context_prob is None else jnp.sum(context_prob * values)


def at_divergence(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    divergence: Scalar,
    context_prob: Float[Array, "*batch"] | None = None,
    where: Bool[Array, "*batch actions"] | None = None,
    steps: int = 60,
) -> Float[Array, ""]:
    r"""The kl_coef whose optimum of ``reward`` has this mean KL to pi0, in nats.

    The KL falls as the coefficient rises, so bisection of its logarithm finds it, between 1e-5 and
    1e5 times the span of the reward. Contexts are uniform unless ``context_prob`` is given. A
    divergence that no coefficient reaches (above -log pi0 of the best actions) gives the least one;
    a constant reward has none, and gives NaN.
    """
    keep = numerics.support(ref_log_prob, where)
    highest = numerics.masked_max(reward, keep)
    width = jnp.max(highest + numerics.masked_max(-reward, keep))

    def too_far(log_coef: Array) -> Array:
        log_prob = gibbs.log_prob(reward, ref_log_prob, kl_coef=jnp.exp(log_coef), where=where)
        return _over_contexts(_kl(log_prob, ref_log_prob), context_prob) > divergence

    def halve(_: int | Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        far = too_far(middle)
        return jnp.where(far, middle, low), jnp.where(far, high, middle)

    base = jnp.log(jnp.where(width > 0, width, 1))
    reach = jnp.log(jnp.asarray(1e5, base.dtype))
    low, high = lax.fori_loop(0, steps, halve, (base - reach, base + reach))
    return jnp.where(width > 0, jnp.exp((low + high) / 2), jnp.nan)


_kl = divergence.categorical


class BestOf(NamedTuple):
    """Along a sweep of counts."""

    divergence: Float[Array, " counts"]
    gold: Float[Array, " counts"]


class Frontier(NamedTuple):
    """Along a sweep of divergences: the coefficient, and what proxy and gold are worth there."""

    kl_coef: Float[Array, " k"]
    proxy: Float[Array, " k"]
    gold: Float[Array, " k"]


def frontier(
    proxy: Float[Array, "*batch actions"],
    gold: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    divergences: Float[Array, " k"],
    context_prob: Float[Array, "*batch"] | None = None,
) -> Frontier:
    r"""E proxy and E gold of the proxy's optimum at each divergence: the over-optimization curve.

    Source: Gao et al. (arXiv 2210.10760), with the exact optimum in the place of a training run.
    """

    def at(level: Array) -> Frontier:
        kl_coef = at_divergence(proxy, ref_log_prob, divergence=level, context_prob=context_prob)
        log_prob = gibbs.log_prob(proxy, ref_log_prob, kl_coef=kl_coef)
        worth = (
            _over_contexts(numerics.expectation(log_prob, r), context_prob) for r in (proxy, gold)
        )
        return Frontier(kl_coef, *worth)

    return jax.vmap(at)(divergences)


def best_of_curve(
    proxy: Float[Array, "*batch actions"],
    gold: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    counts: Sequence[int],
    context_prob: Float[Array, "*batch"] | None = None,
) -> BestOf:
    """KL spent and expected gold of the best of n by proxy, for each n: selection's frontier."""
    every = choices.enumerated(ref_log_prob, reward=proxy)
    laws = [targets.best_of(every, n=n) for n in counts]
    spent = [_over_contexts(_kl(law, ref_log_prob), context_prob) for law in laws]
    worth = [_over_contexts(numerics.expectation(law, gold), context_prob) for law in laws]
    return BestOf(jnp.stack(spent), jnp.stack(worth))


def frontier_gap(
    log_prob: Float[Array, "*batch actions"],
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    context_prob: Float[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """E r of the Gibbs policy of the same mean KL, less the policy's: what it wastes of its KL.

    Never negative but for rounding: Gibbs policies are the frontier of reward against KL.
    """
    spent = _over_contexts(_kl(log_prob, ref_log_prob), context_prob)
    kl_coef = at_divergence(reward, ref_log_prob, divergence=spent, context_prob=context_prob)
    best = gibbs.log_prob(reward, ref_log_prob, kl_coef=kl_coef)
    lost = numerics.expectation(best, reward) - numerics.expectation(log_prob, reward)
    return _over_contexts(lost, context_prob)


def canonical(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    """The reward less its mean under pi0: one representative of all that preferences can't tell.

    The value-adjusted canonical form of STARC with one step (arXiv 2309.15257).
    """
    return aggregate.centre(reward[None], ref_log_prob, where=where)[0]


def _inner(first: Array, second: Array, ref_log_prob: Array, context_prob: Array | None) -> Array:
    return _over_contexts(numerics.expectation(ref_log_prob, first * second), context_prob)


def starc(
    first: Float[Array, "*batch actions"],
    second: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    context_prob: Float[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    r"""STARC distance in [0, 2]: canonical forms of norm 1, L2 under contexts and pi0.

    0 for rewards that differ by a positive scale and shifts of contexts, 2 for the negation; twice
    :func:`epic` here. It bounds the regret without a KL penalty from both sides; with one, a
    reward at 5 times its scale has distance 0 and a large gap. A reward that is constant in every
    context has norm 0 and stays 0. Source: arXiv 2309.15257, definition 3.
    """
    both = [canonical(r, ref_log_prob) for r in (first, second)]
    unit = []
    for reward in both:
        norm = numerics.safe_sqrt(_inner(reward, reward, ref_log_prob, context_prob))
        unit.append(reward / jnp.where(norm > 0, norm, 1))
    shift = unit[0] - unit[1]
    return numerics.safe_sqrt(_inner(shift, shift, ref_log_prob, context_prob))


def epic(
    first: Float[Array, "*batch actions"],
    second: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    context_prob: Float[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    r"""EPIC's :math:`\sqrt{(1 - \rho)/2}`, rho the correlation of the canonical forms.

    Source: arXiv 2006.13900, definition 4.6. NaN where a reward is constant in every context.
    """
    one, two = (canonical(r, ref_log_prob) for r in (first, second))
    inner = lambda a, b: _inner(a, b, ref_log_prob, context_prob)  # noqa: E731
    correlation = inner(one, two) / jnp.sqrt(inner(one, one) * inner(two, two))
    return numerics.safe_sqrt((1 - correlation) / 2)


def span(
    first: Float[Array, "*batch actions"],
    second: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    """Range of ``first - second`` in each context, in nats: the distance that bounds our gap."""
    keep = jnp.ones(first.shape, bool) if where is None else where
    shift = jnp.where(keep, first - second, 0)
    return numerics.masked_max(shift, keep) + numerics.masked_max(-shift, keep)


def variation_bound(span: Float[Array, "*batch"], *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""Total variation between two optima: at most :math:`\tanh(\text{span} / 4\eta)`. [derived]

    Attained by two actions. At a tie it says how small the span must be for a smooth policy: the
    "cliff" of arXiv 2507.20150 and what entropy does about it.
    """
    return jnp.tanh(span / (4 * kl_coef))


def gap_bound(span: Float[Array, "*batch"], *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""Suboptimality of another reward's optimum: at most min(span^2 / (8 eta), span). [derived]"""
    return jnp.minimum(span**2 / (8 * kl_coef), span)


def calibration(
    margin: Float[Array, " n"],
    label_prob: Shaped[Array, " n"],
    *,
    weight: Shaped[Array, " n"] | None = None,
    bins: int = 10,
) -> Float[Array, ""]:
    r"""Expected calibration error of :math:`\sigma(|m|)`, over equal bins of [1/2, 1].

    ``label_prob`` is P(first preferred): a label, or the true probability for the exact error,
    without the noise of labels. The weighted mean over pairs of the distance between share right
    and confidence of their bin; a margin of 0 is right half the time. With drawn labels it is
    positive even for a calibrated model, by about sqrt(bins / pairs).
    Source: arXiv 1706.04599, eq. 3.
    """
    dtype = margin.dtype
    label_prob = label_prob.astype(dtype)
    weight = jnp.ones_like(margin) if weight is None else weight.astype(dtype)
    confidence = jax.nn.sigmoid(jnp.abs(margin))
    right = jnp.where(margin > 0, label_prob, 1 - label_prob)
    right = jnp.where(margin == 0, 0.5, right)
    place = jnp.clip(((confidence - 0.5) * 2 * bins).astype(jnp.int32), 0, bins - 1)
    gaps = jnp.zeros(bins, dtype).at[place].add(weight * (right - confidence))
    total = jnp.sum(weight)
    return jnp.sum(jnp.abs(gaps)) / jnp.where(total > 0, total, 1)


def brier(
    margin: Float[Array, " n"],
    label_prob: Shaped[Array, " n"],
    *,
    weight: Shaped[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the predicted preference: 1/4 for a model that knows nothing."""
    error = (jax.nn.sigmoid(margin) - label_prob.astype(margin.dtype)) ** 2
    return jnp.average(error, weights=None if weight is None else weight.astype(margin.dtype))


def one_of_n(
    reward: Float[Array, "*batch actions"],
    log_prob: Float[Array, "*batch actions"],
    right: Bool[Array, "*batch actions"],
    *,
    n: int,
) -> Float[Array, "*batch"]:
    r"""Probability that one right answer has the highest reward beside n - 1 wrong ones.

    The right one is drawn from the policy given right, the others from it given wrong; ties are
    broken uniformly. At n = 2 it is pairwise accuracy; RewardMATH's one-to-many accuracy has n = 10
    (arXiv 2410.01729) and looks at the top of the reward, as optimization does. NaN in a context
    where all is right, or nothing.

    >>> reward, uniform = jnp.array([2.0, 1.0, 3.0]), jnp.log(jnp.full(3, 1 / 3))
    >>> float(one_of_n(reward, uniform, jnp.array([True, False, False]), n=2))  # above 1 of 2
    0.5
    """
    if n < 2:
        raise ValueError(f"n must be at least 2 (one right answer and a wrong one), got {n}")
    keep = numerics.support(log_prob, None)
    prob = jnp.where(keep, jnp.exp(jnp.where(keep, log_prob, 0)), 0)
    good, bad = jnp.where(right, prob, 0), jnp.where(right, 0, prob)
    total_good, total_bad = jnp.sum(good, -1), jnp.sum(bad, -1)
    defined = (total_good > 0) & (total_bad > 0)
    good = good / jnp.where(defined, total_good, 1)[..., None]
    bad = bad / jnp.where(defined, total_bad, 1)[..., None]
    lower = reward[..., None, :] < reward[..., :, None]
    equal = reward[..., None, :] == reward[..., :, None]
    below = jnp.sum(jnp.where(lower, bad[..., None, :], 0), -1)
    upto = below + jnp.sum(jnp.where(equal, bad[..., None, :], 0), -1)
    # ((b + t)^n - b^n) / (n t): the wins with ties shared, as a sum that doesn't cancel.
    wins = sum(upto**i * below ** (n - 1 - i) for i in range(n)) / n
    return jnp.where(defined, jnp.sum(good * wins, -1), jnp.nan)


def win_rate(
    log_prob: Float[Array, "*batch actions"],
    other_log_prob: Float[Array, "*batch actions"],
    prefer: Float[Array, "*batch actions actions"],
) -> Float[Array, "*batch"]:
    """Probability that a draw of the first policy is preferred to one of the second.

    ``prefer`` is ``links.matrix(reward)``, or any preference matrix.
    """
    return numerics.expectation(log_prob, links.win_rate(prefer, other_log_prob))


class ControlledWinRate(NamedTuple):
    """The win rate at equal nuisances, and what each match contributes to its error."""

    win_rate: Float[Array, ""]
    influence: Float[Array, " n"]
    """To first order how far each match has moved the win rate. Its sum is 0 up to the ridge, and
    the sum of squares over independent matches is the variance; where matches depend on each other
    (of one prompt), sum within those first."""


def controlled_win_rate(
    wins: Float[Array, " n"],
    nuisance: Float[Array, "n k"],
    *,
    ridge: Scalar,
    weight: Shaped[Array, " n"] | None = None,
) -> ControlledWinRate:
    r"""Win rate as it would be at equal nuisances, such as length: logistic, nuisances set to 0.

    ``wins`` are outcomes in [0, 1] of n matches, ``nuisance`` differences (the length's is usually
    tanh of the difference over its standard deviation). Fits P(win) = sigma(a + <b, nuisance>),
    with the ridge on both, and reports sigma(a). Source: length-controlled AlpacaEval, arXiv
    2404.04475, without its difficulty of instructions; the influences are those of an M-estimator
    (Huber's sandwich).
    """
    columns = jnp.concatenate([jnp.ones_like(wins)[:, None], nuisance], -1)
    fit = estimation.fit(columns, wins, ridge=ridge, weights=weight)
    curvature = estimation.hessian(fit.theta, columns, ridge=ridge, weights=weight)
    at_equal = jax.nn.sigmoid(fit.theta[0])
    intercept = jnp.linalg.solve(curvature, jnp.eye(columns.shape[-1], dtype=columns.dtype)[0])
    missed = wins - jax.nn.sigmoid(columns @ fit.theta)
    missed = missed if weight is None else weight * missed
    return ControlledWinRate(at_equal, at_equal * (1 - at_equal) * missed * (columns @ intercept))
