"""Bandit simulation against a plain NumPy/SciPy program of the same learner, seed by seed.

The learner is online GSHF with pi0 as the enhancer (arXiv 2312.11456): ``a1`` from the Gibbs policy
of the ridge maximum-likelihood fit on all data so far, ``a2`` from pi0, refitted after every round.
The plain program is handed the very uniform numbers that the library draws (drawing them is not in
its time), keeps one row per comparison, warm-starts every refit, and comes in three forms:

* L-BFGS-B of SciPy, at its defaults: what one writes first;
* Newton's method written out: what one writes second;
* the same Newton on counted pairs: with the library's own trick, that a pair compared often is one
  row with a count.

Before anything is timed all must agree in float64: the same actions and labels in every round, the
same estimate to 1e-6 (L-BFGS-B stops early by default and is only timed).

The plain program runs on ``--numpy-seeds`` seeds and its time is taken per seed; the library runs
all ``--seeds`` in one program. Contenders take turns, in reversed order every other turn, and
the ratio is formed turn by turn. The refits alone are timed beside, on the recorded counts of the
same run.

Seeds are sharded over JAX's devices, on a CPU one for each core: XLA runs
matrices this small on a single core. The plain program runs in one process, so the ratio is
reported both as it is and as it would be at best with a process on every core. NumPy's own threads
are as the environment sets them; ``OPENBLAS_NUM_THREADS=1`` is quicker for matrices this small, so
set it.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, Key
from rich.console import Console

from experiments import study
from experiments.benchmarks import paired
from jax_klrlhf import bandit, results
from jax_klrlhf.bandit import history, refit
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Benchmark bandit simulation."""

    output: Path = Path("results/benchmarks/bandit")
    """Where results.json goes."""
    seeds: int = 256
    """Seeds that the library runs at once."""
    numpy_seeds: int = 4
    """Seeds that the plain program runs, one after the other; its time is per seed."""
    rounds: int = 100
    batch: int = 32
    """Comparisons a round."""
    contexts: int = 16
    actions: int = 8
    dim: int = 16
    kl_coef: float = 0.5
    ridge: float = 1.0
    turns: int = 5
    """Timed turns of every contender."""
    seed: int = 0
    devices: int = 0
    """CPU devices that JAX is asked for; 0: one for each core. Accelerators are all used."""
    smoke: bool = False
    """A few seeds and rounds, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, seeds=8, numpy_seeds=2, rounds=6, batch=8, contexts=2, actions=4, dim=4, turns=2
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if not 1 <= self.numpy_seeds <= self.seeds:
            raise InputError(f"--numpy-seeds {self.numpy_seeds}: from 1 to --seeds {self.seeds}.")
        if self.turns < 2:
            raise InputError(f"--turns {self.turns}: a spread needs at least two.")
        pairs = self.contexts * self.actions * (self.actions - 1) // 2
        if pairs > self.rounds * self.batch:
            raise InputError(
                f"{pairs} pairs of actions against {self.rounds * self.batch} comparisons: the "
                "refits are timed on counted pairs; lower --contexts or --actions."
            )
        if self.seeds % len(jax.devices()):
            raise InputError(
                f"--seeds {self.seeds}: not a multiple of {len(jax.devices())} devices."
            )


# The plain program. Everything is float64 NumPy; one seed at a time.


class World(NamedTuple):
    """What the plain program reads of a problem."""

    features: Float[np.ndarray, "contexts actions dim"]
    ref_prob: Float[np.ndarray, "contexts actions"]
    context_prob: Float[np.ndarray, " contexts"]
    reward: Float[np.ndarray, "contexts actions"]
    kl_coef: float


class Draws(NamedTuple):
    """Uniform numbers of one seed."""

    context: Float[np.ndarray, "rounds batch"]
    actions: Float[np.ndarray, "rounds 2 batch"]
    label: Float[np.ndarray, "rounds batch"]


class Played(NamedTuple):
    """One seed: the estimate after every round, and what was compared with what outcome."""

    theta: Float[np.ndarray, "rounds dim"]
    first: Int[np.ndarray, "rounds batch"]
    second: Int[np.ndarray, "rounds batch"]
    label: Float[np.ndarray, "rounds batch"]


Solver = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]


def plain_run(world: World, draws: Draws, *, ridge: float, solver: Solver, counted: bool) -> Played:
    """The learner, written plainly."""
    rounds = len(draws.label)
    actions, dim = world.features.shape[1:]
    theta = np.zeros(dim)
    rows_z: list[np.ndarray] = []
    rows_y: list[np.ndarray] = []
    low, high = np.triu_indices(actions, 1)
    pair_of = np.zeros((actions, actions), int)
    pair_of[low, high] = pair_of[high, low] = np.arange(len(low))
    pair_z = (world.features[:, low] - world.features[:, high]).reshape(-1, dim)
    wins, losses = np.zeros(len(pair_z)), np.zeros(len(pair_z))
    thetas, firsts, seconds, labels = [], [], [], []
    for t in range(rounds):
        context = np.searchsorted(np.cumsum(world.context_prob), draws.context[t], side="right")
        weight = world.ref_prob * np.exp(world.features @ theta / world.kl_coef)
        policy = weight / weight.sum(1, keepdims=True)
        first = choose(policy[context], draws.actions[t, 0])
        second = choose(world.ref_prob[context], draws.actions[t, 1])
        margin = world.reward[context, first] - world.reward[context, second]
        y = (draws.label[t] < 1 / (1 + np.exp(-margin))).astype(float)
        if counted:
            pair = context * len(low) + pair_of[first, second]
            won_low = np.where(first < second, y, 1 - y)
            told = first != second
            np.add.at(wins, pair[told], won_low[told])
            np.add.at(losses, pair[told], 1 - won_low[told])
            theta = newton_counted(pair_z, wins, losses, theta, ridge)
        else:
            rows_z.append(world.features[context, first] - world.features[context, second])
            rows_y.append(y)
            theta = solver(np.concatenate(rows_z), np.concatenate(rows_y), theta, ridge)
        thetas.append(theta)
        firsts.append(first)
        seconds.append(second)
        labels.append(y)
    return Played(*(np.stack(x) for x in (thetas, firsts, seconds, labels)))


def choose(prob: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """One action for each row, by inversion of the distribution function."""
    cumulative = prob.cumsum(1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:] * (1 - 1e-15)).sum(1)


def newton(z: np.ndarray, y: np.ndarray, theta: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge logistic regression by Newton's method, from the last estimate."""
    return newton_counted(z, y, 1 - y, theta, ridge)


def newton_counted(
    z: np.ndarray, wins: np.ndarray, losses: np.ndarray, theta: np.ndarray, ridge: float
) -> np.ndarray:
    """The same on rows with counts of wins and losses."""
    count = wins + losses
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ theta))
        gradient = z.T @ (count * p - wins) + ridge * theta
        hessian = (z * (count * p * (1 - p))[:, None]).T @ z + ridge * np.eye(len(theta))
        step = np.linalg.solve(hessian, gradient)
        theta = theta - step
        # Quadratic convergence: the error left is about the square.
        if np.abs(step).max() < 1e-6:
            break
    return theta


def lbfgs(z: np.ndarray, y: np.ndarray, theta: np.ndarray, ridge: float) -> np.ndarray:
    """The same by SciPy's L-BFGS-B at its defaults."""
    sign = 2 * y - 1

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (z @ theta)
        slope = -sign / (1 + np.exp(margin))
        value = np.logaddexp(0, -margin).sum() + 0.5 * ridge * theta @ theta
        return value, z.T @ slope + ridge * theta

    return scipy.optimize.minimize(loss, theta, jac=True, method="L-BFGS-B").x


PLAIN: dict[str, tuple[Solver, bool]] = {
    "SciPy L-BFGS-B": (lbfgs, False),
    "NumPy Newton": (newton, False),
    "NumPy Newton, counted": (newton, True),
}


# The library's program, and what it takes to compare the two.


def make_problem(config: Config) -> bandit.Problem:
    """One problem for all seeds."""
    return bandit.sphere(
        jax.random.key(config.seed),
        contexts=config.contexts,
        actions=config.actions,
        dim=config.dim,
        kl_coef=config.kl_coef,
    )


def world_of(problem: bandit.Problem) -> World:
    """The problem in float64 NumPy."""
    s = problem.setting
    arrays = (s.features, jnp.exp(s.ref_log_prob), s.context_prob, problem.reward)
    return World(*(np.asarray(x, np.float64) for x in arrays), kl_coef=float(s.kl_coef))


def draws_of(keys: Key[Array, " seeds"], config: Config, dtype) -> list[Draws]:
    """The uniform numbers that `simulate` draws from these keys."""

    def one(key: Key[Array, ""]) -> tuple[Array, ...]:
        def of_round(index: Array) -> tuple[Array, ...]:
            context, propose, label = jax.random.split(jax.random.fold_in(key, index), 3)
            return (
                jax.random.uniform(context, (config.batch,), dtype),
                jax.random.uniform(propose, (2, config.batch), dtype),
                jax.random.uniform(label, (config.batch,), dtype),
            )

        return jax.vmap(of_round)(jnp.arange(config.rounds))

    drawn = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(jax.vmap(one))(keys))
    return [Draws(*(leaf[k] for leaf in drawn)) for k in range(len(keys))]


def disagreement(config: Config) -> float:
    """Largest difference of any estimate between the library and the plain Newtons, in float64.

    RuntimeError where an action or a label differs, or an estimate by more than 1e-6: then the
    timing would compare two different things.
    """
    with jax.enable_x64(True):
        problem = jax.tree.map(_widen, make_problem(config))
        keys = jax.random.split(jax.random.key(config.seed + 1), config.numpy_seeds)
        learner = bandit.greedy_against_reference(ridge=config.ridge)

        def run(key: Key[Array, ""]):
            return bandit.simulate(
                key,
                problem,
                learner,
                rounds=config.rounds,
                batch=config.batch,
                record=lambda _, this: (this.state.theta, this.data),
            )

        ran = jax.jit(jax.vmap(run))(keys)
        thetas, data = jax.tree.map(np.asarray, ran.record)
        thetas = np.concatenate([thetas[:, 1:], np.asarray(ran.state.theta)[:, None]], 1)
        worst = 0.0
        for k, draws in enumerate(draws_of(keys, config, jnp.float64)):
            for name, (solver, counted) in PLAIN.items():
                if solver is lbfgs:
                    continue
                plain = plain_run(
                    world_of(problem), draws, ridge=config.ridge, solver=solver, counted=counted
                )
                same = (
                    np.array_equal(plain.first, data.first[k])
                    and np.array_equal(plain.second, data.second[k])
                    and np.array_equal(plain.label, data.label[k])
                )
                worst = max(worst, float(np.abs(plain.theta - thetas[k]).max()))
                if not same or worst > 1e-6:
                    raise RuntimeError(
                        f"{name} and the library disagree on seed {k}: actions and labels "
                        f"{'equal' if same else 'differ'}, estimates by {worst:.2g}."
                    )
    return worst


def _widen(leaf: Array) -> Array:
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def main(config: Config, *, console: Console | None = None) -> Path:
    """Check that the contenders agree, time them, print the table and write ``results.json``."""
    here = study.begin("benchmarks/bandit", config, console=console)
    config = here.config
    worst = disagreement(config)
    problem = make_problem(config)
    world = world_of(problem)
    keys = jax.random.split(jax.random.key(config.seed + 1), config.seeds)
    plain_draws = draws_of(keys[: config.numpy_seeds], config, jnp.float32)

    def simulation(learner: bandit.Learner, **extra):
        def run(key: Key[Array, ""]):
            return bandit.simulate(
                key, problem, learner, rounds=config.rounds, batch=config.batch, **extra
            )

        return _over_seeds(run)

    learner = bandit.greedy_against_reference(ridge=config.ridge)
    recorded = simulation(learner, record=lambda _, this: this.state.history)(keys)
    # The record is of the state before each round: shift it, and add the end.
    counts = jax.tree.map(
        lambda before, end: jnp.concatenate([before[:, 1:], end[:, None]], 1),
        recorded.record,
        recorded.state.history,
    )
    refits = _over_seeds(lambda tallies: _refits(problem, tallies, config.ridge))
    library = simulation(learner)

    def plainly(solver: Solver, counted: bool) -> None:
        for draws in plain_draws:
            plain_run(world, draws, ridge=config.ridge, solver=solver, counted=counted)

    contenders: dict[str, Callable[[], object]] = {
        name: (lambda solver=solver, counted=counted: plainly(solver, counted))
        for name, (solver, counted) in PLAIN.items()
    }
    contenders |= {
        LIBRARY: lambda: library(keys),
        REFITS: lambda: refits(counts),
    }
    times = paired.alternate(contenders, turns=config.turns)
    metrics = {"agreement/float64/largest difference": results.Metric(worst)}
    metrics |= _numbers(config, times)
    steps, hessians = (np.asarray(count) for count in refits(counts))
    metrics["refits/steps/per refit"] = results.mean(steps.mean(1))
    metrics["refits/Hessians/per refit"] = results.mean(hessians.mean(1))
    _print(config, metrics, here.console)
    machine = paired.machine()
    here.console.print(f"machine: {machine}")
    return here.end(metrics, facts={**machine, "threads": _threads()}, beside=None)


LIBRARY, REFITS = "jax_klrlhf", "jax_klrlhf, refits alone"


def _refits(problem: bandit.Problem, tallies: history.History, ridge: float) -> tuple[Array, Array]:
    """Every round's refit and nothing else; the steps and the Hessians of each."""
    dim = problem.setting.features.shape[-1]

    def one(theta: Array, tally: history.History) -> tuple[Array, tuple[Array, Array]]:
        rows = history.view(tally)
        differences = history.differences(problem.setting, tally)
        fit = refit.newton(differences, rows.wins, rows.losses, theta, ridge=ridge)
        return fit.theta, (fit.iterations, fit.hessians)

    start = jnp.zeros(dim, problem.setting.features.dtype)
    theta, (iterations, hessians) = jax.lax.scan(one, start, tallies)
    # The estimate must be used, or the last refit need not be computed.
    return iterations + jnp.where(jnp.isnan(theta).any(), 1, 0), hessians


def _numbers(config: Config, times: dict[str, paired.Times]) -> dict[str, results.Metric]:
    per_seed = {
        name: paired.Times(
            t.first, t.turns / (config.numpy_seeds if name in PLAIN else config.seeds)
        )
        for name, t in times.items()
    }
    metrics: dict[str, results.Metric] = {}
    for name, t in per_seed.items():
        metrics[f"time/{name}/ms per seed"] = results.mean(1e3 * t.turns)
        metrics[f"time/{name}/seeds per second"] = paired.rate(1.0, t)
    for name in PLAIN:
        metrics[f"ratio/{LIBRARY} to {name}/times"] = paired.ratio(
            per_seed[name], per_seed[LIBRARY]
        )
    straightforward = [name for name, (_, counted) in PLAIN.items() if not counted]
    best = min(straightforward, key=lambda name: np.median(per_seed[name].turns))
    metrics["ratio/headline: the faster plain form/times"] = paired.ratio(
        per_seed[best], per_seed[LIBRARY]
    )
    headline = metrics["ratio/headline: the faster plain form/times"]
    cores = _cores()
    metrics["ratio/headline, the plain form on every core at best/times"] = results.Metric(
        headline.value / cores, headline.stderr and headline.stderr / cores, headline.n
    )
    metrics["share/refits of the library's time/fraction"] = paired.ratio(
        per_seed[REFITS], per_seed[LIBRARY]
    )
    for name in (LIBRARY, REFITS):
        metrics[f"compile/{name}/seconds"] = paired.compile_seconds(times[name])
    return metrics


def _print(config: Config, metrics: dict[str, results.Metric], console: Console) -> None:
    rows: dict[str, dict[str, results.Metric | str]] = {}
    for name in (*PLAIN, LIBRARY, REFITS):
        row: dict[str, results.Metric | str] = {"ms per seed": metrics[f"time/{name}/ms per seed"]}
        if name in PLAIN:
            times = metrics[f"ratio/{LIBRARY} to {name}/times"]
            row["library is faster by"] = f"{times.value:.0f} ± {times.stderr or 0:.0f}"
        else:
            row["compile, s"] = f"{metrics[f'compile/{name}/seconds'].value:.1f}"
        rows[name] = row
    share = metrics["share/refits of the library's time/fraction"]
    headline = metrics["ratio/headline: the faster plain form/times"]
    results.print_table(
        f"{config.rounds} rounds of {config.batch}, d = {config.dim}, {config.contexts} x "
        f"{config.actions}: {config.seeds} seeds at once against {config.numpy_seeds} in turn",
        rows,
        console=console,
        caption=f"± one standard error over {config.turns} turns; one process of each; the library "
        f"on {len(jax.devices())} device(s)",
    )
    steps, hessians = (metrics[f"refits/{name}/per refit"] for name in ("steps", "Hessians"))
    at_best = metrics["ratio/headline, the plain form on every core at best/times"]
    console.print(
        f"headline: {headline.value:.0f} ± {headline.stderr or 0:.0f} times the faster plain form "
        f"(target 100), {at_best.value:.0f} if that ran on all {_cores()} cores"
    )
    console.print(
        f"refits: {100 * share.value:.0f} % of the library's time, "
        f"{steps.value:.2f} steps with {hessians.value:.2f} Hessians each"
    )


def _over_seeds(run: Callable) -> Callable:
    """``run`` for every seed, the seeds dealt out to the devices.

    By `shard_map`: where the compiler divides the program, the devices' loops wait for each other
    in every Newton step.
    """
    mesh = jax.make_mesh((len(jax.devices()),), ("seeds",), axis_types=(AxisType.Auto,))
    seeds = PartitionSpec("seeds")
    many = jax.shard_map(jax.vmap(run), mesh=mesh, in_specs=seeds, out_specs=seeds, check_vma=False)
    return jax.jit(many)


def _cores() -> int:
    """Cores that this process may use, rounded down to a power of two, which divides the seeds."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 << ((found or 1).bit_length() - 1)


def _threads() -> dict[str, str | None]:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "XLA_FLAGS")
    return {name: os.environ.get(name) for name in names}


def _devices(config: Config) -> None:
    """Read once, when JAX first looks for devices: nothing before this may do so."""
    jax.config.update("jax_num_cpu_devices", config.devices or _cores())


cli = study.entry(main, Config, __doc__, first=_devices)

if __name__ == "__main__":
    cli()
