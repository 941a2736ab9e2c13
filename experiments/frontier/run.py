"""The paper's comparison on a real model: offline, online, hybrid and rejection sampling.

Reward-KL frontiers of every method at the same label budget, in and out of distribution. Source:
Xiong et al., arXiv 2312.11456, section 6; the moving reference is the ablation of 2409.02392.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from experiments import divided, study
from experiments.frontier import cells, laboratory, report
from experiments.frontier.options import Config
from experiments.progress import Told
from jax_klrlhf.errors import InputError
from jax_klrlhf.training.health import Stopped


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run what is left to run and return the path of ``results.json``."""
    here = study.begin("frontier", config, console=console)
    config = here.config
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    if config.workers > 1:
        here.console.print(f"{len(seeds)} seeds in {config.workers} processes", highlight=False)
        chosen = [dataclasses.replace(config, methods=(method,)) for method in config.methods]
        divided.over_processes(
            (_rates, chosen if len(config.rates) > 1 else []),  # which all seeds share
            (_cells, [dataclasses.replace(config, first_seed=seed, seeds=1) for seed in seeds]),
            workers=config.workers,
        )
    with Told(here.console) as progress:
        place = laboratory.place(config, progress)
        found = run(
            config,
            laboratory.laboratory(config, place, output=here.output),
            progress,
            # So that a run that is broken off has its report too.
            after_seed=lambda there: report.write(here, place, there),
        )
    rows, said = report.write(here, place, found)
    report.show(here, place, rows, said)
    return here.end(
        report.metrics(rows, said, found, place),
        seeds=sorted({name.seed for name in found}),
        beside="report.html and the figures",
    )


def _rates(config: Config) -> None:
    """Choose the learning rates of a configuration's methods, and leave them in the folder."""
    with Progress(disable=True, console=Console()) as progress:
        place = laboratory.place(config, progress)
    lab = laboratory.laboratory(config, place, output=config.output)
    for method in config.methods:
        lab.rate(method)


def _cells(config: Config) -> None:
    """Make the cells of a configuration that are not there; the report is the caller's."""
    console = Console()
    with Progress(disable=True, console=console) as progress:
        place = laboratory.place(config, progress)
        run(config, laboratory.laboratory(config, place, output=config.output), progress)


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
        sweeps=config.sweeps(),
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


cli = study.entry(main, Config, __doc__)
