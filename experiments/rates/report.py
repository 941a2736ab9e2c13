"""Means, slopes beside the theory's, coverage of the confidence set, the constant that suffices."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from rich.console import Console
from scipy.stats import binom

from experiments import plotting
from experiments.rates.measure import Config, Measured, Pessimist
from jax_klrlhf import results
from jax_klrlhf.core import bounds

SHRUNK = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Fractions of the radius at which the coverage of the set is reported."""
POLICIES = ("one", "two", "one_realized", "two_realized")
NAMES = {
    "greedy": "greedy",
    "one": "Option I",
    "two": "Option II",
    "one_realized": "Option I, realized radius",
    "two_realized": "Option II, realized radius",
}


def numbers(
    config: Config,
    base: Measured,
    by_dim: Mapping[int, Measured],
    by_bound: Mapping[float, Measured],
) -> dict[str, results.Metric]:
    """Means at every point; violations of T1; coverage of the confidence set."""
    metrics: dict[str, results.Metric] = {}
    middle = config.deltas.index(config.delta)

    def put(panel: str, measured: Measured, point: int, delta: int) -> None:
        metrics[f"{panel}/greedy/gap"] = results.mean(measured.greedy[:, point])
        metrics[f"{panel}/confidence set/error"] = results.mean(measured.error[:, point])
        metrics[f"{panel}/confidence set/radius"] = results.mean(measured.radius[:, point, delta])
        inside, _ = results.proportion(held(measured, point, delta))
        metrics[f"{panel}/confidence set/coverage"] = inside
        # T1's one step about the radius: at most the realized error, and attained by an action.
        share = np.asarray(measured.needed[:, point] / measured.error[:, point])
        metrics[f"{panel}/T1/needed over realized radius"] = results.mean(share)
        theory = float(measured.radius[0, point, delta])
        for what, needed in (("T1", measured.needed), ("confidence set", measured.error)):
            found = least_constant(config, np.asarray(needed[:, point]), theory)
            for name, value in zip(("", ", low", ", high"), found, strict=True):
                if math.isfinite(value):
                    metrics[f"{panel}/{what}/least constant{name}"] = results.Metric(value)
        for name in POLICIES:
            p = pessimist(measured, name, delta)
            gap, bound = p.gap[:, point], p.bound[:, point]
            metrics[f"{panel}/{NAMES[name]}/gap"] = results.mean(gap)
            metrics[f"{panel}/{NAMES[name]}/bound"] = results.mean(bound)
            metrics[f"{panel}/{NAMES[name]}/bound over gap"] = results.mean(
                bound / np.maximum(gap, 1e-7)
            )
            violated, _ = results.proportion(p.violated[:, point])
            metrics[f"{panel}/{NAMES[name]}/violations"] = violated

    for point, n in enumerate(config.comparisons):
        put(f"n={n}", base, point, middle)
    for dim, measured in by_dim.items():
        put(f"d={dim}", measured, -1, middle)
    for bound, measured in by_bound.items():
        put(f"B={bound:g}", measured, -1, middle)
    for at, delta in enumerate(config.deltas):
        put(f"delta={delta:g}", base, -1, at)
    for bound, measured in by_bound.items():
        for shrunk in SHRUNK:
            inside, _ = results.proportion(held(measured, -1, middle, shrunk))
            metrics[f"B={bound:g}, radius x {shrunk:g}/confidence set/coverage"] = inside
    return metrics


def slopes(
    config: Config,
    base: Measured,
    by_dim: Mapping[int, Measured],
    by_bound: Mapping[float, Measured],
) -> tuple[dict[str, results.Metric], dict[str, dict[str, str]]]:
    """Measured slopes beside the theory's, as metrics and as rows of the table."""
    middle = config.deltas.index(config.delta)
    kept = [i for i, n in enumerate(config.comparisons) if n >= config.fit_from]
    n_axis = [float(config.comparisons[i]) for i in kept]
    dims, bound_axis = [float(d) for d in by_dim], list(by_bound)

    def formula(x: Sequence[float], at) -> float:
        """The slope of the bound's own formula on the same grid."""
        return plotting.log_slope(x, np.array([[at(value) for value in x]]))[0].value

    def radius(*, dim: float, bound: float) -> float:
        curvature = float(bounds.gamma(2 * bound))
        count = dim + np.log(1 / config.delta)
        return float(np.sqrt(count / curvature**2 + config.ridge * bound**2))

    # Sigma is about (2n/d) I, so E ||phi - nu|| grows as sqrt d; while pi* moves the mean of phi
    # along theta* alone, by about B / (kl_coef d), which is what Option I is charged for.
    in_d = {
        "one": lambda d: d**-0.5 * radius(dim=d, bound=config.bound),
        "two": lambda d: d**0.5 * radius(dim=d, bound=config.bound),
    }
    in_b = {
        "one": lambda b: b * radius(dim=config.dim, bound=b),
        "two": lambda b: radius(dim=config.dim, bound=b),
    }

    def theory(axis: str, name: str, what: str) -> float | None:
        if what == "gap":
            return {"n": -1.0, "d": 1.0, "B": None}[axis]
        if axis == "n":
            return -0.5
        return formula(dims, in_d[name]) if axis == "d" else formula(bound_axis, in_b[name])

    metrics: dict[str, results.Metric] = {}
    rows: dict[str, dict[str, str]] = {}

    def put(axis: str, name: str, what: str, x: Sequence[float], values: ArrayLike) -> None:
        slope, (low, high) = plotting.log_slope(x, np.asarray(values))
        metrics[f"slope in {axis}/{NAMES[name]}/{what}"] = slope
        expected = theory(axis, name, what)
        rows[f"{what} of {NAMES[name]}, in {axis}"] = {
            "measured": f"{slope.value:.2f}",
            "95 %": f"[{low:.2f}, {high:.2f}]",
            "theory": "none" if expected is None else f"{expected:.2f}",
        }

    def over(panels: Mapping, pick) -> np.ndarray:
        return np.stack([pick(measured)[:, -1] for measured in panels.values()], 1)

    for axis in ("n", "d", "B"):
        x = {"n": n_axis, "d": dims, "B": bound_axis}[axis]
        if len(x) < 2:
            continue
        panels = {"d": by_dim, "B": by_bound}.get(axis, {})

        def values(pick, axis=axis, panels=panels):
            return pick(base)[:, kept] if axis == "n" else over(panels, pick)

        put(axis, "greedy", "gap", x, values(lambda m: m.greedy))
        for name in POLICIES:
            put(axis, name, "gap", x, values(lambda m, k=name: pessimist(m, k, middle).gap))
        for name in ("one", "two"):
            put(axis, name, "bound", x, values(lambda m, k=name: pessimist(m, k, middle).bound))
    return metrics, rows


def print_confidence(
    config: Config,
    by_dim: Mapping[int, Measured],
    by_bound: Mapping[float, Measured],
    console: Console,
) -> None:
    middle = config.deltas.index(config.delta)
    rows = {}
    panels = {f"d={d}, B={config.bound:g}": m for d, m in by_dim.items()}
    panels |= {f"d={config.dim}, B={b:g}": m for b, m in by_bound.items()}
    for panel, measured in panels.items():
        inside, (low, high) = results.proportion(held(measured, -1, middle))
        quantile = np.quantile(measured.error, 1 - config.delta, axis=0)
        radius = float(measured.radius[0, -1, middle])
        least = least_constant(config, np.asarray(measured.needed[:, -1]), radius)
        of_set = least_constant(config, np.asarray(measured.error[:, -1]), radius)
        rows[panel] = {
            f"covered (asked {1 - config.delta:g})": f"{inside.value:.3f} [{low:.3f}, {high:.3f}]",
            "radius": f"{radius:.1f}",
            "error, its quantile": f"{quantile[-1]:.2f}",
            "at the least n": f"{quantile[0]:.2f}",
            "C needed by the set [95 %]": f"{of_set[0]:.3f} [{of_set[1]:.3f}, {of_set[2]:.3f}]",
            "by T1": f"{least[0]:.3f} [{least[1]:.3f}, {least[2]:.3f}]",
            "bound/gap, Option II": f"{_ratio(measured.two, middle):.0f}",
            "realized radius": f"{_ratio(measured.two_realized, None):.0f}",
        }
    results.print_table(
        f"Confidence set and bounds at n = {config.comparisons[-1]}, delta = {config.delta:g}",
        rows,
        console=console,
        caption="covered: share of seeds, Wilson 95 %; bound/gap: ratio of the means over seeds",
    )


def least_constant(
    config: Config, needed: Float[np.ndarray, " seeds"], radius: float
) -> tuple[float, float, float]:
    """C of the radius that suffices with probability 1 - delta, and its 95 % interval.

    The quantile of what each seed needed, between the order statistics that enclose it with 95 %
    whatever the law (binomial); an end that no seed is beyond is infinite. An estimate, so that it
    can be wrong: T1 with a radius of C = 1 holds with room for any program.
    """
    found = config.constant * np.sort(needed.astype(np.float64)) / radius
    count, level = len(found), 1 - config.delta
    low, high = (int(x) for x in binom.ppf([0.025, 0.975], count, level))
    at = lambda rank: math.inf if rank >= count else float(found[rank])  # noqa: E731
    return float(np.quantile(found, level)), float(found[max(low - 1, 0)]), at(high)


def _ratio(p: Pessimist, delta: int | None) -> float:
    gap, bound = (x[:, -1] if delta is None else x[:, -1, delta] for x in (p.gap, p.bound))
    return float(bound.mean() / gap.mean())


def held(measured: Measured, point: int, delta: int, constant: float = 1.0) -> np.ndarray:
    """Whether theta* was in the set, its radius shrunk to ``constant`` of what it is."""
    return np.asarray(measured.error[:, point] <= constant * measured.radius[:, point, delta])


def pessimist(measured: Measured, name: str, delta: int) -> Pessimist:
    """Leaves ``[seeds, counts]``."""
    p = getattr(measured, name)
    return p if name.endswith("realized") else Pessimist(*(leaf[:, :, delta] for leaf in p))
