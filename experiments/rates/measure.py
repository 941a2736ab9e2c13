"""One problem and one stream of comparisons: gaps, bounds, the realized error, what T1 needs.

Axes: ``seeds``, ``counts`` (numbers of comparisons), ``deltas``.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from rich.console import Console

from experiments.progress import Told
from jax_klrlhf import bandit
from jax_klrlhf.bandit import pessimism
from jax_klrlhf.core import bounds, ellipsoid, uncertainty
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Gap, bounds and confidence set against n, d, B and delta."""

    output: Path = Path("results/rates")
    """Where results.json and rates.png go."""
    seeds: int = 256
    """Independent problems, each with its own data."""
    seed: int = 0
    """Root of all randomness."""
    comparisons: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """The n swept; d, B and delta are swept at the last."""
    fit_from: int = 512
    """Smallest n in the fits of slopes: below it the ridge still matters."""
    dims: tuple[int, ...] = (2, 4, 8, 16)
    """The d swept."""
    bounds: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """The B = ||theta*|| swept."""
    deltas: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.01)
    """The probabilities of failure swept."""
    dim: int = 4
    """d where another number is swept."""
    bound: float = 1.0
    """B where another number is swept."""
    delta: float = 0.1
    """delta where another number is swept; one of --deltas."""
    contexts: int = 8
    actions: int = 8
    kl_coef: float = 0.5
    ridge: float = 1.0
    """lambda, on the scale of a sum over comparisons."""
    constant: float = 1.0
    """C of the radius."""
    smoke: bool = False
    """A few seeds and points, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            seeds=8,
            comparisons=(128, 256, 512),
            fit_from=128,
            dims=(2, 4),
            bounds=(0.5, 1.0),
            deltas=(0.5, 0.1),
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: an interval needs at least two seeds.")
        if self.delta not in self.deltas:
            raise InputError(f"--delta {self.delta}: must be one of --deltas {self.deltas}.")
        if list(self.comparisons) != sorted(set(self.comparisons)) or self.comparisons[0] < 1:
            raise InputError("--comparisons: give positive numbers in increasing order.")
        if sum(n >= self.fit_from for n in self.comparisons) < 2:
            raise InputError(
                f"--fit-from {self.fit_from}: fewer than two of --comparisons are left to fit."
            )
        if not all(0 < delta < 1 for delta in self.deltas):
            raise InputError("--deltas: probabilities strictly between 0 and 1.")


class Pessimist(NamedTuple):
    """One pessimistic policy against its bound; leading axes as in :class:`Measured`."""

    gap: Float[Array, "..."]
    bound: Float[Array, "..."]
    violated: Bool[Array, "..."]  # T1, beyond rounding


class Measured(NamedTuple):
    """One seed; axes ``counts`` and, where the radius depends on it, ``deltas``."""

    greedy: Float[Array, " counts"]
    error: Float[Array, " counts"]  # ||theta_hat - theta*||_Sigma
    needed: Float[Array, " counts"]  # least radius with which every action's bonus covers its error
    radius: Float[Array, "counts deltas"]
    one: Pessimist  # [counts, deltas]
    two: Pessimist  # [counts, deltas]
    one_realized: Pessimist  # [counts]: with the realized error as the radius
    two_realized: Pessimist  # [counts]


def measure(
    key: Key[Array, ""],
    counts: Float[Array, " counts"],
    deltas: Float[Array, " deltas"],
    bound: Scalar,
    *,
    config: Config,
    dim: int,
) -> Measured:
    """One problem and one stream of data, at every number of comparisons and every delta."""
    key_problem, key_data = jax.random.split(key)
    problem = bandit.sphere(
        key_problem,
        contexts=config.contexts,
        actions=config.actions,
        dim=dim,
        kl_coef=config.kl_coef,
        bound=bound,
    )
    setting = problem.setting
    ref = setting.ref_log_prob
    most = max(config.comparisons)
    data = bandit.compare(key_data, problem, ref, ref, batch=most)
    learner = bandit.offline_greedy(ridge=config.ridge)
    empty = learner.init(setting, capacity=most)
    optimum = bandit.optimum(problem)
    nu = pessimism.usual_nu(setting)

    def pessimists(estimate: bandit.Estimate, radius: Array) -> tuple[Pessimist, Pessimist]:
        saddle = pessimism.option_one(setting, estimate, radius=radius, nu=nu)
        pointwise = pessimism.option_two(setting, estimate, radius=radius, nu=nu)
        sigma = estimate.ellipsoid
        given = {"context_prob": setting.context_prob, "nu": nu}
        expected = uncertainty.expected(sigma, setting.features, optimum, **given)
        of_actions = uncertainty.pointwise(sigma, setting.features, optimum, **given)
        bound_one = bounds.offline_expected(expected, radius=radius)
        bound_two = bounds.offline_pointwise(of_actions, radius=radius)
        gap_one, gap_two = bandit.gap(problem, saddle.log_prob), bandit.gap(problem, pointwise)
        # T1 of Option II holds with this divergence added to the gap.
        away = setting.context_prob @ jnp.sum(jnp.exp(optimum) * (optimum - pointwise), -1)
        rounding = 1e-5 * (1 + radius)
        return (
            Pessimist(gap_one, bound_one, gap_one > bound_one + saddle.duality_gap + rounding),
            Pessimist(gap_two, bound_two, gap_two + setting.kl_coef * away > bound_two + rounding),
        )

    def at(count: Array) -> Measured:
        seen = (jnp.arange(most) < count).astype(data.weight.dtype)
        estimate = learner.update(setting, empty, data._replace(weight=seen))
        error = bandit.error(problem, estimate)
        shift = setting.features - pessimism.nu_of_contexts(setting, nu)[:, None, :]
        off = jnp.abs(shift @ (estimate.theta - problem.theta))
        needed = jnp.max(off / ellipsoid.norm(estimate.ellipsoid, shift))
        radius = bounds.radius(
            dim=dim,
            delta=deltas,
            ridge=config.ridge,
            bound=bound,
            curvature=bounds.gamma(2 * bound),
            constant=config.constant,
        )
        one, two = jax.vmap(functools.partial(pessimists, estimate))(radius)
        one_realized, two_realized = pessimists(estimate, error)
        return Measured(
            bandit.gap(problem, learner.policy(setting, estimate)),
            error,
            needed,
            radius,
            one,
            two,
            one_realized,
            two_realized,
        )

    return jax.vmap(at)(counts)


def sweep(config: Config, *, console: Console) -> tuple[dict[int, Measured], dict[float, Measured]]:
    """Every seed at every d (with --bound) and at every B (with --dim); leaves ``[seeds, ...]``."""
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    counts = jnp.asarray(config.comparisons)
    deltas = jnp.asarray(config.deltas)
    by_dim, by_bound = {}, {}
    programs = {}
    with Told(console) as progress:
        task = progress.add_task("rates", total=len(config.dims) + len(config.bounds))

        def run(dim: int, bound: float) -> Measured:
            if dim not in programs:
                one = functools.partial(measure, config=config, dim=dim)
                programs[dim] = jax.jit(
                    lambda keys, bound: jax.lax.map(
                        lambda key: one(key, counts, deltas, bound), keys, batch_size=8
                    )
                )
            measured = jax.tree.map(np.asarray, programs[dim](keys, jnp.asarray(bound)))
            progress.advance(task)
            return measured

        for dim in config.dims:
            by_dim[dim] = run(dim, config.bound)
        for bound in config.bounds:
            same = bound == config.bound and config.dim in by_dim
            by_bound[bound] = by_dim[config.dim] if same else run(config.dim, bound)
            if same:
                progress.advance(task)
    return by_dim, by_bound
