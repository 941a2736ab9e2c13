"""Pessimism on real human choices: who is covered by the data, and what it does for the others.

Nature is the Bradley-Terry model fitted to everyone's recorded choices, with a reward that may
differ between two groups of people; the data are the recorded choices of a few people; a policy is
evaluated exactly, person by person, on the situations of everybody else.

* Train tickets (235 people, 2,929 choices between two tickets): people whose journeys are long
  against those whose journeys are short.
* Cars (4,654 people, one choice among six cars each): people without college against those with.

Two kinds of data, of the same number of people: *mixed*, drawn from everyone, and *one group*,
drawn from the first group only. Under the latter the features that tell the groups apart never
vary, so the other group's reward is a matter of extrapolation.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress

from experiments import choices as recorded
from experiments import plotting, study
from experiments.progress import Told
from jax_klrlhf import bandit, results
from jax_klrlhf.bandit import human, pessimism
from jax_klrlhf.core import ellipsoid, gibbs
from jax_klrlhf.core.numerics import Scalar, expectation
from jax_klrlhf.errors import InputError

KINDS = ("mixed", "one group")
METHODS = ("pi0", "greedy", "Option I", "Option II", "KL-PCB")
BINS = 4
ROUNDING = 1e-5
"""A gain below this is no gain: two policies that are the same but for rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Greedy against pessimistic learning for held-out people."""

    choices_dir: Path
    """Folder with train_tickets.npz and cars.npz."""
    output: Path = Path("results/human_choices")
    """Where results.json and human_choices.png go."""
    datasets: tuple[str, ...] = recorded.DATASETS
    """Which of the two to run."""
    seeds: int = 16
    """Random choices of the people in the data."""
    seed: int = 0
    """Root of all randomness."""
    people: tuple[int, ...] = (8, 32)
    """Train tickets: number of people in the data."""
    car_people: tuple[int, ...] = (100, 400)
    """Cars: number of people in the data (one choice each)."""
    radii: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Radii of pessimism; the tables show the middle one."""
    kl_coef: float = 0.1
    ridge: float = 0.1
    """lambda of the learner: features differ by far less than their bound of 1."""
    smoke: bool = False
    """Two splits and one size, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(self, seeds=2, people=(8,), car_people=(60,), radii=(1.0,))

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: a standard error needs at least two splits.")
        recorded.check(self.choices_dir, self.datasets)
        if not self.radii or min(self.radii) <= 0:
            raise InputError("--radii: positive numbers.")


class World(NamedTuple):
    """A data set as a bandit; ``second`` marks situations of people of the second group."""

    choices: human.RecordedChoices
    problem: bandit.Problem
    data: bandit.Duels
    second: Bool[np.ndarray, " situations"]
    groups: tuple[str, str]


def open_world(name: str, config: Config) -> World:
    """Read a data set, split its people in two groups, and fit nature.

    InputError where the file is missing or not what it should be.
    """
    choices = recorded.read(config.choices_dir, name)
    if name == "cars":
        second = choices.person_features[:, 0] == 0
        groups = ("college", "no college")
        choices = human.interact(choices)
    else:
        if "time" not in choices.names:
            raise InputError(f"{name}.npz: no feature 'time' among {list(choices.names)}.")
        minutes = choices.features[..., choices.names.index("time")].mean(1)
        people, index = np.unique(choices.person, return_inverse=True)
        usual = np.array([np.median(minutes[index == k]) for k in range(len(people))])
        second = usual[index] > np.median(usual)
        groups = ("short trips", "long trips")
        # The trait: 1 for the first group, as for college in the cars.
        trait = (~second).astype(np.float32)[:, None]
        choices = human.interact(choices._replace(person_features=trait))
    problem = human.environment(choices, kl_coef=config.kl_coef)
    return World(choices, problem, human.comparisons(choices), second, groups)


class Outcome(NamedTuple):
    """Of one learner's data; axes ``situations``, and ``methods`` where one is meant each."""

    gap: Float[Array, "methods situations"]
    agreement: Float[Array, "methods situations"]  # probability of what was really chosen
    uncertainty: Float[Array, " situations"]  # E_{pi*} ||phi - nu_x||, per unit of radius


def fit(
    problem: bandit.Problem, data: bandit.Duels, known: Bool[Array, " situations"], ridge
) -> bandit.Estimate:
    """The estimate from the recorded choices in the known situations."""
    learner = bandit.offline_greedy(ridge=ridge)
    state = learner.init(problem.setting, capacity=data.context.shape[0])
    kept = jnp.where(known[data.context], data.weight, 0)
    return learner.update(problem.setting, state, data._replace(weight=kept))


def judge(
    problem: bandit.Problem,
    estimate: bandit.Estimate,
    known: Bool[Array, " situations"],
    choice: Int[Array, " situations"],
    radius: Scalar,
) -> Outcome:
    """Every method's policy for a world of the people who are not in the data."""
    held_out = (~known).astype(problem.reward.dtype)
    setting = problem.setting._replace(context_prob=held_out / jnp.sum(held_out))
    own = setting.mean_features(setting.ref_log_prob)
    greedy = bandit.offline_greedy().policy(setting, estimate)
    policies = jnp.stack(
        [
            setting.ref_log_prob,
            greedy,
            pessimism.option_one(setting, estimate, radius=radius).log_prob,
            pessimism.option_two(setting, estimate, radius=radius),
            # Each situation's own origin: what comparisons within it can tell.
            pessimism.option_two(setting, estimate, radius=radius, nu=own),
        ]
    )
    each = lambda log_prob: _gap_by_situation(problem, log_prob)  # noqa: E731
    optimum = bandit.optimum(problem)
    away = ellipsoid.norm(estimate.ellipsoid, setting.features - own[:, None, :])
    recorded = jnp.broadcast_to(choice[None, :, None], (len(METHODS), choice.shape[0], 1))
    return Outcome(
        jax.vmap(each)(policies),
        jnp.exp(jnp.take_along_axis(policies, recorded, -1)[..., 0]),
        expectation(optimum, away, where=setting.where),
    )


def _gap_by_situation(
    problem: bandit.Problem, log_prob: Float[Array, "situations alternatives"]
) -> Float[Array, " situations"]:
    """kl_coef KL(pi || pi*) in each situation."""
    s = problem.setting
    return gibbs.gap(log_prob, problem.reward, s.ref_log_prob, kl_coef=s.kl_coef, where=s.where)


def draw_people(
    world: World, count: int, kind: str, draw: np.random.Generator
) -> Bool[np.ndarray, " situations"]:
    """The situations of ``count`` random people, of everyone or of the first group only."""
    allowed = world.choices.person if kind == "mixed" else world.choices.person[~world.second]
    people = np.unique(allowed)
    if count >= len(people):
        raise InputError(
            f"{count} people asked for the data, but there are {len(people)} ({kind}) and some "
            "must be held out; lower --people or --car-people."
        )
    return np.isin(world.choices.person, draw.choice(people, count, replace=False))


class ByPerson(NamedTuple):
    """Held-out people of one split, one entry each (averaged over their situations)."""

    gap: Float[np.ndarray, "methods people"]
    agreement: Float[np.ndarray, "methods people"]
    uncertainty: Float[np.ndarray, " people"]
    second: Bool[np.ndarray, " people"]


def by_person(world: World, outcome: Outcome, known: Bool[np.ndarray, " situations"]) -> ByPerson:
    """Average over each held-out person's situations."""
    people, index = np.unique(world.choices.person[~known], return_inverse=True)
    size = np.bincount(index)

    def average(values: ArrayLike) -> np.ndarray:
        rows = np.atleast_2d(np.asarray(values, np.float64)[..., ~known])
        return np.stack([np.bincount(index, row, len(people)) / size for row in rows])

    return ByPerson(
        average(outcome.gap),
        average(outcome.agreement),
        average(outcome.uncertainty)[0],
        average(world.second)[0] > 0.5,
    )


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run every split, draw the figure, print the tables; returns the path of ``results.json``."""
    here = study.begin("human_choices", config, console=console)
    config, output, console = here.config, here.output, here.console
    worlds = {name: open_world(name, config) for name in config.datasets}
    found: dict[str, dict[tuple[int, str, float], list[ByPerson]]] = {}
    with Told(console) as progress:
        for name, world in worlds.items():
            found[name] = _splits(config, name, world, progress)
    metrics: dict[str, results.Metric] = {}
    for name, world in worlds.items():
        for (count, kind, radius), splits in found[name].items():
            panel = f"{name}, {kind}, people={count}, radius={radius:g}"
            metrics |= _numbers(panel, world, splits)
        _print(config, name, world, found[name], metrics, console)
    _figure(config, worlds, found, output / "human_choices.png")
    return here.end(metrics, beside="human_choices.png")


def _splits(
    config: Config, name: str, world: World, progress: Progress
) -> dict[tuple[int, str, float], list[ByPerson]]:
    sizes = config.people if name == "train_tickets" else config.car_people
    task = progress.add_task(name, total=len(sizes) * len(KINDS) * config.seeds)
    fitted = jax.jit(fit)
    judged = jax.jit(judge)
    choice = jnp.asarray(world.choices.choice, jnp.int32)
    found: dict[tuple[int, str, float], list[ByPerson]] = {}
    for count in sizes:
        for kind in KINDS:
            for split in range(config.seeds):
                draw = np.random.default_rng([config.seed, count, KINDS.index(kind), split])
                known = draw_people(world, count, kind, draw)
                mask = jnp.asarray(known)
                estimate = fitted(world.problem, world.data, mask, config.ridge)
                if not bool(estimate.converged):
                    raise RuntimeError(f"{name}: the fit on split {split} did not converge.")
                for radius in config.radii:
                    outcome = judged(world.problem, estimate, mask, choice, radius)
                    people = by_person(world, jax.tree.map(np.asarray, outcome), known)
                    found.setdefault((count, kind, radius), []).append(people)
                progress.advance(task)
    return found


def _over_splits(splits: list[ByPerson], pick) -> results.Metric:
    """Mean over the people of a split, then mean and standard error over splits.

    Splits share the population, so their outcomes are a little dependent.
    """
    return results.mean([np.mean(pick(people)) for people in splits])


def _numbers(panel: str, world: World, splits: list[ByPerson]) -> dict[str, results.Metric]:
    metrics: dict[str, results.Metric] = {}
    for k, method in enumerate(METHODS):
        for second, group in enumerate(world.groups):
            inside = lambda p, s=second: p.second == bool(s)  # noqa: E731
            at = f"{panel}/{method}"
            metrics[f"{at}/gap, {group}"] = _over_splits(
                splits, lambda p, k=k, inside=inside: p.gap[k, inside(p)]
            )
            metrics[f"{at}/agreement, {group}"] = _over_splits(
                splits, lambda p, k=k, inside=inside: p.agreement[k, inside(p)]
            )
            if method not in ("pi0", "greedy"):
                gain = lambda p, k=k, inside=inside: (p.gap[1] - p.gap[k])[inside(p)]  # noqa: E731
                metrics[f"{at}/gain over greedy, {group}"] = _over_splits(splits, gain)
                metrics[f"{at}/share of people better off, {group}"] = _over_splits(
                    splits, lambda p, gain=gain: gain(p) > ROUNDING
                )
        for number in range(BINS):
            metrics[f"{panel}/{method}/gap, uncertainty quartile {number + 1}"] = _over_splits(
                splits, lambda p, k=k, b=number: p.gap[k, _quartile(p) == b]
            )
    for second, group in enumerate(world.groups):
        metrics[f"{panel}/data/uncertainty, {group}"] = _over_splits(
            splits, lambda p, s=second: p.uncertainty[p.second == bool(s)]
        )
    return metrics


def _quartile(people: ByPerson) -> np.ndarray:
    """0 for the quarter of the people whose optimum is best covered, 3 for the worst."""
    edges = np.quantile(people.uncertainty, np.arange(1, BINS) / BINS)
    return np.searchsorted(edges, people.uncertainty, side="left")


def _middle(config: Config) -> float:
    return config.radii[len(config.radii) // 2]


def _print(
    config: Config,
    name: str,
    world: World,
    found: Mapping[tuple[int, str, float], Any],
    metrics: Mapping[str, results.Metric],
    console: Console,
) -> None:
    for count, kind, radius in found:
        if radius != _middle(config):
            continue
        panel = f"{name}, {kind}, people={count}, radius={radius:g}"
        rows = {}
        for method in METHODS:
            row: dict[str, results.Metric | str] = {}
            for what, short in (("gap", "gap"), ("gain over greedy", "gain")):
                for group in world.groups:
                    key = f"{panel}/{method}/{what}, {group}"
                    if key in metrics:
                        row[f"{short}, {group}"] = metrics[key]
            rows[method] = row
        uncertain = [metrics[f"{panel}/data/uncertainty, {group}"].value for group in world.groups]
        results.print_table(
            f"{panel} (data: {'everyone' if kind == 'mixed' else world.groups[0] + ' only'})",
            rows,
            console=console,
            caption=f"gain: over greedy; ± one standard error over {config.seeds} splits; "
            f"uncertainty of pi*: {world.groups[0]} {uncertain[0]:.3f}, "
            f"{world.groups[1]} {uncertain[1]:.3f}",
        )


def _figure(
    config: Config,
    worlds: Mapping[str, World],
    found: Mapping[str, Mapping[tuple[int, str, float], list[ByPerson]]],
    target: Path,
) -> None:
    """By uncertainty quartile, the fewest people in the data; both kinds of data."""
    figure, axes = plotting.grid(len(worlds), 2, width=4.2)
    radius = _middle(config)
    for row, name in enumerate(worlds):
        count = min(n for n, _, _ in found[name])
        for column, kind in enumerate(KINDS):
            splits = found[name][count, kind, radius]
            for k, method in enumerate(METHODS):
                values = np.array(
                    [[p.gap[k, _quartile(p) == b].mean() for b in range(BINS)] for p in splits]
                )
                plotting.band(
                    axes[row, column],
                    np.arange(1, BINS + 1),
                    values,
                    label=method,
                    color="0.5" if method == "pi0" else f"C{k - 1}",
                )
            who = "everyone" if kind == "mixed" else worlds[name].groups[0]
            plotting.label(
                axes[row, column],
                x="people held out, by uncertainty of their optimum (quartile)",
                y="gap",
                title=f"{name}: data of {count} people from {who}",
                log="y",
            )
            axes[row, column].set_xticks(range(1, BINS + 1))
    plotting.legend(figure, columns=4)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
