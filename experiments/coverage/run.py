"""Offline, online and hybrid learning against how well pi0 covers the optimum.

All methods are given the same number of comparisons on the same problems. The rare half of the
actions has pi0's probability scaled by the coverage knob, and only rare actions use the hidden
features (see :func:`jax_klrlhf.bandit.sphere`). Two panels: ``hidden`` features, where what pi0
seldom shows must be learned to play well; and none, where it need not be.

Offline: both actions from pi0, then the Gibbs policy of the estimate (greedy), or Options I and II
of 2312.11456, with a practical radius and with the theory's. Online: GSHF with the Option I
enhancer, with pi0 as the enhancer, and the on-policy pair without any exploration (greedy;
2510.24700). Hybrid: half the comparisons offline. Uniform pairs, which no pi0 limits, are the
design of an experimenter who may ask anything.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from rich.console import Console
from rich.progress import Progress

from experiments import plotting, study
from jax_klrlhf import bandit, results
from jax_klrlhf.bandit import pessimism
from jax_klrlhf.core import bounds
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Offline against online against hybrid, over the coverage of pi*."""

    output: Path = Path("results/coverage")
    """Where results.json and coverage.png go."""
    seeds: int = 128
    """Independent problems; every method meets the same ones, at every coverage."""
    seed: int = 0
    """Root of all randomness."""
    coverages: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    """The knob: pi0 gives each rare action coverage / actions."""
    hidden: tuple[int, ...] = (3, 0)
    """Features that only rare actions have, one panel for each number."""
    rounds: int = 16
    """Online rounds (even: hybrid learning spends half of them offline)."""
    batch: int = 64
    """Comparisons a round."""
    contexts: int = 8
    actions: int = 8
    dim: int = 6
    bound: float = 2.0
    """||theta*||."""
    kl_coefs: tuple[float, ...] = (0.2, 0.05)
    """eta, one panel for each: the smaller, the further pi* may go from pi0."""
    radius: float = 1.0
    """Radius of pessimism and of the enhancer, in practice."""
    delta: float = 0.1
    """Probability of failure of the theory's radius, with which Options I and II run as well."""
    ridge: float = 1.0
    smoke: bool = False
    """A few seeds and points, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            seeds=8,
            coverages=(1.0, 0.01),
            hidden=(2,),
            kl_coefs=(0.2,),
            rounds=4,
            batch=32,
            contexts=2,
            actions=4,
            dim=4,
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: a standard error needs at least two seeds.")
        if self.rounds < 2 or self.rounds % 2:
            raise InputError(f"--rounds {self.rounds}: an even number, half of it is offline.")
        if not all(0 < c <= 1 for c in self.coverages):
            raise InputError("--coverages: numbers in (0, 1].")
        if not all(0 <= h < self.dim for h in self.hidden):
            raise InputError(f"--hidden: numbers from 0 to dim - 1 = {self.dim - 1}.")


GREEDY = "offline greedy"
ON_POLICY = "online greedy"
METHODS = (
    GREEDY,
    "offline I",
    "offline II",
    "offline I, theory",  # with the theory's radius, C = 1
    "offline II, theory",
    "online GSHF",
    "online GSHF, pi0",  # pi0 as the enhancer
    ON_POLICY,
    "hybrid GSHF",
    "hybrid GSHF, pi0",
    "uniform",
)


def play(
    key: Key[Array, ""], coverage: Scalar, kl_coef: Scalar, *, hidden: int, config: Config
) -> dict[str, Any]:
    """Gap of every method on the problem of this key, and how well pi0 covers its optimum."""
    key_problem, key_offline, key_hybrid, key_online = jax.random.split(key, 4)
    problem = bandit.sphere(
        key_problem,
        contexts=config.contexts,
        actions=config.actions,
        dim=config.dim,
        kl_coef=kl_coef,
        bound=config.bound,
        coverage=coverage,
        hidden=hidden,
    )
    setting = problem.setting
    ref = setting.ref_log_prob
    total = config.rounds * config.batch
    ridge, radius = config.ridge, config.radius
    theory = bounds.radius(
        dim=config.dim,
        delta=config.delta,
        ridge=ridge,
        bound=config.bound,
        curvature=bounds.gamma(2 * config.bound),
        constant=1.0,
    )

    def online(learner: bandit.Learner, offline: bandit.Duels | None = None) -> Array:
        rounds = config.rounds if offline is None else config.rounds // 2
        return bandit.simulate(
            key_online, problem, learner, rounds=rounds, batch=config.batch, offline=offline
        ).gap

    # One estimate serves all that learn from the same offline data.
    plain = bandit.simulate(
        key_offline, problem, bandit.offline_greedy(ridge=ridge), rounds=1, batch=total
    )

    def pointwise(radius: Scalar) -> Array:
        return bandit.gap(problem, pessimism.option_two(setting, plain.state, radius=radius))

    saddles = jax.vmap(lambda r: pessimism.option_one(setting, plain.state, radius=r).log_prob)(
        jnp.stack([jnp.asarray(radius), theory])
    )
    half = bandit.compare(key_hybrid, problem, ref, ref, batch=total // 2)
    gshf = bandit.gshf(radius=radius, ridge=ridge)
    against_reference = bandit.greedy_against_reference(ridge=ridge)
    gaps = (
        plain.gap,
        bandit.gap(problem, saddles[0]),
        pointwise(radius),
        bandit.gap(problem, saddles[1]),
        pointwise(theory),
        online(gshf),
        online(against_reference),
        online(bandit.greedy(ridge=ridge)),
        online(gshf, half),
        online(against_reference, half),
        online(bandit.uniform(ridge=ridge)),
    )
    return {
        "gap": dict(zip(METHODS, gaps, strict=True)),
        "pi0": bandit.gap(problem, ref),
        "coefficient": bandit.coverage(setting, bandit.optimum(problem), ref, ridge=ridge / total),
    }


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the sweep, draw the figure, print the tables; returns the path of ``results.json``."""
    here = study.begin("coverage", config, console=console)
    config, output, console = here.config, here.output, here.console
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    played: dict[Panel, dict[float, Any]] = {}
    panels = [(hidden, kl_coef) for hidden in config.hidden for kl_coef in config.kl_coefs]
    programs = {
        hidden: jax.jit(
            jax.vmap(functools.partial(play, hidden=hidden, config=config), in_axes=(0, None, None))
        )
        for hidden in config.hidden
    }
    with Progress(console=console) as progress:
        task = progress.add_task("coverage", total=len(panels) * len(config.coverages))
        for hidden, kl_coef in panels:
            played[hidden, kl_coef] = {}
            for coverage in config.coverages:
                outcome = programs[hidden](keys, jnp.asarray(coverage), jnp.asarray(kl_coef))
                played[hidden, kl_coef][coverage] = jax.tree.map(np.asarray, outcome)
                progress.advance(task)
    metrics: dict[str, results.Metric] = {}
    for (hidden, kl_coef), panel in played.items():
        for coverage, outcome in panel.items():
            name = f"hidden={hidden}, kl_coef={kl_coef:g}, coverage={coverage:g}"
            metrics |= _numbers(name, outcome)
        _print(hidden, kl_coef, panel, config, console)
    _figure(played, output / "coverage.png")
    return here.end(metrics, beside="coverage.png")


Panel = tuple[int, float]
"""Hidden features and kl_coef."""


def against(
    gaps: Mapping[str, Float[np.ndarray, " seeds"]], method: str, other: str
) -> results.Metric:
    """``other``'s gap less ``method``'s, paired over problems: positive where method is better."""
    return results.mean(np.asarray(gaps[other], np.float64) - gaps[method])


def _numbers(panel: str, outcome: Any) -> dict[str, results.Metric]:
    gaps = outcome["gap"]
    metrics = {
        f"{panel}/pi0/gap": results.mean(outcome["pi0"]),
        f"{panel}/pi0/coverage coefficient": results.mean(outcome["coefficient"]),
    }
    for method in METHODS:
        metrics[f"{panel}/{method}/gap"] = results.mean(gaps[method])
        if method != GREEDY:
            # A few problems with a large gap can carry a mean: how many does it hold for?
            better, _ = results.proportion(gaps[method] < gaps[GREEDY])
            metrics[f"{panel}/{method}/share of problems better than {GREEDY}"] = better
        for other in (GREEDY, ON_POLICY):
            if method != other:
                metrics[f"{panel}/{method}/gain over {other}"] = against(gaps, method, other)
    return metrics


def _print(
    hidden: int, kl_coef: float, panel: Mapping[float, Any], config: Config, console: Console
) -> None:
    rows: dict[str, dict[str, str]] = {"coefficient": {}, "pi0": {}}
    for coverage, outcome in panel.items():
        column = f"{coverage:g}"
        gaps = outcome["gap"]
        rows["coefficient"][column] = f"{outcome['coefficient'].mean():.1f}"
        rows["pi0"][column] = f"{outcome['pi0'].mean():.3f}"
        for method in METHODS:
            text = f"{gaps[method].mean():.4f}"
            if method != GREEDY:
                gain = against(gaps, method, GREEDY)
                z = gain.value / gain.stderr if gain.stderr else 0.0
                text += " +" if z > 3 else " -" if z < -3 else "  "
            rows.setdefault(method, {})[column] = text
    results.print_table(
        f"Gap after {config.rounds * config.batch} comparisons, {hidden} hidden of {config.dim} "
        f"features, kl_coef {kl_coef:g}, by the coverage knob ({config.seeds} problems)",
        rows,
        console=console,
        caption=f"+ better, - worse than {GREEDY} on the same problems by 3 standard errors; "
        "coefficient: coverage coefficient of pi* by pairs from pi0",
    )


def _figure(played: Mapping[Panel, Mapping[float, Any]], target: Path) -> None:
    shown = {
        GREEDY: ("C0", "-"),
        "offline I": ("C4", "-"),
        "offline II": ("C1", "-"),
        "online GSHF": ("C2", "-"),
        "online GSHF, pi0": ("C5", "-"),
        ON_POLICY: ("C3", "-"),
        "hybrid GSHF": ("C2", "--"),
        "uniform": ("0.5", ":"),
    }
    figure, axes = plotting.grid(2, len(played))
    for column, ((hidden, kl_coef), panel) in enumerate(played.items()):
        knob = list(panel)
        for method, (color, line) in shown.items():
            gaps = np.stack([outcome["gap"][method] for outcome in panel.values()], 1)
            plotting.band(axes[0, column], knob, gaps, label=method, color=color, linestyle=line)
            if method == GREEDY:
                continue
            gains = np.stack(
                [o["gap"][GREEDY].astype(np.float64) - o["gap"][method] for o in panel.values()], 1
            )
            plotting.band(
                axes[1, column],
                knob,
                gains,
                label=method,
                color=color,
                linestyle=line,
                positive=False,
            )
        title = f"{hidden} hidden features, kl_coef {kl_coef:g}"
        plotting.label(axes[0, column], x="coverage knob", y="gap", title=title, log="xy")
        plotting.label(axes[1, column], x="coverage knob", y=f"gain over {GREEDY}", log="x")
        axes[1, column].axhline(0, color="0.4", linewidth=0.8)
    plotting.legend(figure, columns=4)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
