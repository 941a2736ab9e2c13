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
from rich.progress import Progress

from experiments import plotting, study
from jax_klrlhf import bandit, results
from jax_klrlhf.errors import InputError

LEARNERS: dict[str, Callable[["Config"], bandit.Learner]] = {
    "GSHF": lambda c: bandit.gshf(radius=c.radius),
    "GSHF, pi0 enhancer": lambda c: bandit.greedy_against_reference(),
    "greedy": lambda c: bandit.greedy(),
    "KL-UCB": lambda c: bandit.kl_ucb(radius=c.radius),
    "Thompson": lambda c: bandit.thompson(),
    "most uncertain": lambda c: bandit.most_uncertain(),
    "uniform": lambda c: bandit.uniform(),
    "two-stage": lambda c: bandit.two_stage(first_stage=c.rounds * c.batch // 4),
    "XPO": lambda c: bandit.xpo(optimism=c.optimism),
    "iterative DPO": lambda c: bandit.dpo(),
    "moving reference": lambda c: bandit.moving_reference(),
    "offline greedy": lambda c: bandit.offline_greedy(),
    "offline Option I": lambda c: bandit.offline_gshf_one(radius=c.radius),
    "offline Option II": lambda c: bandit.offline_gshf_two(radius=c.radius),
    "KL-PCB": lambda c: bandit.kl_pcb(radius=c.radius),
    "pessimistic MLE": lambda c: bandit.pessimistic_mle(radius=c.radius),
    "chi-PO": lambda c: bandit.chi_po(reward_bound=c.bound),
}
"""Every learner of the library, by the name in the figure."""


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
        for flag, names in (("--learners", self.learners), ("--racers", self.racers)):
            unknown = sorted(set(names) - set(LEARNERS))
            if unknown:
                raise InputError(
                    f"{flag} {unknown[0]!r}: not one of {', '.join(map(repr, LEARNERS))}."
                )
        if any(m < 1 or self.comparisons % m for m in self.batches):
            raise InputError(f"--batches: divisors of --comparisons {self.comparisons}.")
        if not all(eps > 0 for eps in self.targets):
            raise InputError("--targets: gaps above 0.")


def gaps(
    key: Key[Array, ""],
    learner: bandit.Learner,
    *,
    config: Config,
    dim: int,
    hidden: int,
    rounds: int,
    batch: int,
) -> Float[Array, " rounds_and_last"]:
    """Gap of the policy deployed in every round, and of the last, on the problem of this key."""
    key_problem, key_run = jax.random.split(key)
    problem = bandit.sphere(
        key_problem,
        contexts=config.contexts,
        actions=config.actions,
        dim=dim,
        kl_coef=config.kl_coef,
        bound=config.bound,
        coverage=config.coverage,
        hidden=hidden,
    )
    run = bandit.simulate(
        key_run, problem, learner, rounds=rounds, batch=batch, record=bandit.record_gap
    )
    return jnp.append(run.record, run.gap)


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
    cells = [(name, m, d) for name in config.racers for m in config.batches for d in config.dims]
    race: dict[tuple[str, int, int], np.ndarray] = {}
    curves: dict[str, np.ndarray] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("batch size and dimension", total=len(cells))
        for name, m, d in cells:
            race[name, m, d] = _play(
                keys,
                name,
                config,
                dim=d,
                hidden=0,
                rounds=config.comparisons // m,
                batch=m,
            )
            progress.advance(task)
        task = progress.add_task("regret of all learners", total=len(config.learners))
        for name in config.learners:
            curves[name] = _play(
                keys,
                name,
                config,
                dim=config.dim,
                hidden=config.dim // 2,
                rounds=config.rounds,
                batch=config.batch,
            )
            progress.advance(task)
    metrics = _race_numbers(config, race, console)
    metrics |= _regret_numbers(config, curves, console)
    _race_figure(config, race, output / "target.png")
    _regret_figure(config, curves, output / "regret.png")
    return here.end(metrics, beside="target.png and regret.png")


def _play(keys: Array, name: str, config: Config, **sizes: int) -> np.ndarray:
    learner = LEARNERS[name](config)
    one = functools.partial(gaps, learner=learner, config=config, **sizes)
    return np.asarray(jax.jit(jax.vmap(lambda key: one(key)))(keys), np.float64)


def _race_numbers(
    config: Config, race: Mapping[tuple[str, int, int], np.ndarray], console: Console
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
                    panel = f"eps={target:g}, m={m}, d={d}/{name}"
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
                    metrics[
                        f"eps={target:g}, {other}={fixed}/{name}/slope of comparisons in {axis}"
                    ] = slope
                    slopes[axis][fixed] = (
                        f"{slope.value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
                    )
            rows["slope in m"] = {f"d = {d}": text for d, text in slopes["m"].items()}
            for m, text in slopes["d"].items():
                rows[f"m = {m}"]["slope in d"] = text
            results.print_table(
                f"{name}: comparisons (rounds) to gap {target:g}",
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
    config: Config, curves: Mapping[str, np.ndarray], console: Console
) -> dict[str, results.Metric]:
    metrics: dict[str, results.Metric] = {}
    rows: dict[str, dict[str, results.Metric | str]] = {}
    base = curves.get("greedy")
    ordered = sorted(curves, key=lambda name: curves[name][:, -1].mean())
    for name in ordered:
        values = curves[name]
        found: dict[str, results.Metric] = {
            "final gap": results.mean(values[:, -1]),
            "regret": results.mean(regret(values, config.batch)[:, -1]),
        }
        if base is not None and name != "greedy":
            found["final gap less greedy's"] = results.mean(values[:, -1] - base[:, -1])
        rows[name] = dict(found)
        metrics |= {f"regret/{name}/{metric}": number for metric, number in found.items()}
    results.print_table(
        f"{config.rounds} rounds of {config.batch}, {config.seeds} problems",
        rows,
        console=console,
        caption="± one standard error over problems; the difference is paired",
    )
    return metrics


def _race_figure(
    config: Config, race: Mapping[tuple[str, int, int], np.ndarray], target: Path
) -> None:
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


def _regret_figure(config: Config, curves: Mapping[str, np.ndarray], target: Path) -> None:
    figure, axes = plotting.grid(1, 2)
    x = config.batch * np.arange(config.rounds + 1)
    for k, (name, values) in enumerate(curves.items()):
        color, line = f"C{k % 10}", ("-", "--", ":")[k // 10]
        summed = regret(values, config.batch)
        plotting.band(axes[0, 0], x, values, label=name, color=color, linestyle=line)
        plotting.band(axes[0, 1], x[1:], summed, label=name, color=color, linestyle=line)
    plotting.label(axes[0, 0], x="comparisons", y="gap of the deployed policy", log="y")
    plotting.label(axes[0, 1], x="comparisons", y="cumulated gap", log="xy")
    plotting.legend(figure, columns=4)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
