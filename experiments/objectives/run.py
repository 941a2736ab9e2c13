r"""Which objective: gold reward against KL at equal samples, every family, with intervals.

Three worlds, each loss on K draws of the policy per context and step (:mod:`.methods`):

- **bandit**: small linear bandits, a tabular policy; every number exact, over problems;
- **language**: a transformer whose every response is listed (`experiments/exact_lm`), over rewards;
- **model** (``--model``, ``--sentiment``, ``--prompts``): a pretrained model at default settings,
  gold reward and KL estimated on held-out prompts, over seeds; and what the health check said.

For the exact worlds, at the end: J(pi*) - J(pi) at the loss's own ``kl_coef``; reward less that of
the Gibbs law of equal KL (never negative); total variation to the Gibbs law and to the forward
KL's; and how far the law moved in the last fourth of the steps, which says if it had arrived.
Inference has no loss: best-of-n at n = K is an exact row.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments import plotting, study
from experiments.exact_lm import world as exact_lm
from experiments.objectives import exact, worlds
from experiments.objectives.methods import METHODS
from experiments.progress import Told
from jax_klrlhf import results
from jax_klrlhf.core import choices, targets
from jax_klrlhf.errors import InputError

Panel = dict[str, dict[str, np.ndarray]]
"""Method, metric, values ``[coefs, seeds]``."""
SHOWN = ("gap", "reward", "KL", "below the frontier", "TV to Gibbs", "TV to forward KL",
         "moved in the last fourth")  # fmt: skip
BEST_OF = "best of K (no training)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train every loss at every coefficient on the same problems."""

    output: Path = Path("results/objectives")
    """Where results.json and the figure go."""
    smoke: bool = False
    """A toy size that ends in half a minute: nothing is learned."""
    seed: int = 0
    seeds: int = 16
    """Problems of the bandit; every loss sees the same."""
    language_seeds: int = 8
    """Rewards on the exact language bandit; 0 leaves it out."""
    kl_coefs: tuple[float, ...] = (0.2, 0.5, 1.0)
    """Of the bandit."""
    language_kl_coef: float = 0.5
    contexts: int = 8
    actions: int = 12
    dim: int = 6
    bound: float = 3.0
    """Norm of theta*: rewards lie between plus and minus it."""
    coverage: float = 0.3
    """Of the rarer half of the actions by pi0; 1 is a uniform pi0."""
    samples: int = 8
    """Draws at each context and step, K."""
    steps: int = 800
    learning_rate: float = 0.03
    """Of Adam on the logits; falls linearly to 0."""
    language_steps: int = 240
    language_learning_rate: float = 3e-3
    language_size: exact_lm.Config = dataclasses.field(
        default_factory=lambda: exact_lm.Config(vocab=4, length=4)
    )
    """121 responses of at most four tokens."""
    only: str = ""
    """Methods whose name has this text."""

    model: str | None = None
    """Folder of a pretrained model: adds the third world."""
    sentiment: Path | None = None
    """Folder with positive.txt and negative.txt: its gold reward."""
    prompts: Path | None = None
    """Stories, whose first sentences are the prompts."""
    model_seeds: int = 3
    model_steps: int = 20
    """Draws, each followed by one step."""
    model_learning_rate: float = 1e-3
    model_methods: tuple[str, ...] = (
        "f-DPG, forward KL", "DPO", "regression (PRDP, VarGrad)", "RLOO",
        "GRPO (k3 as a loss, by std)", "DAPO (no KL)", "pass@K, KL priced",
        "win rates (SPPO, pi0 fixed)", "best of K and k2 (SuperHF)",
    )  # fmt: skip
    """One of every family, and the published forms of two."""
    model_kl_coef: float = 0.1
    """The default of klrlhf iterate."""
    model_prompts: int = 16
    """Prompts of a draw."""
    model_tokens: int = 24
    """Tokens of a response."""

    def resized(self) -> "Config":
        """This, or the small size if it was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, seeds=4, kl_coefs=(0.5,), contexts=2, actions=4, dim=3, samples=4, steps=60,
            language_seeds=0,
        )  # fmt: skip

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2 or self.language_seeds == 1 or self.model_seeds < 2:
            raise InputError("--seeds: a standard error needs at least two.")
        coefs = (*self.kl_coefs, self.language_kl_coef, self.model_kl_coef)
        if not self.kl_coefs or not all(0 < c < np.inf for c in coefs):
            raise InputError("--kl-coefs: positive numbers.")
        if self.samples < 2 or self.actions < 2 or self.contexts < 1:
            raise InputError("--samples and --actions: at least 2; --contexts: at least 1.")
        if min(self.steps, self.language_steps) < exact.PARTS or self.model_steps < 1:
            raise InputError(f"--steps, --language-steps: at least {exact.PARTS}.")
        for name in self.model_methods:
            if name not in METHODS:
                raise InputError(f"--model-methods {name}: there are {', '.join(METHODS)}.")
        if not any(self.only in name for name in METHODS):
            raise InputError(f"--only {self.only}: no method has this in its name.")
        parts = (self.model, self.sentiment, self.prompts)
        if any(part is None for part in parts) and any(part is not None for part in parts):
            raise InputError("--model, --sentiment and --prompts go together: all or none.")


def panel(
    config: Config, build: worlds.Build, *, coefs: tuple[float, ...], seeds: int, steps: int,
    learning_rate: float, progress: Progress, title: str,
) -> Panel:  # fmt: skip
    """Every loss in one exact world: a program for each loss, over all coefficients and seeds."""
    keys = jax.random.split(jax.random.key(config.seed), seeds)
    chosen = {name: method for name, method in METHODS.items() if config.only in name}
    task = progress.add_task(title, total=len(chosen) + 1)
    found: Panel = {}

    grid = lambda one: jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))  # noqa: E731
    levels = jnp.asarray(coefs)

    def split(key, kl_coef):
        key_world, key_run = jax.random.split(key)
        return key_run, build(key_world, kl_coef)

    def worth(key, kl_coef, last, earlier):
        return exact.worth(last, earlier, split(key, kl_coef)[1], kl_coef)

    # Compiled once for all methods.
    measured = jax.jit(jax.vmap(jax.vmap(worth, (0, None, 0, 0)), (None, 0, 0, 0)))

    def selected(key, kl_coef):
        world = split(key, kl_coef)[1]
        every = choices.enumerated(exact.listed(world), reward=world.reward)
        law = targets.best_of(every, n=config.samples)
        return law, law

    laws = {BEST_OF: selected}
    for name, method in chosen.items():
        learn = functools.partial(
            exact.train, make=method.make, samples=config.samples, steps=steps,
            learning_rate=learning_rate,
        )  # fmt: skip

        def trained(key, kl_coef, learn=learn):
            key_run, world = split(key, kl_coef)
            return learn(key_run, kl_coef, world)

        laws[name] = trained
    for name, law in laws.items():
        found[name] = jax.tree.map(np.asarray, measured(keys, levels, *grid(law)(keys, levels)))
        progress.advance(task)
    return found


def main(config: Config, *, console: Console | None = None) -> Path:
    """Train every loss, print the tables, draw the figure; returns the path of ``results.json``."""
    here = study.begin("objectives", config, console=console)
    config = here.config
    panels: dict[str, tuple[tuple[float, ...], Panel]] = {}
    with Told(here.console) as progress:
        build = worlds.linear(
            contexts=config.contexts, actions=config.actions, dim=config.dim, bound=config.bound,
            coverage=config.coverage,
        )  # fmt: skip
        panels["bandit"] = config.kl_coefs, panel(
            config, build, coefs=config.kl_coefs, seeds=config.seeds, steps=config.steps,
            learning_rate=config.learning_rate, progress=progress, title="bandit",
        )  # fmt: skip
        if config.language_seeds:
            coefs = (config.language_kl_coef,)
            panels["language"] = coefs, panel(
                config, worlds.language(config.language_size, seed=config.seed), coefs=coefs,
                seeds=config.language_seeds, steps=config.language_steps,
                learning_rate=config.language_learning_rate, progress=progress, title="language",
            )  # fmt: skip
        if config.model is not None:
            from experiments.objectives import model

            measured = model.panel(config, progress)
            panels["model"] = (config.model_kl_coef,), measured
    metrics: dict[str, results.Metric] = {}
    for title, (coefs, found) in panels.items():
        for at, coef in enumerate(coefs):
            values = {
                name: {metric: array[at] for metric, array in columns.items()}
                for name, columns in found.items()
            }
            head = f"{title}, kl_coef={coef:g}"
            metrics |= _metrics(head, values)
            _table(head, values, here.console)
    _figure(panels, here.output / "objectives.png")
    return here.end(metrics, beside="objectives.png")


def _metrics(
    head: str, values: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, results.Metric]:
    """Means over seeds, and each method less RLOO, seed by seed: the noise that both share is
    gone."""
    found = {
        f"{head}/{name}/{metric}": results.mean(column)
        for name, columns in values.items()
        for metric, column in columns.items()
    }
    anchor = "below the frontier" if "below the frontier" in values[next(iter(values))] else "gap"
    if "RLOO" in values:
        for name, columns in values.items():
            for metric in ("gap", anchor):
                if name != "RLOO" and metric in columns:
                    less = columns[metric] - values["RLOO"][metric]
                    found[f"{head}/{name}/{metric} less RLOO's"] = results.mean(less)
    return found


def _table(head: str, values: Mapping[str, Mapping[str, np.ndarray]], console: Console) -> None:
    rows: dict[str, dict[str, results.Metric | str]] = {}
    for name, columns in values.items():
        family = METHODS[name].family if name in METHODS else "I"
        law = METHODS[name].law if name in METHODS else "best of n"
        rows[name] = {"family": family, "law": law}
        rows[name] |= {m: results.mean(columns[m]) for m in columns if m in SHOWN or "eval" in m}
    results.print_table(head, rows, console=console, caption="± one standard error over seeds")


def _figure(panels: Mapping[str, tuple[tuple[float, ...], Panel]], target: Path) -> None:
    figure, axes = plotting.grid(1, len(panels), width=4.2, height=3.6)
    for ax, (title, (_, found)) in zip(axes[0], panels.items(), strict=True):
        for number, (name, columns) in enumerate(found.items()):
            reward, kl = columns["reward"], columns["KL"]
            spread = reward.std(-1, ddof=1) / np.sqrt(reward.shape[-1])
            ax.errorbar(
                kl.mean(-1), reward.mean(-1), 1.96 * spread, marker=plotting.MARKERS[number // 10],
                color=f"C{number % 10}", label=name, linewidth=1,
            )  # fmt: skip
        plotting.label(ax, x="KL to pi0, nats", y="gold reward over pi0's, 95 %")
        ax.set_title(title)
    plotting.legend(figure, columns=4)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
