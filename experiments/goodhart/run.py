"""Over-optimization, exactly: gold reward against KL for every way to be careful with a proxy.

On bandits of five regimes, and on a transformer whose every response is listed. A reward is
learned from comparisons as an ensemble, made one reward by a rule of `core.aggregate` or changed by
one of `core.reshape`, and optimized exactly under a KL penalty. Everything is compared at equal KL,
where scale does not matter. Gold rewards are over pi0's.

The fact to build it around: J is linear in the reward, so under a right posterior the mean is
optimal and any pessimism must lose; only one-sided misspecification can pay for it.

Gao et al. (arXiv 2210.10760) fit gold against d = sqrt(KL) by d (a - b d) for best-of-n and by
d (a - b log d) for reinforcement learning: both forms are fitted to both of our curves.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import plotting, study
from experiments.exact_lm import world as exact
from experiments.goodhart import worlds
from jax_klrlhf import results
from jax_klrlhf.core import aggregate, measure, reshape
from jax_klrlhf.errors import InputError

AGGREGATES = {
    "single": lambda w: w.members[0],
    "mean": lambda w: aggregate.mean(w.members),
    "minimum": lambda w: aggregate.minimum(w.members),
    "entropic, tau 1": lambda w: aggregate.entropic(w.members, temperature=1.0),
    "mean - variance": lambda w: aggregate.penalized(w.members, variance=1.0),
    "mean - deviation": lambda w: aggregate.penalized(w.members, deviation=1.0),
    "maximum": lambda w: -aggregate.minimum(-w.members),
}


def _quantile(reward, world, level):
    return reshape.quantile(reward, world.ref_log_prob, level=level)


def _log_sigmoid(level, world):
    mean = aggregate.mean(world.members)
    return reshape.log_sigmoid(mean, reference=_quantile(mean, world, level))


def _ceiling(world):
    mean = aggregate.mean(world.members)
    return reshape.ceiling(mean, reference=_quantile(mean, world, 0.85))


def _clip(world):
    mean = aggregate.mean(world.members)
    low, high = (_quantile(mean, world, level) for level in (0.15, 0.85))
    return reshape.clip(mean, low=low, high=high)


TRANSFORMS = {
    "win rate (PAR)": lambda w: reshape.win_rate(aggregate.mean(w.members), w.ref_log_prob),
    "log-sigmoid, 85 %": partial(_log_sigmoid, 0.85),
    "log-sigmoid, 50 %": partial(_log_sigmoid, 0.5),
    "ceiling, 85 %": _ceiling,
    "clip, 15-85 %": _clip,
}
GOLD = {"gold itself": lambda w: w.gold}
GOLD_TRANSFORMS = {
    "gold, win rate (PAR)": lambda w: reshape.win_rate(w.gold, w.ref_log_prob),
    "gold, ceiling 85 %": lambda w: reshape.ceiling(w.gold, reference=_quantile(w.gold, w, 0.85)),
}
RULES = AGGREGATES | TRANSFORMS | GOLD | GOLD_TRANSFORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Gold against KL for aggregates and transforms."""

    output: Path = Path("results/goodhart")
    """Where results.json and goodhart.png go."""
    seeds: int = 64
    """Worlds in each regime."""
    seed: int = 0
    """Root of all randomness."""
    actions: int = 400
    members: int = 8
    labels: int = 60
    """Comparisons that the proxy learns from."""
    divergences: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
    """KL to pi0, in nats."""
    best_of: tuple[int, ...] = (2, 4, 16, 64, 256)
    """Counts of best-of-n by the mean."""
    networks: int = 4
    """Transformers whose responses are listed; each makes a quarter of its regimes' worlds."""
    language_labels: int = 240
    """Comparisons there, whose features have 24 dimensions."""
    smoke: bool = False
    """Eight small worlds, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            seeds=8,
            actions=60,
            members=3,
            labels=40,
            divergences=(0.5, 1.0),
            best_of=(2, 8),
            networks=1,
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: an interval needs at least two worlds.")
        if self.actions < 40 or self.members < 2:
            raise InputError("--actions must be at least 40 and --members at least 2.")
        if not 1 <= self.networks <= self.seeds or self.seeds % self.networks:
            raise InputError(f"--networks {self.networks}: a divisor of --seeds {self.seeds}.")
        if len(self.divergences) < 2 or len(self.best_of) < 2:
            raise InputError("--divergences and --best-of: at least two, for the fitted curves.")
        if min(self.divergences) <= 0:
            raise InputError("--divergences: positive numbers of nats.")


def measured(world: worlds.World, levels: jax.Array, counts: tuple[int, ...]):
    """Gold of every rule at every divergence ``[rules, levels]``, and of best-of-n with its KL."""
    ref = world.ref_log_prob
    proxies = jnp.stack([rule(world) for rule in RULES.values()])
    sweep = lambda proxy: measure.frontier(proxy, world.gold, ref, divergences=levels).gold  # noqa: E731
    mean = aggregate.mean(world.members)
    best = measure.best_of_curve(mean, world.gold, ref, counts=counts)
    return jax.vmap(sweep)(proxies), best.gold, best.divergence


class Fitted(NamedTuple):
    """A curve over d = sqrt(KL), in Gao's two forms: coefficients and mean squared residual."""

    square: np.ndarray
    """a, b and residual of ``d (a - b d)``, for each world."""
    log: np.ndarray
    """Of ``d (a - b log d)``."""


def fitted(divergence: np.ndarray, gold: np.ndarray) -> Fitted:
    """Least squares for each world: ``divergence``, ``gold`` ``[worlds, points]``."""

    def fit(shape) -> np.ndarray:
        found = []
        for spent, worth in zip(divergence, gold, strict=True):
            d = np.sqrt(spent)
            columns = np.stack([d, -d * shape(d)], -1)
            solved = np.linalg.lstsq(columns, worth, rcond=None)[0]
            found.append([*solved, np.mean((columns @ solved - worth) ** 2)])
        return np.array(found)

    return Fitted(fit(lambda d: d), fit(np.log))


def _drawn(config: Config):
    """Name and batched worlds of every regime."""
    sizes = {"members": config.members}
    for number, regime in enumerate(worlds.REGIMES):
        make = worlds.make(regime, actions=config.actions, labels=config.labels, **sizes)
        keys = jax.random.split(jax.random.key(config.seed + number), config.seeds)
        yield regime, jax.jit(jax.vmap(make))(keys)
    small = exact.Config(vocab=5, length=4, prompts=4, sft_steps=200)
    bases = [exact.build(small, seed=config.seed + k) for k in range(config.networks)]
    each = config.seeds // config.networks
    for number, regime in enumerate(worlds.LANGUAGE):
        parts = []
        for k, base in enumerate(bases):
            make = worlds.language(base, regime, labels=config.language_labels, **sizes)
            keys = jax.random.split(jax.random.key(config.seed + 100 * (k + 1) + number), each)
            parts.append(jax.jit(jax.vmap(make))(keys))
        yield regime, jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run every regime, draw the figure, print the tables; the path of ``results.json``."""
    here = study.begin("goodhart", config, console=console)
    config = here.config
    levels = jnp.array(config.divergences)
    found = {}
    # The worlds are arguments: as constants of the program the compiler would work them out.
    judge = jax.jit(
        lambda drawn: jax.lax.map(
            lambda world: measured(world, levels, config.best_of), drawn, batch_size=8
        )
    )
    for regime, drawn in _drawn(config):
        gold, best, spent = jax.tree.map(np.asarray, judge(drawn))
        found[regime] = {name: gold[:, k] for k, name in enumerate(RULES)}, best, spent
        here.console.print(f"{regime}: {config.seeds} worlds")
    metrics = _numbers(config, found)
    _print(config, metrics, list(found), here.console)
    _figure(config, found, here.output / "goodhart.png")
    return here.end(metrics, beside="goodhart.png")


def _against(name: str) -> str | None:
    """What a rule is compared with, world by world."""
    if name in GOLD_TRANSFORMS:
        return "gold itself"
    return None if name in ("mean", "gold itself") else "mean"


def _numbers(config: Config, found) -> dict[str, results.Metric]:
    metrics = {}
    for regime, (gold, best, spent) in found.items():
        for name, values in gold.items():
            base = _against(name)
            for k, level in enumerate(config.divergences):
                at = f"{regime}, KL {level:g}/{name}"
                metrics[f"{at}/gold"] = results.mean(values[:, k])
                if base:
                    gain = values[:, k] - gold[base][:, k]
                    metrics[f"{at}/gain over {base}"] = results.mean(gain)
        reached = np.broadcast_to(np.array(config.divergences), gold["mean"].shape)
        curves = {"Gibbs": fitted(reached, gold["mean"]), "best of n": fitted(spent, best)}
        for name, curve in curves.items():
            for form, numbers in curve._asdict().items():
                at = f"{regime}, {name}/{form}"
                metrics |= {
                    f"{at}/{part}": results.mean(numbers[:, k])
                    for k, part in enumerate(("a", "b", "residual"))
                }
            apart = np.sqrt(curve.log[:, 2]) - np.sqrt(curve.square[:, 2])
            metrics[f"{regime}, {name}/root residual, log less square"] = results.mean(apart)
        for name in AGGREGATES | TRANSFORMS:
            # Stopped where gold is best, which takes gold to know.
            peak = gold[name].max(1) - gold["mean"].max(1)
            metrics[f"{regime}, best KL/{name}/gain over mean"] = results.mean(peak)
            where = np.array(config.divergences)[gold[name].argmax(1)]
            metrics[f"{regime}, best KL/{name}/KL"] = results.mean(where)
        for k, n in enumerate(config.best_of):
            metrics[f"{regime}, best of {n}/mean/gold"] = results.mean(best[:, k])
            metrics[f"{regime}, best of {n}/mean/KL"] = results.mean(spent[:, k])
    return metrics


def _print(config: Config, metrics, regimes: list[str], console: Console) -> None:
    for regime in regimes:
        rows = {}
        for name in RULES:
            base = _against(name)
            rows[name] = {
                f"KL {level:g}": metrics[
                    f"{regime}, KL {level:g}/{name}/" + (f"gain over {base}" if base else "gold")
                ]
                for level in config.divergences
            }
        results.print_table(
            regime, rows, console=console,
            caption="gold over pi0 for mean and gold itself; for the others the paired gain over "
            "them; ± one standard error over worlds",
        )  # fmt: skip


def _figure(config: Config, found, target: Path) -> None:
    figure, axes = plotting.grid(2, len(found))
    for column, (regime, (gold, best, spent)) in enumerate(found.items()):
        for row, names in enumerate((AGGREGATES, {"mean": None} | TRANSFORMS)):
            ax = axes[row, column]
            for name in names:
                plotting.band(ax, config.divergences, gold[name], label=name, positive=False)
            style = {"color": "0.4", "linestyle": "--"}
            ax.plot(config.divergences, gold["gold itself"].mean(0), label="gold itself", **style)
            if row == 0:
                ax.plot(spent.mean(0), best.mean(0), "k.", label="best of n by the mean")
            plotting.label(
                ax, x="KL to pi0 (nats)", y="gold over pi0", title=regime if row == 0 else ""
            )
            ax.legend()
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
