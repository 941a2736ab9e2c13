"""Every pair rule on the exact bandit: which two of n draws should be compared?

The rules are :mod:`jax_klrlhf.core.pairs`'s, the very objects that ``rounds.iterate`` takes for a
language model. Here each is a learner (``bandit.from_rule``): the actions are drawn from its own
policy, the rule picks the pair, nature labels it by Bradley-Terry, the estimate is refitted on all
pairs so far, and the gap of the final policy is exact. So they can be told apart, which no run of a
language model can do at this price.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from rich.console import Console

from experiments import sphere, study
from experiments.progress import Told
from jax_klrlhf import bandit, results
from jax_klrlhf.core import bradley_terry, enhancer, pairs
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The gap of every rule after the same number of comparisons."""

    output: Path = Path("results/rules")
    """Where results.json goes."""
    seeds: int = 48
    """Independent problems; every rule has the same ones."""
    seed: int = 0
    samples: int = 8
    """Actions drawn from the policy at every context."""
    rounds: int = 16
    batch: int = 16
    """Comparisons a round."""
    contexts: int = 8
    actions: int = 8
    dim: int = 6
    hidden: int = 3
    """Features that only rare actions have."""
    coverage: float = 0.03
    """pi0 gives each rare action coverage / actions."""
    bound: float = 2.0
    """||theta*||."""
    kl_coef: float = 0.2
    radius: float = 1.0
    """Of the enhancer's confidence set."""
    smoke: bool = False
    """A few seeds and rounds, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(self, seeds=2, rounds=2, contexts=2, batch=4)

    def check(self) -> None:
        """Refuse what cannot run."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: a standard error needs at least two seeds.")


def learners(config: Config) -> dict[str, Callable[[], bandit.Learner]]:
    """Every rule on n draws; some on all actions; and the learners that are no rule."""
    n, eta = config.samples, config.kl_coef
    drawn = functools.partial(bandit.from_rule, samples=n)
    apo = functools.partial(drawn, curvature=bradley_terry.curvature)
    widest = functools.partial(pairs.most_uncertain, curvature=jnp.ones_like)
    one = pairs.enhancer(kl_coef=eta, radius=config.radius)
    best_of_n = pairs.enhancer(kl_coef=eta, radius=config.radius, option=enhancer.best_of_n)
    return {
        "best and worst": lambda: drawn(pairs.best_worst),
        "best and second": lambda: drawn(pairs.best_second),
        "best and random": lambda: drawn(pairs.best_random),
        "two draws": lambda: drawn(pairs.sampled),
        "first round": lambda: drawn(pairs.first_round),
        "tournament": lambda: drawn(pairs.tournament),
        "most uncertain": lambda: apo(pairs.most_uncertain),
        "most uncertain, no curvature": lambda: drawn(widest),
        "farthest from the mean": lambda: drawn(pairs.uncertain_against),
        "enhancer, tilt": lambda: drawn(one),
        "enhancer, best of n": lambda: drawn(best_of_n),
        "weighted to pi0": lambda: drawn(pairs.against_reference),
        "against draws of pi0": lambda: drawn(pairs.between_agents(), opponent=bandit.reference),
        "all actions: most uncertain": lambda: bandit.most_uncertain(),
        "all actions: enhancer, tilt": lambda: bandit.from_rule(one),
        "learner: greedy": lambda: bandit.greedy(),
        "learner: GSHF": lambda: bandit.gshf(radius=config.radius),
    }


def gap(key: Key[Array, ""], learner: bandit.Learner, config: Config) -> Array:
    """Of the last policy, on the problem of this key."""
    key_problem, key_run = jax.random.split(key)
    problem = sphere.problem(key_problem, config)
    run = bandit.simulate(key_run, problem, learner, rounds=config.rounds, batch=config.batch)
    return run.gap


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run every rule, print the table; returns the path of ``results.json``."""
    here = study.begin("rules", config, console=console)
    config, console = here.config, here.console
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    made = learners(config)
    gaps: dict[str, np.ndarray] = {}
    with Told(console) as progress:
        task = progress.add_task("rules", total=len(made))
        for name, make in made.items():
            one = functools.partial(gap, learner=make(), config=config)
            found = jax.jit(jax.vmap(lambda key, one=one: one(key)))(keys)
            gaps[name] = np.asarray(found, np.float64)
            progress.advance(task)
            progress.console.print(f"{name}: {results.mean(gaps[name])}", highlight=False)
    base = gaps["two draws"]
    rows: dict[str, dict[str, results.Metric | str]] = {}
    for name, found in sorted(gaps.items(), key=lambda item: item[1].mean()):
        rows[name] = {"gap": results.mean(found)}
        if name != "two draws":
            rows[name]["less two draws'"] = results.mean(found - base)
    results.print_table(
        f"{config.rounds} rounds of {config.batch}, {config.samples} draws each",
        rows,
        console=console,
        caption=f"{config.seeds} problems; ± one standard error; the difference is paired",
    )
    metrics = {
        f"rules/{name}/{metric}": number
        for name, row in rows.items()
        for metric, number in row.items()
        if isinstance(number, results.Metric)
    }
    return here.end(metrics, beside="nothing else")


cli = study.entry(main, Config, __doc__)
