"""Theory panel: the paper's algorithms on a linear bandit, with the exact gap.

pi0 covers the optimum poorly: half of the actions are rare under it, and only they show some of
the coordinates of the features. *Offline greedy* is maximum likelihood on draws from pi0,
*offline pessimistic* is GSHF with Option II, *online* is iterative GSHF with the Option I enhancer
(arXiv 2312.11456, Algorithms 1 and 2). All see the same number of comparisons.
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

from experiments import plotting
from jax_klrlhf import bandit, results
from jax_klrlhf.bandit import human
from jax_klrlhf.core import bounds
from jax_klrlhf.core.numerics import Scalar

METHODS = ("offline greedy", "offline pessimistic", "online")


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
    delta: float = 0.1
    radius_constant: float = 0.8
    """C of the confidence radius. The literature leaves it open: read off how often the set holds
    theta*, and choose."""
    choice_splits: int = 64
    """Random splits of the people behind --choices into known and held out."""
    choice_kl_coef: float = 0.1
    choice_ridge: float = 0.1


def radius(config: Config, *, dim: int, bound: Scalar, ridge: float = 1.0) -> jax.Array:
    """Confidence radius at the curvature of equally good responses, 1/4.

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
    bar = progress.add_task("theory: simulated bandits", total=len(METHODS))

    def simulate(method: str) -> Any:
        found = jax.block_until_ready(_simulate(config, method))
        progress.advance(bar)
        return found

    # Most of it is compilation, each on one core: side by side.
    with ThreadPoolExecutor(len(METHODS)) as pool:
        simulated = dict(zip(METHODS, pool.map(simulate, METHODS), strict=True))
    metrics = _report(config, simulated, console)
    _figure(config, simulated, output / "theory.png")
    if choices is not None:
        bar = progress.add_task("theory: human choices", total=1)
        metrics |= _human(config, choices, console)
        progress.advance(bar)
    return metrics


def _learner(config: Config, method: str) -> bandit.Learner:
    beta = radius(config, dim=config.dim, bound=config.bound)
    return {
        "offline greedy": bandit.offline_greedy(),
        "offline pessimistic": bandit.offline_gshf_two(radius=beta),
        "online": bandit.gshf(radius=beta),
    }[method]


@partial(jax.jit, static_argnums=(0, 1))
def _simulate(config: Config, method: str) -> Any:
    """Final gap, gap before every round, and whether the set holds theta*: ``[seeds, ...]``."""
    beta = radius(config, dim=config.dim, bound=config.bound)

    def one(key):
        key_problem, key_run = jax.random.split(key)
        problem = bandit.sphere(
            key_problem,
            contexts=config.contexts,
            actions=config.actions,
            dim=config.dim,
            hidden=config.hidden,
            coverage=config.coverage,
            bound=config.bound,
            kl_coef=config.kl_coef,
        )
        run = bandit.simulate(
            key_run,
            problem,
            _learner(config, method),
            rounds=config.rounds,
            batch=config.batch,
            record=bandit.record_gap,
        )
        inside = bandit.in_confidence_set(problem, run.state, radius=beta)
        return run.gap, run.record, inside, bandit.kl(problem.setting, run.log_prob)

    return jax.vmap(one)(jax.random.split(jax.random.key(0), config.seeds))


def _report(config: Config, simulated: dict, console: Console) -> dict[str, results.Metric]:
    rows, metrics = {}, {}
    for method, (gap, _, inside, kl) in simulated.items():
        inside, (low, high) = results.proportion(inside)
        found = {"gap": results.mean(gap), "kl": results.mean(kl), "in_set": inside}
        rows[method] = {
            "J(pi*) - J(pi)": found["gap"],
            "KL(pi||pi0)": found["kl"],
            "theta* in the set": f"{inside.value:.2f} [{low:.2f}, {high:.2f}]",
        }
        metrics |= {f"theory/{method}/{name}": metric for name, metric in found.items()}
    results.print_table(
        f"Theory: {config.rounds * config.batch} comparisons, {config.seeds} seeds",
        rows,
        console=console,
        caption=f"± one standard error; the set is meant to hold theta* with 1 - {config.delta:g}",
    )
    return metrics


def _figure(config: Config, simulated: dict, target: Path) -> None:
    """Gap against the number of comparisons, mean over seeds and its 95 % band."""
    figure, axes = plotting.grid(1, 1, width=4.4, height=3.1)
    seen = config.batch * np.arange(1, config.rounds + 1)
    for method, (final, record, _, _) in simulated.items():
        # The record holds the gap before each round; the first is that of pi0.
        gaps = np.concatenate([np.asarray(record)[:, 1:], np.asarray(final)[:, None]], 1)
        plotting.band(axes[0, 0], seen, gaps, label=method)
    plotting.label(
        axes[0, 0],
        x="comparisons",
        y=r"$J(\pi^*) - J(\hat\pi)$",
        title=f"pi0 gives rare actions {config.coverage / config.actions:.2%} each",
        log="xy",
    )
    axes[0, 0].legend()
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
