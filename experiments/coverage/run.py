"""Offline, online and hybrid learning against how well pi0 covers the optimum.

All methods are given the same number of comparisons on the same problems. The rare half of the
actions has pi0's probability scaled by the coverage knob, and only rare actions use the hidden
features (see :func:`jax_klrlhf.bandit.sphere`). Two panels: ``hidden`` features, where what pi0
seldom shows must be learned to play well; and none, where it need not be.

The estimate's ridge is an axis. It is a prior: lambda = d / B^2 is the precision of theta* itself,
and there "greedy" is nearly the Bayes policy. So every method is run at ridges from far below to
above it, and offline ones with the paper's own constraint, ||theta|| <= B, in the place of a ridge.
Beside them stands the posterior mean (:mod:`experiments.ideal`), the best that can be made of data.

Offline: both actions from pi0, then the Gibbs policy of the estimate (greedy), or Options I and II
of 2312.11456, with a practical radius and with the theory's. Online: GSHF with the Option I
enhancer, with pi0 as the enhancer, and the on-policy pair without any exploration (greedy;
2510.24700). Hybrid: half the comparisons offline. Uniform pairs, which no pi0 limits, are the
design of an experimenter who may ask anything.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from rich.console import Console

from experiments import ideal, plotting, sphere, study
from experiments.progress import Told
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
    coverages: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001)
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
    ridges: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """lambda, on the scale of a sum over comparisons. The first is that of the ball, too."""
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
            ridges=(0.1, 1.0),
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
        if not self.ridges or not all(0 < r < np.inf for r in self.ridges):
            raise InputError("--ridges: positive numbers.")
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
IDEAL = "posterior mean"
IDEALS = ("pi0", IDEAL, f"uniform, {IDEAL}")
"""What no ridge enters: pi0, and the posterior means of the offline and of the uniform pairs."""
BALL = "ball"
IN_BALL = METHODS[:5]
"""The offline methods: of the online ones every refit would be a constrained solve."""


def play(
    key: Key[Array, ""],
    coverage: Scalar,
    kl_coef: Scalar,
    ridge: Scalar,
    *,
    hidden: int,
    ball: bool,
    config: Config,
) -> dict[str, Array]:
    """Gap of every method on the problem of this key.

    In a ``ball``, ||theta|| <= B besides, of :data:`IN_BALL` alone.
    """
    key_problem, key_offline, key_hybrid, key_online = jax.random.split(key, 4)
    problem = sphere.problem(key_problem, config, coverage=coverage, hidden=hidden, kl_coef=kl_coef)
    setting = problem.setting
    ref = setting.ref_log_prob
    total = config.rounds * config.batch
    radius = config.radius
    estimate = {"ridge": ridge, "bound": config.bound if ball else None}
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
        key_offline, problem, bandit.offline_greedy(**estimate), rounds=1, batch=total
    )

    def pointwise(radius: Scalar) -> Array:
        return bandit.gap(problem, pessimism.option_two(setting, plain.state, radius=radius))

    saddles = jax.vmap(lambda r: pessimism.option_one(setting, plain.state, radius=r).log_prob)(
        jnp.stack([jnp.asarray(radius), theory])
    )
    offline = (
        plain.gap,
        bandit.gap(problem, saddles[0]),
        pointwise(radius),
        bandit.gap(problem, saddles[1]),
        pointwise(theory),
    )
    if ball:
        return dict(zip(IN_BALL, offline, strict=True))
    half = bandit.compare(key_hybrid, problem, ref, ref, batch=total // 2)
    gshf = bandit.gshf(radius=radius, **estimate)
    against_reference = bandit.greedy_against_reference(**estimate)
    gaps = (
        *offline,
        online(gshf),
        online(against_reference),
        online(bandit.greedy(**estimate)),
        online(gshf, half),
        online(against_reference, half),
        online(bandit.uniform(**estimate)),
    )
    return dict(zip(METHODS, gaps, strict=True))


def ideals(
    key: Key[Array, ""], coverage: Scalar, kl_coef: Scalar, *, hidden: int, config: Config
) -> dict[str, Array]:
    """What no ridge enters, on the same problem and data; and how well pi0 covers its optimum."""
    key_problem, key_offline, _, key_online = jax.random.split(key, 4)
    problem = sphere.problem(key_problem, config, coverage=coverage, hidden=hidden, kl_coef=kl_coef)
    ref, total = problem.setting.ref_log_prob, config.rounds * config.batch

    def of(key: Key[Array, ""], learner: bandit.Learner, rounds: int) -> Array:
        run = bandit.simulate(key, problem, learner, rounds=rounds, batch=total // rounds)
        best = ideal.policy(
            jax.random.fold_in(key, 1), problem, run.state.history, bound=config.bound
        )
        return bandit.gap(problem, best)

    gaps = (
        bandit.gap(problem, ref),
        of(key_offline, bandit.offline_greedy(), 1),
        of(key_online, bandit.uniform(), config.rounds),
    )
    coefficient = bandit.coverage(problem.setting, bandit.optimum(problem), ref, ridge=1 / total)
    return {**dict(zip(IDEALS, gaps, strict=True)), "coefficient": coefficient}


class Outcome(NamedTuple):
    """Of one panel and coverage; leaves ``[seeds]``."""

    at: dict[str, dict[str, np.ndarray]]
    """Gap of every method, by :func:`estimates`' names."""
    ideal: dict[str, np.ndarray]


def estimates(config: Config) -> dict[str, tuple[float, bool]]:
    """The axis: name -> ridge, and whether ||theta|| <= B besides."""
    axis = {f"ridge={ridge:g}": (ridge, False) for ridge in config.ridges}
    return axis | {BALL: (config.ridges[0], True)}


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the sweep, draw the figure, print the tables; returns the path of ``results.json``."""
    here = study.begin("coverage", config, console=console)
    config = here.config
    played: dict[Panel, dict[float, Outcome]] = {}
    panels = [(hidden, kl_coef) for hidden in config.hidden for kl_coef in config.kl_coefs]
    metrics: dict[str, results.Metric] = {}
    with Told(here.console) as progress:
        total = len(panels) * len(config.coverages) * (len(estimates(config)) + 1)
        task = progress.add_task("coverage", total=total)
        for hidden in config.hidden:
            swept = _programs(config, hidden, lambda: progress.advance(task))
            for kl_coef in config.kl_coefs:
                panel = played.setdefault((hidden, kl_coef), {})
                for coverage in config.coverages:
                    panel[coverage] = outcome = swept(coverage, kl_coef)
                    name = f"hidden={hidden}, kl_coef={kl_coef:g}, coverage={coverage:g}"
                    metrics |= _numbers(name, outcome)
                # So that a run that is broken off leaves its panels.
                here.write(metrics)
    for (hidden, kl_coef), panel in played.items():
        for coverage, outcome in panel.items():
            _print(f"{hidden} hidden, kl_coef {kl_coef:g}, coverage {coverage:g}", outcome, here)
    _figure(config, played, here.output / "coverage.png")
    return here.end(metrics, beside="coverage.png")


def _programs(
    config: Config, hidden: int, advance: Callable[[], None]
) -> Callable[[float, float], Outcome]:
    """``swept(coverage, kl_coef) -> Outcome``, compiled once for all of them."""
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)

    def over_seeds(one: Callable[..., Any], numbers: int) -> Callable[..., Any]:
        return jax.jit(jax.vmap(one, in_axes=(0, *[None] * numbers)))

    programs = {
        ball: over_seeds(functools.partial(play, hidden=hidden, ball=ball, config=config), 3)
        for ball in (False, True)
    }
    best = over_seeds(functools.partial(ideals, hidden=hidden, config=config), 2)

    def swept(coverage: float, kl_coef: float) -> Outcome:
        at = {}
        here = (jnp.asarray(coverage), jnp.asarray(kl_coef))
        for name, (ridge, ball) in estimates(config).items():
            at[name] = jax.tree.map(np.asarray, programs[ball](keys, *here, jnp.asarray(ridge)))
            advance()
        found = Outcome(at, jax.tree.map(np.asarray, best(keys, *here)))
        advance()
        return found

    return swept


Panel = tuple[int, float]
"""Hidden features and kl_coef."""


def against(
    gaps: Mapping[str, Float[np.ndarray, " seeds"]], method: str, other: str
) -> results.Metric:
    """``other``'s gap less ``method``'s, paired over problems: positive where method is better."""
    return results.mean(np.asarray(gaps[other], np.float64) - gaps[method])


def _numbers(panel: str, outcome: Outcome) -> dict[str, results.Metric]:
    metrics = {
        f"{panel}/pi0/coverage coefficient": results.mean(outcome.ideal["coefficient"]),
        **{f"{panel}/{name}/gap": results.mean(outcome.ideal[name]) for name in IDEALS},
    }
    for estimate, gaps in outcome.at.items():
        for method in gaps:
            name = f"{panel}, {estimate}/{method}"
            metrics[f"{name}/gap"] = results.mean(gaps[method])
            if method != GREEDY:
                # A few problems with a large gap can carry a mean: how many does it hold for?
                better, _ = results.proportion(gaps[method] < gaps[GREEDY])
                metrics[f"{name}/share of problems better than {GREEDY}"] = better
            for other in (GREEDY, ON_POLICY):
                if method != other and other in gaps:
                    metrics[f"{name}/gain over {other}"] = against(gaps, method, other)
            if method.startswith("offline"):
                lost = results.mean(np.asarray(gaps[method], np.float64) - outcome.ideal[IDEAL])
                metrics[f"{name}/gap less {IDEAL}'s"] = lost
    return metrics


def _print(title: str, outcome: Outcome, here: study.Study) -> None:
    rows: dict[str, dict[str, str]] = {}
    for estimate, gaps in outcome.at.items():
        for method in gaps:
            text = str(results.mean(gaps[method]))
            if method != GREEDY:
                gain = against(gaps, method, GREEDY)
                z = gain.value / gain.stderr if gain.stderr else 0.0
                text += " +" if z > 3 else " -" if z < -3 else "  "
            rows.setdefault(method, {})[estimate] = text
    for name in IDEALS:
        rows[name] = {"any": str(results.mean(outcome.ideal[name]))}
    config = here.config
    results.print_table(
        f"{title}: gap after {config.rounds * config.batch} comparisons ({config.seeds} problems)",
        rows,
        console=here.console,
        caption=f"+ better, - worse than {GREEDY} in the column, on the same problems, by 3 "
        f"standard errors; ball: ||theta|| <= {config.bound:g}; coverage coefficient of pi* by "
        f"pairs from pi0 {outcome.ideal['coefficient'].mean():.1f}",
    )


def _figure(config: Config, played: Mapping[Panel, Mapping[float, Outcome]], target: Path) -> None:
    """Gap against the ridge, a row for each panel, a column for each coverage."""
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
    figure, axes = plotting.grid(len(played), len(config.coverages))
    ridges = {f"ridge={ridge:g}": ridge for ridge in config.ridges}
    for row, ((hidden, kl_coef), panel) in enumerate(played.items()):
        for column, (coverage, outcome) in enumerate(panel.items()):
            ax = axes[row, column]
            for method, (color, line) in shown.items():
                gaps = np.stack([outcome.at[name][method] for name in ridges], 1)
                x = list(ridges.values())
                plotting.band(ax, x, gaps, label=method, color=color, linestyle=line)
                # The ball stands left of all ridges.
                if method in IN_BALL:
                    inside = outcome.at[BALL][method].mean()
                    ax.plot(config.ridges[0] / 4, inside, "o", color=color, markersize=4)
            best = outcome.ideal[IDEAL].mean()
            ax.axhline(best, color="k", linewidth=0.8, label="offline, posterior mean")
            title = f"{hidden} hidden, kl_coef {kl_coef:g}, coverage {coverage:g}"
            plotting.label(ax, x="ridge (dots: ball)", y="gap", title=title, log="xy")
    plotting.legend(figure, columns=4)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
