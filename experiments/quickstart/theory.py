"""Theory panel: the paper's algorithms on a linear bandit, with the exact gap.

pi0 covers the optimum poorly: half of the actions are rare under it, and only they show some of
the coordinates of the features. *Offline greedy* is maximum likelihood on draws from pi0,
*offline pessimistic* is GSHF with Option II, *online* is iterative GSHF with the Option I enhancer
(arXiv 2312.11456, Algorithms 1 and 2). All see the same number of comparisons. Each runs at several
ridges, which decide who wins; *posterior mean* is the best that can be made of the offline pairs,
whatever the ridge (:mod:`experiments.ideal`; ``experiments.ridge`` has more methods).
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments import ideal, plotting, sphere
from jax_klrlhf import bandit, results
from jax_klrlhf.bandit import human
from jax_klrlhf.core import bounds
from jax_klrlhf.core.numerics import Scalar

METHODS = ("offline greedy", "offline pessimistic", "online")
IDEAL = "posterior mean"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the theory panel."""

    seeds: int = 256
    """Random problems with data of their own, all in one program."""
    contexts: int = 16
    actions: int = 8
    dim: int = 8
    hidden: int = 4
    """Coordinates that only rare actions show."""
    coverage: float = 0.02
    """Probability of a rare action under pi0, times the number of actions."""
    bound: float = 3.0
    """Norm of theta*, the scale of the reward."""
    kl_coef: float = 0.3
    rounds: int = 32
    batch: int = 16
    """Comparisons in a round."""
    ridges: tuple[float, ...] = (0.1, 1.0)
    """Of the estimate and of Sigma; d / B^2 is the precision of theta* itself. Two, for the demo's
    two minutes; ``experiments.ridge`` has the whole axis."""
    delta: float = 0.1
    radius_constant: float = 0.8
    """C of the confidence radius. The literature leaves it open: read off how often the set holds
    theta*, and choose."""
    choice_splits: int = 64
    """Random splits of the people behind --choices into known and held out."""
    choice_kl_coef: float = 0.1
    choice_ridge: float = 0.1


def radius(config: Any, *, dim: int, bound: Scalar, ridge: Scalar) -> jax.Array:
    """Confidence radius at the curvature of equally good responses, 1/4, by a study's sizes.

    The worst case over the ball would be ``bounds.gamma(2 * bound)``, which makes the set so large
    that nothing is ever learned from it.
    """
    return bounds.radius(
        dim=dim,
        delta=config.delta,
        ridge=ridge,
        bound=bound,
        curvature=0.25,
        constant=config.radius_constant,
    )


def load_choices(path: Path) -> human.RecordedChoices:
    """Human choices between pairs, from an .npz file."""
    return human.train_tickets(path)


def run(
    config: Config,
    choices: human.RecordedChoices | None,
    *,
    output: Path,
    console: Console,
    progress: Progress,
) -> dict[str, results.Metric]:
    """Simulate, print the tables, draw the figure, return the metrics."""
    names = (*METHODS, IDEAL)
    bar = progress.add_task("theory: simulated bandits", total=len(names))

    def simulate(name: str) -> Any:
        program = _ideal(config) if name == IDEAL else _simulate(config, name)
        found = jax.block_until_ready(program)
        progress.advance(bar)
        return found

    # Most of it is compilation, each on one core: side by side.
    with ThreadPoolExecutor(len(names)) as pool:
        simulated = dict(zip(names, pool.map(simulate, names), strict=True))
    best = simulated.pop(IDEAL)
    metrics = _report(config, simulated, best, console)
    _figure(config, simulated, output / "theory.png")
    if choices is not None:
        bar = progress.add_task("theory: human choices", total=1)
        metrics |= _human(config, choices, console)
        progress.advance(bar)
    return metrics


def _learner(config: Config, method: str, ridge: Scalar) -> bandit.Learner:
    beta = radius(config, dim=config.dim, bound=config.bound, ridge=ridge)
    return {
        "offline greedy": bandit.offline_greedy(ridge=ridge),
        "offline pessimistic": bandit.offline_gshf_two(radius=beta, ridge=ridge),
        "online": bandit.gshf(radius=beta, ridge=ridge),
    }[method]


def _keys(config: Config) -> jax.Array:
    return jax.random.split(jax.random.key(0), config.seeds)


@partial(jax.jit, static_argnums=(0, 1))
def _simulate(config: Config, method: str) -> Any:
    """Final gap, gap before every round, whether the set holds theta*: ``[ridges, seeds, ...]``."""

    def one(key, ridge):
        key_problem, key_run = jax.random.split(key)
        problem = sphere.problem(key_problem, config)
        run = bandit.simulate(
            key_run,
            problem,
            _learner(config, method, ridge),
            rounds=config.rounds,
            batch=config.batch,
            record=bandit.record_gap,
        )
        beta = radius(config, dim=config.dim, bound=config.bound, ridge=ridge)
        inside = bandit.in_confidence_set(problem, run.state, radius=beta)
        return run.gap, run.record, inside, bandit.kl(problem.setting, run.log_prob)

    over_seeds = jax.vmap(one, (0, None))
    return jax.vmap(over_seeds, (None, 0))(_keys(config), jnp.asarray(config.ridges))


@partial(jax.jit, static_argnums=0)
def _ideal(config: Config) -> jax.Array:
    """Gap of the posterior mean of the offline methods' pairs ``[seeds]``."""

    def one(key):
        key_problem, key_run = jax.random.split(key)
        problem = sphere.problem(key_problem, config)
        run = bandit.simulate(
            key_run, problem, bandit.offline_greedy(), rounds=config.rounds, batch=config.batch
        )
        best = ideal.policy(
            jax.random.fold_in(key_run, 1), problem, run.state.history, bound=config.bound
        )
        return bandit.gap(problem, best)

    return jax.vmap(one)(_keys(config))


def _report(
    config: Config, simulated: dict, best: jax.Array, console: Console
) -> dict[str, results.Metric]:
    rows: dict[str, dict[str, results.Metric | str]] = {}
    metrics: dict[str, results.Metric] = {f"theory/{IDEAL}/gap": results.mean(best)}
    for method, (gap, _, inside, kl) in simulated.items():
        for at, ridge in enumerate(config.ridges):
            share, _ = results.proportion(inside[at])
            found = {"gap": results.mean(gap[at]), "kl": results.mean(kl[at]), "in_set": share}
            rows.setdefault(method, {})[f"ridge {ridge:g}"] = found["gap"]
            metrics |= {f"theory, ridge={ridge:g}/{method}/{k}": m for k, m in found.items()}
    rows[IDEAL] = {f"ridge {config.ridges[0]:g}": results.mean(best)}
    results.print_table(
        f"Theory: J(pi*) - J(pi) after {config.rounds * config.batch} comparisons, {config.seeds} "
        "seeds",
        rows,
        console=console,
        caption="± one standard error; the precision of theta* is "
        f"{config.dim / config.bound**2:.2g}; the posterior mean, of the offline pairs, has no "
        "ridge",
    )
    return metrics


def _figure(config: Config, simulated: dict, target: Path) -> None:
    """Gap against the number of comparisons, mean over seeds and its 95 % band, at each ridge."""
    figure, axes = plotting.grid(1, len(config.ridges), width=3.2, height=2.8)
    seen = config.batch * np.arange(1, config.rounds + 1)
    for at, ridge in enumerate(config.ridges):
        ax = axes[0, at]
        for method, (final, record, _, _) in simulated.items():
            # The record holds the gap before each round; the first is that of pi0.
            ends = np.asarray(final)[at, :, None]
            gaps = np.concatenate([np.asarray(record)[at, :, 1:], ends], 1)
            plotting.band(ax, seen, gaps, label=method)
        plotting.label(
            ax, x="comparisons", y=r"$J(\pi^*) - J(\hat\pi)$", title=f"ridge {ridge:g}", log="xy"
        )
    plotting.legend(figure)
    plotting.save(figure, target)


def _human(
    config: Config, choices: human.RecordedChoices, console: Console
) -> dict[str, results.Metric]:
    """Greedy against pessimistic, learned from some people, judged on the choices of the others.

    Nature is the Bradley-Terry model fitted to everybody, the data are the recorded choices of
    the known people, and the gap is exact on the situations of the held-out ones.
    """
    problem = human.environment(choices, kl_coef=config.choice_kl_coef, ridge=config.choice_ridge)
    data = human.comparisons(choices)
    dim = choices.features.shape[-1]
    ridge = config.choice_ridge
    beta = radius(config, dim=dim, bound=jnp.linalg.norm(problem.theta), ridge=ridge)
    known = np.stack(
        [
            np.isin(
                np.arange(len(choices.choice)),
                human.split_people(choices, fraction=0.25, seed=seed)[0],
            )
            for seed in range(config.choice_splits)
        ]
    )
    learners = {
        "greedy": bandit.offline_greedy(ridge=ridge),
        "pessimistic": bandit.offline_gshf_two(radius=beta, ridge=ridge),
    }
    first_chosen = jnp.asarray(choices.choice == 0)

    # Arrays are arguments: as constants the compiler would spend seconds folding them.
    def one(learner, problem, data, mask):
        setting = problem.setting
        state = learner.init(setting, capacity=data.context.shape[0])
        state = learner.update(
            setting, state, data._replace(weight=mask[data.context].astype(data.weight.dtype))
        )
        others = jnp.where(mask, 0.0, 1.0)
        judged = setting._replace(context_prob=others / others.sum())
        log_prob = learner.policy(setting, state)
        margin = setting.reward(state.theta)
        right = (margin[:, 0] > margin[:, 1]) == first_chosen
        return (
            bandit.gap(problem._replace(setting=judged), log_prob),
            judged.context_prob @ right.astype(others.dtype),
            bandit.in_confidence_set(problem, state, radius=beta),
        )

    rows, metrics = {}, {}
    for name, learner in learners.items():
        gap, right, inside = jax.jit(jax.vmap(partial(one, learner), (None, None, 0)))(
            problem, data, jnp.asarray(known)
        )
        # The splits share their people, so this is the spread over splits and not an error of the
        # mean over populations.
        found = {
            "gap": results.mean(gap),
            "accuracy": results.mean(right),
            "in_set": results.proportion(inside)[0],
        }
        rows[name] = {
            "gap on held-out people": f"{found['gap'].value:.5f} ± {found['gap'].stderr:.5f}",
            "choices predicted": found["accuracy"],
            "theta* in the set": f"{found['in_set'].value:.2f}",
        }
        metrics |= {f"choices/{name}/{key}": metric for key, metric in found.items()}
    people = len(np.unique(choices.person))
    results.print_table(
        f"Human choices: {len(choices.choice)} by {people} people, a quarter of them known",
        rows,
        console=console,
        caption=f"± one standard error over {config.choice_splits} splits of the same people",
    )
    return metrics
