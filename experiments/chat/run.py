r"""The paper's loop on human preferences, on a chat model that answers in sentences.

Two reward models are made of one half each of people's preferences: gold, which labels and judges,
and a proxy, with its ensemble, its posterior and PAR. Every method has the same number of labels,
and is judged by gold, by the proxy, and by the exact KL to pi0, on prompts nobody learned from and
on prompts of another source. Source: arXiv 2312.11456, Algorithms 1 and 2 and section 6.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from experiments import divided, study
from experiments.chat import cells, report
from experiments.chat.methods import METHODS
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is; a folder of results goes on only with the same sizes."""

    labels: int = 96
    """Of each method, a multiple of twice the rounds."""
    rounds: int = 2
    train_prompts: int = 48
    held_out: int = 24
    """Prompts of each source that policies are judged on."""
    human: int = 500
    """Pairs of each source at most, that each of gold and the proxy learns from."""
    judged: int = 400
    """Pairs of each source at most, that both are judged on."""
    human_prompt_tokens: int = 256
    """Pairs with a longer prompt are left out."""
    human_tokens: int = 128
    """Pairs with a longer response are left out."""
    prompt_tokens: int = 64
    """Longer prompts are not put to policies."""
    new_tokens: int = 32
    """Longest answer."""
    explore: int = 4
    """Answers of which online methods compare the best and the worst, and RSO's proposals."""
    eval_samples: int = 2
    draws: int = 8
    """Of pi0 at each judged prompt: best-of-n has n up to half of them."""
    steps: int = 8
    batch: int = 12
    rank: int = 8
    """Of the adapter; 0: all parameters are trained, and there is none."""
    gold_components: int = 96
    proxy_components: int = 32
    members: int = 5
    spread: float = 1.0
    """Standard deviation of gold among pi0's answers to a prompt, nats."""
    pessimism: float = 1.0
    """Posterior standard deviations of the lower bound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Run every cell that is not on disk yet, and report on what there is."""

    model: str
    """Folder or hub id of a chat model: HuggingFaceTB/SmolLM2-135M-Instruct."""
    data: Path
    """Human pairs: prompt, chosen, rejected. Policies learn on prompts of this source."""
    ood: Path
    """Pairs of another source: gold learns of them too, proxies and policies do not."""
    output: Path = Path("results/chat")
    """Where cells, results.json, the figure and the page go; started again, a run goes on."""
    seeds: int = 3
    seed: int = 0
    """The first of them."""
    workers: int = 1
    """Processes that cells are divided over, each on its share of the cores; CPU only."""
    methods: tuple[str, ...] = tuple(METHODS)
    coefficients: tuple[float, ...] = (0.1,)
    """kl_coef of the sweep."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates: each training objective takes the smallest that its pilots don't tell from
    the best."""
    every_rate: tuple[str, ...] = ()
    """Methods that run at each of the rates, beside the chosen one."""
    small: bool = False
    """To see every part run: one seed, coefficient and rate, few of everything."""
    sizes: Sizes = Sizes()

    def resized(self) -> "Config":
        """This, or the small size if it was asked for."""
        return dataclasses.replace(self, **SMALL) if self.small else self

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            raise InputError(f"--methods {', '.join(unknown)}: choose from {', '.join(METHODS)}.")
        if not set(self.every_rate) <= set(self.methods):
            raise InputError(f"--every-rate: choose from {', '.join(self.methods)}.")
        for path, flag in ((self.data, "--data"), (self.ood, "--ood")):
            if not path.is_file():
                raise InputError(f"{flag} {path}: no such file.")
        sizes = dataclasses.asdict(self.sizes)
        if sizes.pop("rank") < 0 or min(self.seeds, self.workers, *sizes.values()) <= 0:
            raise InputError(
                "--seeds, --workers and every one of --sizes must be positive (rank may be 0)."
            )
        if not self.coefficients or not self.rates or min(self.coefficients + self.rates) <= 0:
            raise InputError("--coefficients and --rates: positive numbers.")
        sizes = self.sizes
        if sizes.labels % (2 * sizes.rounds):
            raise InputError(
                f"--sizes.labels {sizes.labels}: must be a multiple of twice the rounds, "
                f"{2 * sizes.rounds}."
            )
        if min(sizes.explore, sizes.members, sizes.steps) < 2 or (
            sizes.draws < max(4, sizes.eval_samples)
        ):
            raise InputError(
                "--sizes: explore, members and steps at least 2, draws at least 4 and eval-samples."
            )


SMALL = {
    "seeds": 1,
    "methods": tuple(METHODS)[:5],  # One RSO.
    "coefficients": (0.1,),
    "rates": (1e-3,),
    "sizes": Sizes(
        labels=16, rounds=2, train_prompts=8, held_out=6, human=24, judged=16, prompt_tokens=56,
        human_prompt_tokens=64, human_tokens=64, new_tokens=24, explore=4, eval_samples=2, draws=4,
        steps=2, batch=8, gold_components=48, proxy_components=16, members=4,
    ),
}  # fmt: skip


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run what is left to run; returns the path of ``results.json``."""
    here = study.begin("chat", config, console=console)
    config = here.config
    seeds = range(config.seed, config.seed + config.seeds)
    lab = cells.Lab(config, console=here.console)
    lab.accuracy()  # makes what all cells share
    if config.workers > 1:
        quiet = here.console.quiet  # The rates before the cells, which take them.
        divided.over_processes(
            (_pilot, [(config, *pilot, quiet) for pilot in lab.pilots]),
            (_cell, lambda: [(config, name, quiet) for name in names(config, lab.rates)]),
            workers=config.workers,
        )
    planned = list(names(config, lab.rates))
    for name in planned:
        lab.run(name)
    metrics = report.write(lab, planned, here.output, here.console)
    return here.end(metrics, seeds=seeds, beside="frontier.png and answers.html")


def names(config: Config, chosen: Mapping[str, float]) -> Iterator[cells.Name]:
    """Every cell, by seed: a part of a run is balanced. ``chosen`` are rates by objective."""
    for seed in range(config.seed, config.seed + config.seeds):
        yield cells.Name(cells.PI0, 0.0, 0.0, seed)
        for number, coefficient in enumerate(config.coefficients):
            for name in config.methods:
                method = METHODS[name]
                every = name in config.every_rate
                for rate in config.rates if every else (chosen[method.objective],):
                    if method.coefficient:
                        yield cells.Name(name, coefficient, rate, seed)
                    elif number == 0:
                        yield cells.Name(name, 0.0, rate, seed)


@functools.cache
def _lab(config: Config, quiet: bool) -> cells.Lab:
    """A process's own: what it compiled serves all of its cells."""
    return cells.Lab(config, console=Console(quiet=quiet))


def _pilot(part: tuple[Config, str, float, bool]) -> None:
    """Make a pilot and leave it in the folder."""
    config, objective, rate, quiet = part
    _lab(config, quiet).pilot(objective, rate)


def _cell(part: tuple[Config, cells.Name, bool]) -> None:
    """Make a cell and leave it in the folder."""
    config, name, quiet = part
    _lab(config, quiet).run(name)


cli = study.entry(main, Config, __doc__)
