r"""Reward-KL frontiers with their errors, and whether the paper's statements hold on them.

A method's frontier runs through its coefficients' points in the order of their KL, each
piece straight in the root of the KL: towards :math:`\pi_0 e^{r/\eta}` the gain sets out as
:math:`\sqrt{2 \mathrm{KL} \operatorname{Var} r}`, so that a chord in the KL itself would favour
methods whose points lie close together. Two methods are compared *at equal KL*, and only where both
have policies, none of which is pi0: the mean difference of their frontiers,

.. math:: \Delta = \frac{1}{k - l} \int_l^k \big( f_1(u) - f_2(u) \big) \, du, \qquad
    l = \max(\min \mathrm{KL}_1, \min \mathrm{KL}_2), \quad
    k = \min(\max \mathrm{KL}_1, \max \mathrm{KL}_2).

It is found seed by seed. Its standard error is the larger of two: over seeds (few, so Student's t
gives the interval) and over prompts (a paired bootstrap, blind to the luck of a fit). The paper's
statement holds where the 95 % interval is on its side of 0, does not where it is on the other, and
is undecided otherwise: with one seed, always.

Axes: ``C`` coefficients, ``B`` prompts, ``R`` resamples.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jax_klrlhf.results import Metric, mean

# Student's t at 0.975 for 1, 2, ... degrees of freedom; the last stands for more (wider).
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
RESAMPLES = 400
LEAST_KL = 0.02
"""Nats: methods that share less KL than this are not compared."""

Verdict = Literal["held", "not held", "undecided"]


class Curve(NamedTuple):
    """One method and seed: its coefficients, in any order."""

    kl: Float[np.ndarray, "C B"]
    """Nats, of each held-out prompt."""
    gain: Float[np.ndarray, "C B"]
    """What is compared, of each held-out prompt."""
    less: Float[np.ndarray, "C B2"] | None = None
    """On other prompts, whose mean is subtracted from the mean gain."""


class Finding(NamedTuple):
    """A statement and what became of it."""

    statement: str
    difference: Metric
    """In favour of the statement, nats of gold reward."""
    low: float
    high: float
    """The 95 % interval."""
    from_kl: float
    """Mean over seeds of the KL from which both were compared."""
    shared_kl: float
    """And up to which."""
    verdict: Verdict
    reason: str = ""
    """Why it is undecided."""
    compared: bool = True
    """False where they share too little KL: the numbers before say nothing then."""


def compare(statement: str, better: Sequence[Curve], worse: Sequence[Curve]) -> Finding:
    """Judge ``better`` above ``worse``, given seed by seed in the same order.

    Raises:
        ValueError: without seeds, or where the two have different ones.
    """
    if not better or len(better) != len(worse):
        raise ValueError(f"{len(better)} seeds against {len(worse)}: compare the same, at least 1.")
    values, errors, shared = [], [], []
    for number, (one, two) in enumerate(zip(better, worse, strict=True)):
        draws = np.random.default_rng([7, number])
        size = one.kl.shape[1]
        index = np.concatenate(
            [np.arange(size)[None], draws.integers(size, size=(RESAMPLES, size))]
        )
        other = None
        if one.less is not None:
            count = one.less.shape[1]
            other = np.concatenate(
                [np.arange(count)[None], draws.integers(count, size=(RESAMPLES, count))]
            )
        found = [
            _difference(x, y)
            for x, y in zip(_points(one, index, other), _points(two, index, other), strict=True)
        ]
        values.append(found[0][0])
        shared.append(found[0][1:])
        errors.append(np.std([f[0] for f in found[1:]], ddof=1))
    value, half, stderr = _interval(values, errors)
    low, high = value - half, value + half
    verdict: Verdict = "held" if low > 0 else "not held" if high < 0 else "undecided"
    reason = "the interval holds 0" if verdict == "undecided" else ""
    least = min(top - low for low, top in shared)
    if least < LEAST_KL:
        verdict, reason = "undecided", f"both have policies on {least:.2f} nats only"
    elif len(values) < 2:
        # One fit each, whose luck no resampling of prompts shows.
        verdict, reason = "undecided", "one seed, and an interval over its prompts"
    return Finding(
        statement,
        Metric(value, stderr, len(values)),
        low,
        high,
        float(np.mean([low for low, _ in shared])),
        float(np.mean([top for _, top in shared])),
        verdict,
        reason,
        least >= LEAST_KL,
    )


def pooled(per_seed: Sequence[Float[np.ndarray, " B"]]) -> Metric:
    """Mean over seeds and prompts; the standard error is the larger of over seeds and prompts."""
    within = [mean(values) for values in per_seed]
    value, _, stderr = _interval([m.value for m in within], [m.stderr or 0.0 for m in within])
    return Metric(value, stderr, sum(m.n or 0 for m in within))


def _interval(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float, float]:
    """Mean, half width of the 95 % interval, and standard error."""
    count = len(values)
    over_prompts = math.sqrt(sum(e**2 for e in errors)) / count
    over_seeds = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    t = _T[min(count - 2, len(_T) - 1)] if count > 1 else 0.0
    half = max(1.96 * over_prompts, t * over_seeds)
    return float(np.mean(values)), half, max(over_prompts, over_seeds)


def _points(
    curve: Curve, index: np.ndarray, other: np.ndarray | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(KL, gain) of every coefficient for each resample of the prompts."""
    kl, gain = (x[:, index].mean(-1).T for x in (curve.kl, curve.gain))  # [R, C]
    if curve.less is not None:
        gain = gain - curve.less[:, other].mean(-1).T
    return list(zip(kl, gain, strict=True))


def _difference(
    one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float, float]:
    """Mean difference of two frontiers over the KL where both have policies; from where to where.

    0 where they share none: then both ends are the lower one.
    """
    low, top = (max(0.0, float(x)) for x in _shared(one[0], two[0]))
    if top <= low:
        return 0.0, low, low
    ends = np.sqrt([low, top])
    knots = np.unique(np.clip(np.sqrt(np.maximum([low, top, *one[0], *two[0]], 0)), *ends))
    middle = (knots[1:] + knots[:-1]) / 2

    def gap(root: np.ndarray) -> np.ndarray:
        """The difference at KL u = root^2 and what du is to d root."""
        at = root**2
        return 2 * root * (frontier(*one, at) - frontier(*two, at))

    # Simpson's rule, exact for the quadratics between the knots.
    pieces = np.diff(knots) / 6 * (gap(knots[1:]) + 4 * gap(middle) + gap(knots[:-1]))
    return float(pieces.sum() / (top - low)), low, top


def _shared(one: np.ndarray, two: np.ndarray) -> tuple[float, float]:
    return max(one.min(), two.min()), min(one.max(), two.max())


def frontier(kl: np.ndarray, gain: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The points in the order of their KL, joined by straight lines in the root of the KL."""
    order = np.argsort(kl, kind="stable")
    # Rounding can make pi0's own KL a little negative.
    return np.interp(np.sqrt(at), np.sqrt(np.maximum(kl[order], 0.0)), gain[order])
