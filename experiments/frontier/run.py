"""The paper's comparison on a real model: offline, online, hybrid and rejection sampling.

Reward-KL frontiers of every method at the same label budget, in and out of distribution. Source:
Xiong et al., arXiv 2312.11456, section 6; the moving reference is the ablation of 2409.02392.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments import plotting
from experiments.frontier import cells, evaluate, methods, proxy, report
from experiments.frontier import world as worlds
from experiments.quickstart import world as quickstart
from jax_klrlhf import results
from jax_klrlhf.errors import InputError, reported
from jax_klrlhf.training import rounds
from jax_klrlhf.training.health import Stopped
from jax_klrlhf.training.rounds import journal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is; a folder of results goes on only with the same sizes."""

    labels: int = 2304
    """Label budget of every method, a multiple of twice the rounds."""
    rounds: int = 3
    """Of the online and hybrid methods, and steps of multi-step RSO."""
    train_prompts: int = 768
    held_out_prompts: int = 384
    """As many out-of-distribution prompts are judged."""
    max_prompt_tokens: int = 32
    """Longer prompts are left out."""
    new_tokens: int = 32
    """Longest response."""
    explore: int = 8
    """Responses of which online methods compare the best and the worst."""
    propose: int = 6
    """Proposals at a prompt in each step of multi-step RSO; RSO draws all of them in one."""
    eval_samples: int = 4
    """Responses to each prompt that a policy is judged by."""
    steps: int = 48
    """Optimizer steps of a fit; a multi-step chain has them in total."""
    batch: int = 48
    """Pairs in a step."""
    learning_rate: float = 1e-3
    gold_scale: float = 4.0
    """Nats of the annotator's logit to a nat of the fitted gold reward."""
    tokens: int = 512
    """Of pi0's most frequent tokens the proxy counts this many."""
    hidden: bool = False
    """The proxy looks at pi0's hidden states too: a little better, and several times slower."""
    ridge: float = 1.0
    """Of the proxy and of its ellipsoid."""
    radius: float = 2.0
    """beta: at 2 the uncertainty is about a posterior standard deviation of the proxy."""
    stories: int = 4000
    """Embedded default: stories that pi0 is trained on."""
    sft_steps: int = 400
    """Embedded default: optimizer steps that make pi0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Run every cell that is not on disk yet; without files an embedded world is used."""

    model: Path | None = None
    """Folder of a pretrained model in Hugging Face's format (safetensors and tokenizer)."""
    prompts: Path | None = None
    """Text file of stories; the first sentence of each is a prompt."""
    gold: Path | None = None
    """Folder with positive.txt and negative.txt, on which the gold reward is fitted."""
    ood: Path | None = None
    """Prompts of another source: a JSON list of records, or a text file of lines."""
    ood_column: str = "instruction"
    """Where the prompt of a record is."""
    output: Path = Path("results/frontier")
    """Where cells, results.json, the figures and report.html go; started again, a run goes on."""
    minutes: float | None = None
    """Begin no cell after so many minutes and report on what there is; a later run goes on."""
    seeds: int = 5
    first_seed: int = 0
    """The first of them: a pilot takes one that no statement is judged by."""
    workers: int = 1
    """Processes that seeds are divided over, each on its share of the cores: the model is so small
    that cores do more apart than together. CPU only, and with files only."""
    proxy: Literal["linear", "reward-model"] = "linear"
    """What the learners' reward is: linear on frozen features, or all of pi0 with a head."""
    methods: tuple[str, ...] = methods.DEFAULT
    """Methods with a coefficient; pi0 and best-of-n are always there."""
    coefficients: tuple[float, ...] = (1.0, 0.4, 0.15)
    """kl_coef of the sweep."""
    rejection_coefficients: tuple[float, ...] = (4.0, 1.5, 0.6)
    """kl_coef of RSO and multi-step RSO: at smaller ones hardly a proposal is accepted, and the few
    pairs that are left differ so little that their labels are a coin's."""
    rejection_labels: Literal["expected", "drawn", "order"] = "order"
    """What the pairs that RSO and multi-step RSO accept are labelled by, all by the proxy: the
    Bradley-Terry probability, a draw from it, or which reward is the higher."""
    best_of: tuple[int, ...] = (2, 4, 8, 16)
    small: bool = False
    """A run of a few minutes: other sizes, at most two seeds, two coefficients."""
    sizes: Sizes = dataclasses.field(default_factory=Sizes)

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        given = {
            "--model": self.model,
            "--prompts": self.prompts,
            "--gold": self.gold,
            "--ood": self.ood,
        }
        missing = [flag for flag, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise InputError(
                f"{', '.join(missing)} missing: --model, --prompts, --gold and --ood go together; "
                "give all four for a real model, or none for the embedded default."
            )
        unknown = sorted(set(self.methods) - set(methods.METHODS))
        if unknown:
            raise InputError(
                f"--methods {', '.join(unknown)}: choose from {', '.join(methods.METHODS)}."
            )
        asking = [m for m in self.methods if methods.METHODS[m].uncertainty]
        if self.proxy == "reward-model" and asking:
            raise InputError(
                f"--proxy reward-model has no uncertainty, which {', '.join(asking)} ask for: name "
                "the others with --methods, or take --proxy linear."
            )
        sizes = self.sizes
        if sizes.rounds < 1 or sizes.labels < 1 or sizes.labels % (2 * sizes.rounds):
            raise InputError(
                f"--sizes.labels {sizes.labels}: must be a multiple of twice the rounds, "
                f"{2 * sizes.rounds}, so that every round gets an equal part."
            )
        if sizes.steps < sizes.rounds:
            raise InputError(
                f"--sizes.steps {sizes.steps}: fewer than the {sizes.rounds} steps of the chain."
            )
        sweep = [*self.coefficients, *self.rejection_coefficients]
        if self.seeds < 1 or not self.coefficients or min(sweep) <= 0:
            raise InputError("--seeds must be at least 1 and every --coefficients positive.")
        if self.first_seed < 0:
            raise InputError(f"--first-seed {self.first_seed}: must be at least 0.")
        if self.workers < 1:
            raise InputError(f"--workers {self.workers}: must be at least 1.")
        if self.workers > 1 and missing:
            raise InputError(
                f"--workers {self.workers} needs --model, --prompts, --gold and --ood: every "
                "process would train the embedded model for itself, and not to the same bit."
            )
        if self.minutes is not None and self.minutes <= 0:
            raise InputError("--minutes must be positive.")
        if any(n < 2 for n in self.best_of):
            raise InputError("--best-of: every n must be at least 2; 1 is pi0.")


def small(config: Config) -> Config:
    """The sizes of ``--small``."""
    return dataclasses.replace(
        config,
        seeds=min(config.seeds, 2),
        coefficients=(0.4, 0.1),
        rejection_coefficients=(1.5, 0.6),
        best_of=(4,),
        sizes=dataclasses.replace(
            config.sizes, labels=192, train_prompts=64, held_out_prompts=64, steps=15, batch=32,
            # As many draws as a policy is judged by: one program less to compile for each.
            explore=config.sizes.eval_samples, propose=config.sizes.eval_samples,
            stories=1500, sft_steps=150,
        ),
    )  # fmt: skip


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run what is left to run and return the path of ``results.json``."""
    console = console or Console()
    began = time.perf_counter()
    if config.small:
        config = small(config)
    config.check()
    output = results.output_folder(config.output)
    if config.workers > 1:
        _divided(config, console)
    with _progress(console) as progress:
        place = _place(config, progress)
        lab = laboratory(config, place, output=output)
        found = run(
            config,
            lab,
            progress,
            # So that a run that is broken off has its report too.
            after_seed=lambda there: write(config, place, there, output=output),
        )
    path, rows, said = write(config, place, found, output=output)
    _print(console, place, config, rows, said)
    console.print(
        f"{path}, report.html and the figures beside it, in {time.perf_counter() - began:.0f} s"
    )
    return path


def _divided(config: Config, console: Console) -> None:
    """Make the cells of every seed in processes of their own, which leave them in the folder."""
    if jax.default_backend() != "cpu":
        raise InputError(
            f"--workers {config.workers}: processes cannot share the {jax.default_backend()}; "
            "leave it out, or set JAX_PLATFORMS=cpu."
        )
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    workers = min(config.workers, len(seeds))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    console.print(f"{len(seeds)} seeds in {workers} processes", highlight=False)
    context = multiprocessing.get_context("spawn")  # A fork would inherit JAX's threads.
    places = context.Queue()
    for worker in range(workers):
        places.put(cores[worker::workers])
    before = dict(os.environ)
    # NumPy's BLAS counts the cores before it is pinned, and its threads would spin on those few.
    share = str(len(cores[::workers]) or 1)
    os.environ |= {"OPENBLAS_NUM_THREADS": share, "OMP_NUM_THREADS": share}
    try:
        with concurrent.futures.ProcessPoolExecutor(
            workers, context, initializer=_pin, initargs=(places,)
        ) as pool:
            work = [
                pool.submit(_cells, dataclasses.replace(config, first_seed=seed, seeds=1))
                for seed in seeds
            ]
            try:
                for done in concurrent.futures.as_completed(work):
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        os.environ.clear()
        os.environ.update(before)


def _pin(places: Any) -> None:
    """Keep this process to its share of the cores; before JAX counts them."""
    if cores := places.get():
        os.sched_setaffinity(0, cores)


def _cells(config: Config) -> None:
    """Make the cells of a configuration that are not there; the report is the caller's."""
    console = Console()
    with Progress(disable=True, console=console) as progress:
        place = _place(config, progress)
        run(config, laboratory(config, place, output=config.output), progress)


def write(
    config: Config,
    place: worlds.Place,
    found: Mapping[cells.Name, cells.Found],
    *,
    output: Path,
) -> tuple[Path, list[report.Row], list[report.Finding]]:
    """Results, figures and report of the cells there are."""
    rows, said = report.table(found), report.findings(found)
    drawn = report.figures(rows)
    for name, figure in drawn.items():
        plotting.save(figure, output / f"{name}.png")
    seconds = sum(cell.seconds for cell in found.values())
    seeds = sorted({name.seed for name in found})
    report.write_html(
        output / "report.html",
        title=f"Reward-KL frontiers: {place.world.name}",
        facts={
            "seeds": str(len(seeds)),
            "cells": str(len(found)),
            "labels of every method": str(config.sizes.labels),
            "prompts": f"{config.sizes.train_prompts} to learn on, "
            f"{config.sizes.held_out_prompts} held out, {config.sizes.held_out_prompts} others",
            "kl_coef": ", ".join(f"{c:g}" for c in config.coefficients),
            "kl_coef of RSO": ", ".join(f"{c:g}" for c in config.rejection_coefficients),
            "labels of RSO's pairs": config.rejection_labels,
            "minutes in cells": f"{seconds / 60:.1f}",
        },
        rows=rows,
        found=said,
        drawn=drawn,
    )
    path = results.write_results(
        output,
        name="frontier",
        config=config,
        seeds=seeds,
        seconds=seconds,
        metrics=report.metrics(rows, said, found),
    )
    return path, rows, said


def laboratory(config: Config, place: worlds.Place, *, output: Path) -> cells.Lab:
    """Everything that cells share, compiled when first used."""
    sizes, world = config.sizes, place.world
    draws: dict[int, rounds.Draw] = {}

    def draw(samples: int) -> rounds.Draw:
        # One object to a number of samples: each compiles its own program.
        if samples not in draws:
            draws[samples] = rounds.Draw(
                model=world.model,
                samples=samples,
                max_new_tokens=sizes.new_tokens,
                stop=(world.encoder.end,),
                pad_id=world.pad_id,
                rows=max(1, 2048 // samples),
            )
        return draws[samples]

    # Pieces that even the smallest set fills, or each size would be compiled for itself.
    rows = min(64, sizes.train_prompts, sizes.held_out_prompts, sizes.labels // (2 * sizes.rounds))
    sample = place.encode(world.prompts[: sizes.held_out_prompts])
    fitting = _fitting(sizes, sizes.steps)
    if config.proxy == "linear":
        features, dim = proxy.whitened_features(
            world.model,
            world.params,
            sample,
            draw(max(2, sizes.eval_samples))(jax.random.key(21), world.params, sample),
            tokens=sizes.tokens,
            hidden=sizes.hidden,
            rows=rows,
        )
        reward = rounds.linear(features, dim=dim, ridge=sizes.ridge, radius=sizes.radius)
    else:
        reward = proxy.reward_model(world.model, world.params, sample, fitting=fitting, rows=rows)
    parts = methods.Parts(
        model=world.model,
        pi0=world.params,
        reward=reward,
        oracle=rounds.oracle.bradley_terry(place.judge),
        fitting=fitting,
        short_fitting=_fitting(sizes, sizes.steps // sizes.rounds),
        rows=rows,
        explore=draw(sizes.explore),
        propose=draw(sizes.propose * sizes.rounds),
        propose_step=draw(sizes.propose),
        chain=sizes.rounds,
        labelling=rounds.rejection.LABELLINGS[config.rejection_labels],
        rounds=sizes.rounds,
    )

    def seed(number: int) -> cells.Seed:
        return cells.Seed(
            place, parts, draw(sizes.eval_samples), draw(2),
            train=sizes.train_prompts, held_out=sizes.held_out_prompts, labels=sizes.labels,
            seed=number,
        )  # fmt: skip

    # Too few prompts, or ones that do not fit the model, are found out before any fit.
    seed(config.first_seed)
    if place.width + sizes.new_tokens > world.model.max_length:
        raise InputError(
            f"prompts of {place.width} tokens and --sizes.new-tokens {sizes.new_tokens} exceed "
            f"the model's context of {world.model.max_length}: lower one of them."
        )
    identity = {
        "sizes": dataclasses.asdict(sizes),
        "pi0": journal.digest(world.params)[:16],
        "prompts": journal.digest(place.encode(world.prompts))[:16],
        "other prompts": journal.digest(place.encode(place.other))[:16],
        "gold reward": journal.digest(_weights(place))[:16],
        "labels of RSO's pairs": config.rejection_labels,
    }
    if config.proxy != "linear":
        identity["proxy"] = config.proxy
    return cells.Lab(
        place, parts, evaluate.measure(world.model, rows=rows), draw(sizes.eval_samples), seed,
        output=output, identity=identity,
    )  # fmt: skip


def run(
    config: Config,
    lab: cells.Lab,
    progress: Progress,
    *,
    after_seed: Callable[[Mapping[cells.Name, cells.Found]], Any] = lambda found: None,
) -> dict[cells.Name, cells.Found]:
    """Every cell, from disk where it is there; ``after_seed`` is called when a seed is whole.

    Raises:
        InputError: where a cell on disk was made of something else, or a fit was stopped.
    """
    began = time.perf_counter()
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    every = cells.names(
        sweeps={
            method: config.rejection_coefficients if "RSO" in method else config.coefficients
            for method in config.methods
        },
        best_of=config.best_of,
        seeds=seeds,
    )
    there = {name: lab.read(name) for name in every}
    left = [name for name in every if there[name] is None]
    bar = progress.add_task("cells (in fits)", total=sum(map(cells.cost, left)))
    found: dict[cells.Name, cells.Found] = {}
    for seed in seeds:
        for name in (n for n in every if n.seed == seed):
            cell = there[name]
            if cell is None:
                late = time.perf_counter() - began
                if config.minutes is not None and late > 60 * config.minutes:
                    continue
                progress.update(
                    bar, description=f"{name.method} {name.coefficient:g}, seed {name.seed}"
                )
                try:
                    cell = lab.run(name)
                except Stopped as stopped:
                    raise InputError(f"{name.stem}: {stopped}") from None
                progress.advance(bar, cells.cost(name))
                progress.console.print(
                    f"{name.stem}: KL {cell.held_out.kl.mean():.2f}, gain "
                    f"{cell.held_out.gold_gain.mean():.3f}, {cell.seconds:.0f} s",
                    highlight=False,
                )
            found[name] = cell
        if seed != seeds[-1]:
            after_seed(found)
    return found


def _place(config: Config, progress: Progress) -> worlds.Place:
    sizes = config.sizes
    if config.model and config.prompts and config.gold and config.ood:
        other = worlds.other_prompts(config.ood, column=config.ood_column)
        world = quickstart.real(config.model, config.prompts, config.gold)
    else:
        world, other = worlds.embedded(
            stories=sizes.stories, steps=sizes.sft_steps, progress=progress
        )
    return worlds.build(
        world, other, gold_scale=sizes.gold_scale, max_prompt_tokens=sizes.max_prompt_tokens
    )


def _fitting(sizes: Sizes, steps: int) -> rounds.Fitting:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, sizes.learning_rate, max(1, steps // 10), steps
    )
    return rounds.Fitting(
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        steps=steps,
        batch_size=sizes.batch,
        # What a fit reports is of its last quarter, near the policy that it comes to.
        log_every=max(1, steps // 4),
    )


def _weights(place: worlds.Place) -> dict[str, Any]:
    return {word: np.float64(weight) for word, weight in place.world.gold.weights.items()}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _print(
    console: Console,
    place: worlds.Place,
    config: Config,
    rows: Sequence[report.Row],
    said: Sequence[report.Finding],
) -> None:
    results.print_table(
        f"Frontier: {place.world.name}, {config.seeds} seeds, {config.sizes.labels} labels each",
        {
            row.name: {
                "KL": row.held_out["kl"],
                "gold": row.held_out["gold"],
                "held-out - other": row.difference,
                "win rate": row.held_out["wins"],
                "proxy - gold": row.over,
            }
            for row in rows
        },
        console=console,
        caption="± one standard error: over seeds, or over prompts where that is larger; the rest "
        "is in report.html",
    )
    results.print_table(
        "What the paper expects",
        {
            f.statement: {
                "difference": f.difference,
                "95 % interval": f"[{f.low:.3f}, {f.high:.3f}]",
                "": f"{f.verdict}: {f.reason}" if f.reason else f.verdict,
            }
            for f in said
        },
        console=console,
    )


def cli() -> None:
    """Entry of ``python -m experiments.frontier``."""
    with reported():
        main(tyro.cli(Config, description=__doc__))
