r"""The ridge as an axis: what holds of pessimism and exploration at one ridge, and what at all.

The theory panel's problem (`experiments.quickstart`): unit features, ||theta*|| = B, a pi0 that
covers the optimum poorly, 512 comparisons. The estimate's ridge is a prior: lambda = d / B^2 is the
precision of theta* itself, so there "greedy" is nearly the posterior mean, which is optimal since J
is linear in the reward (:mod:`experiments.ideal` has it exactly). So every method is run at ridges
from far below to above it, and with the paper's own constraint, ||theta|| <= B, in the place of a
ridge that matters.

Every gap is exact for its problem; intervals are over problems, the same for all.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from rich.console import Console

from experiments import ideal, plotting, sphere, study
from experiments.progress import Told
from experiments.quickstart import theory
from jax_klrlhf import bandit, results
from jax_klrlhf.errors import InputError

GREEDY = "offline greedy"
IDEAL = "offline, posterior mean"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every method at every ridge on the same problems."""

    output: Path = Path("results/ridge")
    """Where results.json and the figure go."""
    smoke: bool = False
    """A toy size: nothing is learned."""
    seeds: int = 128
    seed: int = 0
    ridges: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    contexts: int = 16
    actions: int = 8
    dim: int = 8
    hidden: int = 4
    """Coordinates that only rare actions show."""
    coverage: float = 0.02
    """Probability of a rare action under pi0, times the number of actions."""
    bound: float = 3.0
    """B, the norm of theta*."""
    kl_coef: float = 0.3
    rounds: int = 32
    batch: int = 16
    delta: float = 0.1
    radius_constant: float = 0.8
    """C of the confidence radius."""

    def resized(self) -> "Config":
        """This, or the small size if it was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, seeds=4, ridges=(0.1, 1.0), contexts=2, actions=4, dim=4, hidden=1, rounds=4
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: a standard error needs at least two seeds.")
        if not self.ridges or not all(0 < r < np.inf for r in self.ridges):
            raise InputError("--ridges: positive numbers.")
        if not 0 <= self.hidden < self.dim:
            raise InputError(f"--hidden {self.hidden}: from 0 to dim - 1 = {self.dim - 1}.")


def methods(config: Config, ridge: Array) -> dict[str, bandit.Learner]:
    """The learners at a ridge; the last two have the ball besides."""
    radius = theory.radius(config, dim=config.dim, bound=config.bound, ridge=ridge)
    ball = config.bound
    return {
        GREEDY: bandit.offline_greedy(ridge=ridge),
        "offline pessimistic (II)": bandit.offline_gshf_two(radius=radius, ridge=ridge),
        "online greedy": bandit.greedy(ridge=ridge),
        "online against pi0": bandit.greedy_against_reference(ridge=ridge),
        "online GSHF": bandit.gshf(radius=radius, ridge=ridge),
        "offline greedy, in the ball": bandit.offline_greedy(ridge=ridge, bound=ball),
        "offline pessimistic (II), in the ball": bandit.offline_gshf_two(
            radius=radius, ridge=ridge, bound=ball
        ),
    }


def gap(key: Key[Array, ""], ridge: Array, *, name: str, config: Config) -> Array:
    """Exact gap of one method at one ridge on one problem."""
    key_problem, key_run = jax.random.split(key)
    problem = sphere.problem(key_problem, config)
    learner = methods(config, ridge)[name]
    online = name.startswith("online")
    rounds, batch = (config.rounds, config.batch) if online else (1, config.rounds * config.batch)
    return bandit.simulate(key_run, problem, learner, rounds=rounds, batch=batch).gap


def ideal_gap(key: Key[Array, ""], *, config: Config) -> Array:
    """Exact gap of the posterior mean of the offline methods' pairs, which has no ridge."""
    key_problem, key_run = jax.random.split(key)
    problem = sphere.problem(key_problem, config)
    run = bandit.simulate(
        key_run, problem, bandit.offline_greedy(), rounds=1, batch=config.rounds * config.batch
    )
    best = ideal.policy(
        jax.random.fold_in(key_run, 1), problem, run.state.history, bound=config.bound
    )
    return bandit.gap(problem, best)


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the sweep, print the table, draw the figure; returns the path of ``results.json``."""
    here = study.begin("ridge", config, console=console)
    config = here.config
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    ridges = jnp.asarray(config.ridges)
    found: dict[str, np.ndarray] = {}
    names = list(methods(config, ridges[0]))
    with Told(here.console) as progress:
        task = progress.add_task("ridge", total=len(names))
        for name in names:
            one = functools.partial(gap, name=name, config=config)
            every = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
            found[name] = np.asarray(every(keys, ridges), np.float64)
            progress.advance(task)
        best = jax.jit(jax.vmap(functools.partial(ideal_gap, config=config)))(keys)
    metrics: dict[str, results.Metric] = {f"any ridge/{IDEAL}/gap": results.mean(best)}
    rows: dict[str, dict[str, results.Metric | str]] = {}
    for name, gaps in found.items():
        for at, ridge in enumerate(config.ridges):
            panel = f"ridge={ridge:g}/{name}"
            metrics[f"{panel}/gap"] = results.mean(gaps[:, at])
            if name != GREEDY:
                gain = results.mean(found[GREEDY][:, at] - gaps[:, at])
                metrics[f"{panel}/gain over {GREEDY}"] = gain
            rows.setdefault(name, {})[f"{ridge:g}"] = results.mean(gaps[:, at])
    rows[IDEAL] = {f"{config.ridges[0]:g}": results.mean(best)}
    results.print_table(
        f"Gap after {config.rounds * config.batch} comparisons, by the ridge "
        f"({config.seeds} problems; the prior's precision is {config.dim / config.bound**2:.2g})",
        rows,
        console=here.console,
        caption="± one standard error over problems; the gains in results.json are paired",
    )
    _figure(config, found, float(best.mean()), here.output / "ridge.png")
    return here.end(metrics, beside="ridge.png")


def _figure(config: Config, found: dict[str, np.ndarray], best: float, target: Path) -> None:
    figure, axes = plotting.grid(1, 1, width=4.8, height=3.6)
    ax = axes[0, 0]
    for number, (name, gaps) in enumerate(found.items()):
        line = "--" if name.endswith("ball") else "-"
        plotting.band(ax, config.ridges, gaps, label=name, color=f"C{number}", linestyle=line)
    ax.axhline(best, color="k", linewidth=0.8, label=IDEAL)
    ax.axvline(config.dim / config.bound**2, color="0.5", linestyle=":", label="prior's precision")
    plotting.label(ax, x="ridge", y="gap", log="xy")
    plotting.legend(figure)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
