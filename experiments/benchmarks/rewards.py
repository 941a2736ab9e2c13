"""Two speeds of the reward side: an ensemble of heads, and people found by EM on many seeds.

* *Heads*: eight rewards of one trunk (`models.heads`) against one (`models.reward`), scoring the
  same responses, forward only and with the gradient of trunk and heads.
* *EM*: `core.mixture.fit` on all seeds in one program against the same program called seed by seed,
  and against the same EM written plainly in NumPy (Newton's method for each group), whose time is
  taken per seed. In float64 the plain one and ours must first agree, from the same start.

Contenders take turns, in reversed order every other turn; a ratio is formed turn by turn.

    python -m experiments.benchmarks.rewards
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

from experiments import study
from experiments.benchmarks import aloud, paired
from jax_klrlhf import models, results
from jax_klrlhf.core import mixture
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import heads
from jax_klrlhf.models import reward as single
from jax_klrlhf.models.reward import RewardParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Benchmark heads and EM."""

    output: Path = Path("results/benchmarks/rewards")
    """Where results.json goes."""
    members: int = 8
    """Heads on one trunk."""
    batch: int = 8
    """Prompts, of 64 tokens each."""
    samples: int = 4
    """Responses to each."""
    length: int = 64
    """Tokens of each response."""
    width: int = 256
    """Hidden size."""
    layers: int = 4
    seeds: int = 256
    """Data sets for EM in one program."""
    plain_seeds: int = 4
    """Of which the contenders that go seed by seed run so many; their time is per seed."""
    users: int = 40
    each: int = 12
    """Comparisons of each person."""
    dim: int = 6
    groups: int = 2
    steps: int = 20
    """Steps of EM."""
    turns: int = 7
    """Timed turns of every contender."""
    seed: int = 0
    smoke: bool = False
    """Toy sizes, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, batch=2, samples=2, length=8, width=16, layers=1, seeds=4, plain_seeds=2,
            users=6, each=4, dim=2, steps=3, turns=2,
        )  # fmt: skip

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if not 1 <= self.plain_seeds <= self.seeds:
            raise InputError(f"--plain-seeds {self.plain_seeds}: from 1 to --seeds {self.seeds}.")
        if self.turns < 2:
            raise InputError(f"--turns {self.turns}: a spread needs at least two.")


def scorers(config: Config) -> dict[str, Callable[[], object]]:
    """One head and several, forward and with the gradient, on the same responses."""
    model = models.language_model(
        models.ModelConfig(
            vocab_size=512,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            layers=config.layers,
            heads=4,
            kv_heads=2,
            head_dim=config.width // 4,
            max_length=64 + config.length,
        )
    )
    keys = jax.random.split(jax.random.key(config.seed), 4)
    trunk = jax.jit(model.init)(keys[0])
    several = heads.init(keys[1], members=config.members, dim=config.width)
    shape = (config.batch, config.samples)
    prompts = Ragged(
        jax.random.randint(keys[2], (config.batch, 64), 1, 512), jnp.full(config.batch, 64)
    )
    responses = Ragged(
        jax.random.randint(keys[3], (*shape, config.length), 1, 512),
        jnp.full(shape, config.length),
    )
    one, many = RewardParams(trunk, several[0]), RewardParams(trunk, several)
    score_one, score_many = partial(single.reward, model), partial(heads.rewards, model)

    def slope(score):
        return jax.jit(jax.grad(lambda params: jnp.sum(score(params, prompts, responses))))

    return {
        "one head": partial(jax.jit(score_one), one, prompts, responses),
        f"{config.members} heads": partial(jax.jit(score_many), many, prompts, responses),
        "one head, gradient": partial(slope(score_one), one),
        f"{config.members} heads, gradient": partial(slope(score_many), many),
    }


def people(key: Array, config: Config) -> tuple[Array, Array, Array]:
    """Differences, labels and user ids of one seed: groups of people with a theta each."""
    keys = jax.random.split(key, 3)
    user = jnp.repeat(jnp.arange(config.users), config.each)
    theta = 2 * jax.random.normal(keys[0], (config.groups, config.dim))
    z = jax.random.normal(keys[1], (user.size, config.dim))
    margin = jnp.sum(theta[user % config.groups] * z, -1)
    y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(margin))
    return z, y.astype(z.dtype), user


def found(key: Array, config: Config) -> mixture.Mixture:
    """Data of a seed, and its groups by the library."""
    key_data, key_fit = jax.random.split(key)
    return mixture.fit(
        key_fit, *people(key_data, config), groups=config.groups, users=config.users, ridge=1.0,
        starts=1, steps=config.steps,
    )  # fmt: skip


def plain(
    z: Float[np.ndarray, "n dim"],
    y: Float[np.ndarray, " n"],
    user: np.ndarray,
    share: Float[np.ndarray, "users groups"],
    *,
    steps: int,
) -> Float[np.ndarray, "groups dim"]:
    """The same EM in plain NumPy, from responsibilities: ridge 1, Newton from the last estimate."""
    users, groups = share.shape
    theta, weight = np.zeros((groups, z.shape[1])), np.full(groups, 1 / groups)

    def improve() -> None:
        nonlocal weight
        for g in range(groups):
            own = share[user, g]
            for _ in range(50):
                p = 1 / (1 + np.exp(-z @ theta[g]))
                gradient = z.T @ (own * (p - y)) + theta[g]
                hessian = (z * (own * p * (1 - p))[:, None]).T @ z + np.eye(z.shape[1])
                step = np.linalg.solve(hessian, gradient)
                theta[g] -= step
                if np.abs(step).max() < 1e-10:
                    break
        weight = (share.sum(0) + 1 / groups) / (users + 1)

    for _ in range(steps):
        improve()
        margin = z @ theta.T
        each = -np.logaddexp(0, np.where(y[:, None] > 0.5, -margin, margin))
        joint = np.log(weight)[None] + np.zeros((users, groups))
        np.add.at(joint, user, each)
        share = np.exp(joint - np.logaddexp.reduce(joint, 1)[:, None])
    improve()
    return theta


def start_of(key: Array, config: Config) -> np.ndarray:
    """The responsibilities that :func:`core.mixture.fit` begins with, at one start."""
    noise = jax.random.normal(
        jax.random.split(jax.random.split(key)[1], 1)[0], (config.users, config.groups)
    )
    return np.asarray(jax.nn.softmax(3 * noise, axis=-1), np.float64)


def disagreement(config: Config) -> float:
    """Largest difference of any theta between ours and the plain one, in float64.

    RuntimeError where it is above 1e-4: then the timing would compare two different things.
    """
    with jax.enable_x64(True):
        worst = 0.0
        for key in jax.random.split(jax.random.key(config.seed), config.plain_seeds):
            z, y, user = (np.asarray(x) for x in people(jax.random.split(key)[0], config))
            ours = np.asarray(found(key, config).theta)
            other = plain(z, y, user, start_of(key, config), steps=config.steps)
            worst = max(worst, float(np.abs(ours - other).max()))
    if worst > 1e-4:
        raise RuntimeError(f"the plain EM and the library disagree by {worst:.2g}.")
    return worst


def _as_numpy(key: Array, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    differences, labels, user = people(jax.random.split(key)[0], config)
    start = np.asarray(start_of(key, config))
    return np.asarray(differences, float), np.asarray(labels, float), np.asarray(user), start


def searchers(config: Config) -> dict[str, Callable[[], object]]:
    """EM on all seeds at once, and seed by seed."""
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    few = keys[: config.plain_seeds]
    together, alone = (
        jax.jit(jax.vmap(lambda k: found(k, config))),
        jax.jit(partial(found, config=config)),
    )
    data = [_as_numpy(k, config) for k in few]
    return {
        "one program": partial(together, keys),
        "seed by seed": lambda: [alone(k) for k in few],
        "NumPy": lambda: [plain(*seed, steps=config.steps) for seed in data],
    }


def main(config: Config, *, console: Console | None = None) -> Path:
    """Check, time, print the tables and write ``results.json``."""
    here = study.begin("benchmarks/rewards", config, console=console)
    config = here.config
    metrics = {"EM/disagreement": results.Metric(disagreement(config))}
    rows: dict[str, dict[str, results.Metric | str]] = {}
    contenders = aloud.contenders(here.console, scorers(config))
    times = paired.alternate(contenders, turns=config.turns)
    scored = config.batch * config.samples
    for name, taken in times.items():
        metrics[f"heads/{name}/responses_per_second"] = paired.rate(scored, taken)
    for suffix in ("", ", gradient"):
        costs = paired.ratio(times[f"{config.members} heads{suffix}"], times[f"one head{suffix}"])
        metrics[f"heads/{config.members} heads{suffix}/times one head"] = costs
        rows[f"{config.members} heads{suffix}"] = {"cost, in single heads": costs}
    times = paired.alternate(aloud.contenders(here.console, searchers(config)), turns=config.turns)
    counts = {"one program": config.seeds, "seed by seed": config.plain_seeds}
    each = {
        name: paired.Times(taken.first, taken.turns / counts.get(name, config.plain_seeds))
        for name, taken in times.items()
    }
    for name, taken in each.items():
        metrics[f"EM/{name}/seeds_per_second"] = paired.rate(1, taken)
        if name != "one program":
            faster = paired.ratio(taken, each["one program"])
            metrics[f"EM/one program/times {name}"] = faster
            rows[f"EM on {config.seeds} seeds in one program, against {name}"] = {
                "times faster": faster
            }
    metrics["EM/one program/compile_seconds"] = paired.compile_seconds(times["one program"])
    machine = paired.machine()
    aloud.markdown(
        f"**Rewards** ({machine['processor']}, load average {machine['load_average']}; "
        f"{config.turns} rounds in turn, ± is the standard error)",
        rows,
        here.console,
    )
    return here.end(metrics, beside="the table")


cli = study.entry(main, Config, __doc__)

if __name__ == "__main__":
    cli()
