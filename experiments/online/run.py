"""Online learning: rounds to a given gap over batch size and dimension, and regret of all learners.

T2 (2312.11456): O~(d) rounds of m = O~(d / (gamma^2 eps^2)) comparisons are enough for *some* round
to have a gap of at most eps; so the number of comparisons, not of rounds, should be what counts,
down to a number of rounds of the order of d. Measured: the first round whose deployed policy has
gap <= eps, times m, over a grid of m and d, on problems with isotropic features and a pi0 that
gives the rare half of the actions little.

Regret curves: every learner of the library on problems whose hidden features only rare actions
have. What is counted is the gap of the policy that the learner would deploy, summed over
comparisons; the price of the exploring opponent is not in it. Offline learners draw from pi0 in
every round.

The estimate's ridge is an axis of the second part (see :mod:`experiments.coverage`): every learner
at every ridge, and some with ||theta|| <= B in the place of a ridge that matters; beside them the
posterior mean of pi0's pairs and of uniform ones, the best that can be made of so many comparisons
of either kind. The first part runs at two of the ridges.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from rich.console import Console

from experiments import ideal, plotting, sphere, study
from experiments.progress import Told
from jax_klrlhf import bandit, results
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.errors import InputError

Learners = dict[str, Callable[..., bandit.Learner]]
LINEAR: Learners = {
    "GSHF": lambda c, **e: bandit.gshf(radius=c.radius, **e),
    "GSHF, pi0 enhancer": lambda c, **e: bandit.greedy_against_reference(**e),
    "greedy": lambda c, **e: bandit.greedy(**e),
    "KL-UCB": lambda c, **e: bandit.kl_ucb(radius=c.radius, **e),
    "Thompson": lambda c, **e: bandit.thompson(**e),
    "most uncertain": lambda c, **e: bandit.most_uncertain(**e),
    "uniform": lambda c, **e: bandit.uniform(**e),
    "two-stage": lambda c, **e: bandit.two_stage(first_stage=c.rounds * c.batch // 4, **e),
    "moving reference": lambda c, **e: bandit.moving_reference(**e),
    "offline greedy": lambda c, **e: bandit.offline_greedy(**e),
    "offline Option I": lambda c, **e: bandit.offline_gshf_one(radius=c.radius, **e),
    "offline Option II": lambda c, **e: bandit.offline_gshf_two(radius=c.radius, **e),
    "KL-PCB": lambda c, **e: bandit.kl_pcb(radius=c.radius, **e),
    "pessimistic MLE": lambda c, **e: bandit.pessimistic_mle(radius=c.radius, **e),
}
"""Learners with a linear reward: ``(config, ridge=, bound=) -> learner``."""
LEARNERS: Learners = LINEAR | {
    "XPO": lambda c, **e: bandit.xpo(optimism=c.optimism, **e),
    "iterative DPO": lambda c, **e: bandit.dpo(**e),
    "chi-PO": lambda c, **e: bandit.chi_po(reward_bound=c.bound, **e),
}
"""Every learner of the library, by the name in the figure; the last fit a policy, and no ball."""
BALL = "ball"
IDEALS = {
    "posterior mean, pi0's pairs": "offline greedy",
    "posterior mean, uniform pairs": "uniform",
}
"""Whose pairs the posterior mean is of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Comparisons to a given gap over m and d; regret of all learners."""

    output: Path = Path("results/online")
    """Where results.json, target.png and regret.png go."""
    seeds: int = 64
    """Independent problems."""
    seed: int = 0
    """Root of all randomness."""
    racers: tuple[str, ...] = ("GSHF", "greedy")
    """Learners of the grid over batch size and dimension."""
    batches: tuple[int, ...] = (4, 16, 64, 256)
    """The m swept."""
    dims: tuple[int, ...] = (2, 4, 8, 16)
    """The d swept."""
    comparisons: int = 4096
    """Comparisons after which a run of the grid is given up."""
    targets: tuple[float, ...] = (0.05, 0.02)
    """The gaps eps to be reached."""
    learners: tuple[str, ...] = tuple(LEARNERS)
    """Learners of the regret curves."""
    rounds: int = 64
    """Rounds of the regret curves."""
    batch: int = 16
    """Comparisons a round, in the regret curves."""
    dim: int = 6
    """Dimension in the regret curves; half of it is hidden."""
    contexts: int = 8
    actions: int = 8
    coverage: float = 0.03
    """pi0 gives each rare action coverage / actions."""
    bound: float = 2.0
    """||theta*||."""
    kl_coef: float = 0.2
    radius: float = 1.0
    """Radius of optimism, of pessimism and of the enhancer."""
    optimism: float = 0.01
    """alpha of XPO."""
    ridges: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """lambda, in the regret curves. The first is that of the ball, too."""
    in_ball: tuple[str, ...] = ("greedy", "offline greedy", "offline Option II")
    """Learners that are run in the ball, too: every refit is then a constrained solve."""
    race_ridges: tuple[float, ...] = (1.0,)
    """lambda, in the grid over batch size and dimension."""
    smoke: bool = False
    """A few seeds and points, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            seeds=4,
            batches=(16, 64),
            dims=(2,),
            comparisons=256,
            targets=(0.2,),
            ridges=(0.1, 1.0),
            race_ridges=(1.0,),
            learners=("GSHF", "greedy", "offline greedy"),
            rounds=6,
            dim=4,
            contexts=2,
            actions=4,
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: a band needs at least two seeds.")
        for flag, names, known in (
            ("--learners", self.learners, LEARNERS),
            ("--racers", self.racers, LEARNERS),
            ("--in-ball", self.in_ball, LINEAR),
        ):
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise InputError(
                    f"{flag} {unknown[0]!r}: not one of {', '.join(map(repr, known))}."
                )
        if any(m < 1 or self.comparisons % m for m in self.batches):
            raise InputError(f"--batches: divisors of --comparisons {self.comparisons}.")
        if not all(eps > 0 for eps in self.targets):
            raise InputError("--targets: gaps above 0.")
        if not self.ridges or not all(0 < r < np.inf for r in (*self.ridges, *self.race_ridges)):
            raise InputError("--ridges, --race-ridges: positive numbers.")


def gaps(
    key: Key[Array, ""],
    ridge: Scalar,
    *,
    name: str,
    ball: bool,
    config: Config,
    dim: int,
    hidden: int,
    rounds: int,
    batch: int,
) -> Float[Array, " rounds_and_last"]:
    """Gap of the policy deployed in every round, and of the last, on the problem of this key."""
    key_problem, key_run = jax.random.split(key)
    problem = sphere.problem(key_problem, config, dim=dim, hidden=hidden)
    within = {"bound": config.bound} if ball else {}
    learner = LEARNERS[name](config, ridge=ridge, **within)
    run = bandit.simulate(
        key_run, problem, learner, rounds=rounds, batch=batch, record=bandit.record_gap
    )
    return jnp.append(run.record, run.gap)


def ideal_gap(key: Key[Array, ""], *, name: str, config: Config) -> Float[Array, ""]:
    """Gap of the posterior mean of the pairs that a learner asked for, whatever its ridge."""
    key_problem, key_run = jax.random.split(key)
    problem = sphere.problem(key_problem, config, hidden=config.dim // 2)
    run = bandit.simulate(
        key_run, problem, LEARNERS[name](config, ridge=1.0), rounds=config.rounds,
        batch=config.batch,
    )  # fmt: skip
    best = ideal.policy(
        jax.random.fold_in(key_run, 1), problem, run.state.history, bound=config.bound
    )
    return bandit.gap(problem, best)


def first_below(
    values: Float[np.ndarray, "seeds rounds"], target: float
) -> tuple[Float[np.ndarray, " seeds"], np.ndarray]:
    """Rounds played before the first gap at or below the target; and whether there was one.

    A seed that never got there counts with the number of rounds it was given: a lower limit.
    """
    below = np.asarray(values) <= target
    reached = np.asarray(below.any(1))
    return np.where(reached, below.argmax(1), below.shape[1] - 1).astype(np.float64), reached


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run both parts, draw the figures, print the tables; returns the path of ``results.json``."""
    here = study.begin("online", config, console=console)
    config, output, console = here.config, here.output, here.console
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    regret_size = {
        "dim": config.dim,
        "hidden": config.dim // 2,
        "rounds": config.rounds,
        "batch": config.batch,
    }
    curves: Curves = {}
    bests: dict[str, np.ndarray] = {}
    races: dict[float, Race] = {ridge: {} for ridge in config.race_ridges}
    metrics: dict[str, results.Metric] = {}
    with Told(console) as progress:
        task = progress.add_task("regret of all learners", total=len(config.learners))
        for name in config.learners:
            curves[name] = _over_axis(keys, name, config, **regret_size)
            progress.advance(task)
        for name, whose in IDEALS.items():
            one = functools.partial(ideal_gap, name=whose, config=config)
            bests[name] = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
        metrics |= _regret_numbers(config, curves, bests, console)
        here.write(metrics)
        cells = [
            (name, m, d) for name in config.racers for m in config.batches for d in config.dims
        ]
        total = len(cells) if races else 0
        task = progress.add_task("batch size and dimension", total=total)
        for name, m, d in cells[:total]:
            size = {"dim": d, "hidden": 0, "rounds": config.comparisons // m, "batch": m}
            play = _program(name, config, ball=False, **size)
            for ridge, race in races.items():
                race[name, m, d] = np.asarray(play(keys, jnp.asarray(ridge)), np.float64)
            progress.advance(task)
    for ridge, race in races.items():
        metrics |= _race_numbers(config, ridge, race, console)
        _race_figure(config, race, output / f"target_ridge_{ridge:g}.png")
    _regret_figure(config, curves, output / "regret.png")
    return here.end(metrics)


Race = dict[tuple[str, int, int], np.ndarray]
"""``[seeds, rounds + 1]`` by learner, m and d."""
Curves = dict[str, dict[str, np.ndarray]]
"""``[seeds, rounds + 1]`` by learner and estimate."""


def _program(name: str, config: Config, *, ball: bool, **sizes: int) -> Callable[..., Array]:
    """``(keys, ridge) -> gaps``, compiled once for all ridges."""
    one = functools.partial(gaps, name=name, ball=ball, config=config, **sizes)
    return jax.jit(jax.vmap(lambda key, ridge: one(key, ridge), (0, None)))


def _over_axis(keys: Array, name: str, config: Config, **sizes: int) -> dict[str, np.ndarray]:
    """At every ridge, and in the ball where that is asked for."""
    play = _program(name, config, ball=False, **sizes)
    found = {f"ridge={r:g}": play(keys, jnp.asarray(r)) for r in config.ridges}
    if name in config.in_ball:
        inside = _program(name, config, ball=True, **sizes)
        found[BALL] = inside(keys, jnp.asarray(config.ridges[0]))
    return {estimate: np.asarray(gap, np.float64) for estimate, gap in found.items()}


def _race_numbers(
    config: Config, ridge: float, race: Race, console: Console
) -> dict[str, results.Metric]:
    """Comparisons and rounds to every target; slopes in m at every d, and in d at every m."""
    metrics: dict[str, results.Metric] = {}
    for target in config.targets:
        for name in config.racers:
            rows: dict[str, dict[str, str]] = {}
            spent: dict[tuple[int, int], np.ndarray] = {}
            everywhere: dict[tuple[int, int], bool] = {}
            for m in config.batches:
                for d in config.dims:
                    rounds, reached = first_below(race[name, m, d], target)
                    panel = f"ridge={ridge:g}, eps={target:g}, m={m}, d={d}/{name}"
                    spent[m, d] = rounds * m
                    everywhere[m, d] = bool(reached.all())
                    metrics[f"{panel}/comparisons"] = results.mean(rounds * m)
                    metrics[f"{panel}/rounds"] = results.mean(rounds)
                    metrics[f"{panel}/reached"] = results.proportion(reached)[0]
                    limit = "" if reached.all() else ">"
                    rows.setdefault(f"m = {m}", {})[f"d = {d}"] = (
                        f"{limit}{(rounds * m).mean():.0f} ± {_se(rounds * m):.0f} "
                        f"({rounds.mean():.1f})"
                    )
            slopes = {"m": {}, "d": {}}
            for axis, along, across in (
                ("m", config.batches, config.dims),
                ("d", config.dims, config.batches),
            ):
                for fixed in across:
                    cells = [(v, fixed) if axis == "m" else (fixed, v) for v in along]
                    # A censored cell is a lower limit and would bend a slope.
                    usable = [
                        (v, cell)
                        for v, cell in zip(along, cells, strict=True)
                        if everywhere[cell] and spent[cell].mean() > 0
                    ]
                    if len(usable) < 2:
                        continue
                    slope, interval = plotting.log_slope(
                        [float(v) for v, _ in usable],
                        np.stack([spent[cell] for _, cell in usable], 1),
                    )
                    other = "d" if axis == "m" else "m"
                    panel = f"ridge={ridge:g}, eps={target:g}, {other}={fixed}/{name}"
                    metrics[f"{panel}/slope of comparisons in {axis}"] = slope
                    slopes[axis][fixed] = (
                        f"{slope.value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
                    )
            rows["slope in m"] = {f"d = {d}": text for d, text in slopes["m"].items()}
            for m, text in slopes["d"].items():
                rows[f"m = {m}"]["slope in d"] = text
            results.print_table(
                f"{name}: comparisons (rounds) to gap {target:g}, ridge {ridge:g}",
                rows,
                console=console,
                caption="mean ± one standard error over problems; > some seed was given up; "
                "slopes of logs over cells reached by all, 95 % bootstrap",
            )
    return metrics


def _se(values: np.ndarray) -> float:
    return results.mean(values).stderr or 0.0


def regret(values: Float[np.ndarray, "seeds rounds"], batch: int) -> np.ndarray:
    """Cumulated gap over comparisons: the gap deployed in a round counts for its whole batch."""
    return batch * np.cumsum(np.asarray(values)[:, :-1], 1)


def _regret_numbers(
    config: Config, curves: Curves, bests: Mapping[str, np.ndarray], console: Console
) -> dict[str, results.Metric]:
    metrics = {f"regret/{name}/final gap": results.mean(gap) for name, gap in bests.items()}
    rows: dict[str, dict[str, results.Metric | str]] = {
        name: {"any": results.mean(gap)} for name, gap in bests.items()
    }
    ordered = sorted(curves, key=lambda name: min(v[:, -1].mean() for v in curves[name].values()))
    for name in ordered:
        for estimate, values in curves[name].items():
            panel = f"regret, {estimate}/{name}"
            last = values[:, -1]
            metrics[f"{panel}/final gap"] = results.mean(last)
            metrics[f"{panel}/median final gap"] = results.Metric(float(np.median(last)))
            metrics[f"{panel}/regret"] = results.mean(regret(values, config.batch)[:, -1])
            rows.setdefault(name, {})[estimate] = results.mean(last)
            base = curves.get("greedy", {}).get(estimate)
            if base is not None and name != "greedy":
                metrics[f"{panel}/final gap less greedy's"] = results.mean(last - base[:, -1])
    results.print_table(
        f"Final gap after {config.rounds} rounds of {config.batch}, {config.seeds} problems",
        rows,
        console=console,
        caption=f"± one standard error over problems; ball: ||theta|| <= {config.bound:g}; paired "
        "differences and regrets are in results.json",
    )
    return metrics


def _race_figure(config: Config, race: Race, target: Path) -> None:
    figure, axes = plotting.grid(len(config.targets), 3)
    for row, eps in enumerate(config.targets):
        for k, name in enumerate(config.racers):
            line = "-" if k == 0 else "--"
            for color, d in enumerate(config.dims):
                spent = _spent(config.batches, lambda m, d=d, n=name: (race[n, m, d], m), eps)
                plotting.band(
                    axes[row, 0],
                    config.batches,
                    spent,
                    label=f"{name}, d = {d}",
                    color=f"C{color}",
                    linestyle=line,
                )
                plotting.band(
                    axes[row, 1],
                    config.batches,
                    spent / np.asarray(config.batches),
                    label=f"{name}, d = {d}",
                    color=f"C{color}",
                    linestyle=line,
                )
            for color, m in enumerate(config.batches):
                spent = _spent(config.dims, lambda d, m=m, n=name: (race[n, m, d], m), eps)
                plotting.band(
                    axes[row, 2],
                    config.dims,
                    spent,
                    label=f"{name}, m = {m}",
                    color=f"C{color}",
                    linestyle=line,
                )
        title = f"gap <= {eps:g}"
        plotting.label(axes[row, 0], x="batch m", y="comparisons", title=title, log="xy")
        plotting.label(axes[row, 1], x="batch m", y="rounds", title=title, log="xy")
        plotting.label(axes[row, 2], x="dimension d", y="comparisons", title=title, log="xy")
    for ax in axes.ravel():
        ax.legend()
    plotting.save(figure, target)


def _spent(points: Sequence[int], pick, eps: float) -> np.ndarray:
    """Comparisons to the target, ``[seeds, points]``; at least 1, so that a logarithm shows it."""
    columns = []
    for point in points:
        values, m = pick(point)
        columns.append(np.maximum(1, first_below(values, eps)[0] * m))
    return np.stack(columns, 1)


def _regret_figure(config: Config, curves: Curves, target: Path) -> None:
    """A column for each estimate."""
    names = list(dict.fromkeys(e for found in curves.values() for e in found))
    figure, axes = plotting.grid(2, len(names))
    x = config.batch * np.arange(config.rounds + 1)
    for column, estimate in enumerate(names):
        for k, (name, found) in enumerate(curves.items()):
            if estimate not in found:
                continue
            summed = regret(found[estimate], config.batch)
            for row, at, values in ((0, x, found[estimate]), (1, x[1:], summed)):
                line = ("-", "--", ":")[k // 10]
                ax, color = axes[row, column], f"C{k % 10}"
                plotting.band(ax, at, values, label=name, color=color, linestyle=line)
        title = {"x": "comparisons", "title": estimate}
        plotting.label(axes[0, column], y="gap of the deployed policy", log="y", **title)
        plotting.label(axes[1, column], y="cumulated gap", log="xy", **title)
    plotting.legend(figure, columns=4)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
