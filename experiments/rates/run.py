"""How fast the offline gap falls, and how loose the bounds are: in n, d, B and delta.

Every seed draws its own problem (unit features and theta* on spheres, uniform pi0) and one stream
of comparisons from pi0, of which the learners see the first n. Measured against

* the fast rate: the gap is second order in the error of the reward (statement L2; 2411.04625), so
  of slope -1 in n and +1 in d, while
* the bounds (statement T1, Options I and II of 2312.11456) are first order: -1/2 in n;
* the confidence set (L3) of radius beta = C sqrt((d + log 1/delta) / gamma^2 + lambda B^2), where
  gamma is the least curvature for margins up to 2B. The papers leave C open; here C = 1 unless
  asked otherwise, and the least C that would have sufficed is reported.

Pessimism is run with that radius and with the *realized* error ||theta_hat - theta*||_Sigma, the
least radius for which T1 is a theorem: a bound violated there would be a wrong program.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress

from experiments import plotting, study
from jax_klrlhf import bandit, results
from jax_klrlhf.bandit import pessimism
from jax_klrlhf.core import bounds, uncertainty
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Gap, bounds and confidence set against n, d, B and delta."""

    output: Path = Path("results/rates")
    """Where results.json and rates.png go."""
    seeds: int = 256
    """Independent problems, each with its own data."""
    seed: int = 0
    """Root of all randomness."""
    comparisons: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """The n swept; d, B and delta are swept at the last."""
    fit_from: int = 512
    """Smallest n in the fits of slopes: below it the ridge still matters."""
    dims: tuple[int, ...] = (2, 4, 8, 16)
    """The d swept."""
    bounds: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """The B = ||theta*|| swept."""
    deltas: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.01)
    """The probabilities of failure swept."""
    dim: int = 4
    """d where another number is swept."""
    bound: float = 1.0
    """B where another number is swept."""
    delta: float = 0.1
    """delta where another number is swept; one of --deltas."""
    contexts: int = 8
    actions: int = 8
    kl_coef: float = 0.5
    ridge: float = 1.0
    """lambda, on the scale of a sum over comparisons."""
    constant: float = 1.0
    """C of the radius."""
    smoke: bool = False
    """A few seeds and points, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            seeds=8,
            comparisons=(128, 256, 512),
            fit_from=128,
            dims=(2, 4),
            bounds=(0.5, 1.0),
            deltas=(0.5, 0.1),
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: an interval needs at least two seeds.")
        if self.delta not in self.deltas:
            raise InputError(f"--delta {self.delta}: must be one of --deltas {self.deltas}.")
        if list(self.comparisons) != sorted(set(self.comparisons)) or self.comparisons[0] < 1:
            raise InputError("--comparisons: give positive numbers in increasing order.")
        if sum(n >= self.fit_from for n in self.comparisons) < 2:
            raise InputError(
                f"--fit-from {self.fit_from}: fewer than two of --comparisons are left to fit."
            )
        if not all(0 < delta < 1 for delta in self.deltas):
            raise InputError("--deltas: probabilities strictly between 0 and 1.")


class Pessimist(NamedTuple):
    """One pessimistic policy against its bound; leading axes as in :class:`Measured`."""

    gap: Float[Array, "..."]
    bound: Float[Array, "..."]
    violated: Bool[Array, "..."]  # T1, beyond rounding


class Measured(NamedTuple):
    """One seed; axes ``counts`` and, where the radius depends on it, ``deltas``."""

    greedy: Float[Array, " counts"]
    error: Float[Array, " counts"]  # ||theta_hat - theta*||_Sigma
    radius: Float[Array, "counts deltas"]
    one: Pessimist  # [counts, deltas]
    two: Pessimist  # [counts, deltas]
    one_realized: Pessimist  # [counts]: with the realized error as the radius
    two_realized: Pessimist  # [counts]


def measure(
    key: Key[Array, ""],
    counts: Float[Array, " counts"],
    deltas: Float[Array, " deltas"],
    bound: Scalar,
    *,
    config: Config,
    dim: int,
) -> Measured:
    """One problem and one stream of data, at every number of comparisons and every delta."""
    key_problem, key_data = jax.random.split(key)
    problem = bandit.sphere(
        key_problem,
        contexts=config.contexts,
        actions=config.actions,
        dim=dim,
        kl_coef=config.kl_coef,
        bound=bound,
    )
    setting = problem.setting
    ref = setting.ref_log_prob
    most = max(config.comparisons)
    data = bandit.compare(key_data, problem, ref, ref, batch=most)
    learner = bandit.offline_greedy(ridge=config.ridge)
    empty = learner.init(setting, capacity=most)
    optimum = bandit.optimum(problem)
    nu = pessimism.usual_nu(setting)

    def pessimists(estimate: bandit.Estimate, radius: Array) -> tuple[Pessimist, Pessimist]:
        saddle = pessimism.option_one(setting, estimate, radius=radius, nu=nu)
        pointwise = pessimism.option_two(setting, estimate, radius=radius, nu=nu)
        sigma = estimate.ellipsoid
        given = {"context_prob": setting.context_prob, "nu": nu}
        expected = uncertainty.expected(sigma, setting.features, optimum, **given)
        of_actions = uncertainty.pointwise(sigma, setting.features, optimum, **given)
        bound_one = bounds.offline_expected(expected, radius=radius)
        bound_two = bounds.offline_pointwise(of_actions, radius=radius)
        gap_one, gap_two = bandit.gap(problem, saddle.log_prob), bandit.gap(problem, pointwise)
        # T1 of Option II holds with this divergence added to the gap.
        away = setting.context_prob @ jnp.sum(jnp.exp(optimum) * (optimum - pointwise), -1)
        rounding = 1e-5 * (1 + radius)
        return (
            Pessimist(gap_one, bound_one, gap_one > bound_one + saddle.duality_gap + rounding),
            Pessimist(gap_two, bound_two, gap_two + setting.kl_coef * away > bound_two + rounding),
        )

    def at(count: Array) -> Measured:
        seen = (jnp.arange(most) < count).astype(data.weight.dtype)
        estimate = learner.update(setting, empty, data._replace(weight=seen))
        error = bandit.error(problem, estimate)
        radius = bounds.radius(
            dim=dim,
            delta=deltas,
            ridge=config.ridge,
            bound=bound,
            curvature=bounds.gamma(2 * bound),
            constant=config.constant,
        )
        one, two = jax.vmap(functools.partial(pessimists, estimate))(radius)
        one_realized, two_realized = pessimists(estimate, error)
        return Measured(
            bandit.gap(problem, learner.policy(setting, estimate)),
            error,
            radius,
            one,
            two,
            one_realized,
            two_realized,
        )

    return jax.vmap(at)(counts)


def sweep(config: Config, *, console: Console) -> tuple[dict[int, Measured], dict[float, Measured]]:
    """Every seed at every d (with --bound) and at every B (with --dim); leaves ``[seeds, ...]``."""
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    counts = jnp.asarray(config.comparisons)
    deltas = jnp.asarray(config.deltas)
    by_dim, by_bound = {}, {}
    programs = {}
    with Progress(console=console) as progress:
        task = progress.add_task("rates", total=len(config.dims) + len(config.bounds))

        def run(dim: int, bound: float) -> Measured:
            if dim not in programs:
                one = functools.partial(measure, config=config, dim=dim)
                programs[dim] = jax.jit(
                    lambda keys, bound: jax.lax.map(
                        lambda key: one(key, counts, deltas, bound), keys, batch_size=8
                    )
                )
            measured = jax.tree.map(np.asarray, programs[dim](keys, jnp.asarray(bound)))
            progress.advance(task)
            return measured

        for dim in config.dims:
            by_dim[dim] = run(dim, config.bound)
        for bound in config.bounds:
            same = bound == config.bound and config.dim in by_dim
            by_bound[bound] = by_dim[config.dim] if same else run(config.dim, bound)
            if same:
                progress.advance(task)
    return by_dim, by_bound


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the sweeps, draw the figure, print the tables; returns the path of ``results.json``."""
    here = study.begin("rates", config, console=console)
    config, output, console = here.config, here.output, here.console
    by_dim, by_bound = sweep(config, console=console)
    base = by_bound.get(config.bound) or by_dim[config.dim]
    metrics = _numbers(config, base, by_dim, by_bound)
    slopes, rows = _slopes(config, base, by_dim, by_bound)
    metrics |= slopes
    _figure(config, base, by_dim, by_bound, output / "rates.png")
    results.print_table(
        f"Log-log slopes, {config.seeds} seeds",
        rows,
        console=console,
        caption="95 % percentile bootstrap over seeds; theory: see experiments/rates/README.md",
    )
    _print_confidence(config, by_dim, by_bound, console)
    return here.end(metrics, beside="rates.png")


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


def _numbers(
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
        held, _ = results.proportion(_held(measured, point, delta))
        metrics[f"{panel}/confidence set/coverage"] = held
        for name in POLICIES:
            p = _pessimist(measured, name, delta)
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
            held, _ = results.proportion(_held(measured, -1, middle, shrunk))
            metrics[f"B={bound:g}, radius x {shrunk:g}/confidence set/coverage"] = held
    return metrics


def _slopes(
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
            put(axis, name, "gap", x, values(lambda m, k=name: _pessimist(m, k, middle).gap))
        for name in ("one", "two"):
            put(axis, name, "bound", x, values(lambda m, k=name: _pessimist(m, k, middle).bound))
    return metrics, rows


def _print_confidence(
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
        held, (low, high) = results.proportion(_held(measured, -1, middle))
        quantile = np.quantile(measured.error, 1 - config.delta, axis=0)
        needed = config.constant * quantile[-1] / measured.radius[0, -1, middle]
        rows[panel] = {
            f"covered (asked {1 - config.delta:g})": f"{held.value:.3f} [{low:.3f}, {high:.3f}]",
            "radius": f"{measured.radius[0, -1, middle]:.1f}",
            "error, its quantile": f"{quantile[-1]:.2f}",
            "at the least n": f"{quantile[0]:.2f}",
            "C needed": f"{needed:.3f}",
            "bound/gap, Option II": f"{_ratio(measured.two, middle):.0f}",
            "realized radius": f"{_ratio(measured.two_realized, None):.0f}",
        }
    results.print_table(
        f"Confidence set and bounds at n = {config.comparisons[-1]}, delta = {config.delta:g}",
        rows,
        console=console,
        caption="covered: share of seeds, Wilson 95 %; bound/gap: ratio of the means over seeds",
    )


def _ratio(p: Pessimist, delta: int | None) -> float:
    gap, bound = (x[:, -1] if delta is None else x[:, -1, delta] for x in (p.gap, p.bound))
    return float(bound.mean() / gap.mean())


def _held(measured: Measured, point: int, delta: int, constant: float = 1.0) -> np.ndarray:
    """Whether theta* was in the set, its radius shrunk to ``constant`` of what it is."""
    return np.asarray(measured.error[:, point] <= constant * measured.radius[:, point, delta])


def _pessimist(measured: Measured, name: str, delta: int) -> Pessimist:
    """Leaves ``[seeds, counts]``."""
    p = getattr(measured, name)
    return p if name.endswith("realized") else Pessimist(*(leaf[:, :, delta] for leaf in p))


def _figure(
    config: Config,
    base: Measured,
    by_dim: Mapping[int, Measured],
    by_bound: Mapping[float, Measured],
    target: Path,
) -> None:
    middle = config.deltas.index(config.delta)
    figure, axes = plotting.grid(2, 3)
    n, last = list(config.comparisons), config.comparisons[-1]

    def draw(ax, x, pick) -> None:
        plotting.band(ax, x, pick(lambda m: m.greedy), label="gap, greedy", color="C0")
        for name, color in (("one", "C1"), ("two", "C2")):
            p = lambda m, k=name: _pessimist(m, k, middle)  # noqa: E731
            plotting.band(
                ax, x, pick(lambda m, p=p: p(m).gap), label=f"gap, {NAMES[name]}", color=color
            )
            plotting.band(
                ax,
                x,
                pick(lambda m, p=p: p(m).bound),
                label=f"bound, {NAMES[name]}",
                color=color,
                linestyle="--",
            )

    draw(axes[0, 0], n, lambda of: of(base))
    plotting.guide(axes[0, 0], n, float(base.greedy[:, 0].mean()), -1.0, label="slope -1")
    bound = float(_pessimist(base, "two", middle).bound[:, 0].mean())
    plotting.guide(axes[0, 0], n, bound, -0.5, label="slope -1/2")
    plotting.label(axes[0, 0], x="comparisons n", y="reward", title="gap and bounds", log="xy")
    stack = lambda panels: lambda of: np.stack([of(m)[:, -1] for m in panels.values()], 1)  # noqa: E731
    draw(axes[0, 1], list(by_dim), stack(by_dim))
    plotting.label(axes[0, 1], x="dimension d", y="reward", title=f"n = {last}", log="xy")
    draw(axes[0, 2], list(by_bound), stack(by_bound))
    plotting.label(axes[0, 2], x="bound B", y="reward", title=f"n = {last}", log="y")
    for name, color in (("one_realized", "C1"), ("two_realized", "C2")):
        p = getattr(base, name)
        plotting.band(axes[1, 0], n, p.gap, label=f"gap, {NAMES[name]}", color=color)
        plotting.band(
            axes[1, 0], n, p.bound, label=f"bound, {NAMES[name]}", color=color, linestyle="--"
        )
    plotting.label(axes[1, 0], x="comparisons n", y="reward", title="least radius", log="xy")
    for dim, measured in by_dim.items():
        quantile = np.quantile(measured.error, 1 - config.delta, axis=0)
        axes[1, 1].plot(n, quantile / np.sqrt(dim), label=f"d = {dim}")
    plotting.label(
        axes[1, 1],
        x="comparisons n",
        y="error / sqrt d",
        title=f"{1 - config.delta:g}-quantile of the error in Sigma-norm",
        log="x",
    )
    for bound, measured in by_bound.items():
        shares = [results.proportion(_held(measured, -1, middle, f)) for f in SHRUNK]
        middles = np.array([share.value for share, _ in shares])
        ends = np.array([interval for _, interval in shares])
        axes[1, 2].errorbar(
            np.array(SHRUNK) * config.constant,
            middles,
            np.abs(ends.T - middles),
            marker=".",
            label=f"B = {bound:g}",
        )
    axes[1, 2].axhline(1 - config.delta, linestyle=":", color="0.4", label="asked")
    plotting.label(
        axes[1, 2],
        x="constant C of the radius",
        y="covered (Wilson 95 %)",
        title=f"confidence set at n = {last}",
        log="x",
    )
    for ax in axes.ravel():
        ax.legend()
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
