"""Does it pay to give a finished prompt's place to the next one? Stories that end by themselves.

    python -m experiments.benchmarks.continuous --model MODEL --prompts STORIES

The same responses to the same prompts by two samplers that answer ``--slots`` prompts at one time:
in batches, each of which waits for its longest response, and continuously
(:mod:`jax_klrlhf.models.continuous`). Contenders take turns within one run, every other round
reversed. *used* is the share of slot-steps that drew a token which was kept, counted, not timed.
"""

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import prompts as texts
from experiments import study
from experiments.benchmarks import aloud, paired
from jax_klrlhf import models
from jax_klrlhf.core import sequence
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.parts import ragged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Batches against continuous batching, at each bound on the length of a response."""

    model: Path
    """Folder of a pretrained model in Hugging Face's format."""
    prompts: Path
    """Text file of stories; the first sentence of each is a prompt."""
    output: Path = Path("results/benchmarks/continuous")
    """Where results.json goes."""
    waiting: int = 256
    """Prompts in all."""
    slots: int = 32
    """Prompts that are answered at one time."""
    samples: int = 4
    """Responses to each."""
    new_tokens: tuple[int, ...] = (128, 256, 448)
    """Longest response."""
    turns: int = 5
    """Timed rounds."""


def main(config: Config, *, console: Console | None = None) -> Path:
    """Time both at every bound, print the table and write ``results.json``."""
    here = study.begin("benchmarks/continuous", config, console=console)
    config, console = here.config, here.console
    before = paired.machine()
    loaded = models.load(config.model, dtype=jnp.float32)
    asked = _prompts(config, loaded)
    rows: dict[str, dict[str, str]] = {}
    metrics: dict[str, Metric] = {}
    for most in config.new_tokens:
        row, found = against(config, loaded, asked, most, console)
        rows[f"at most {most} tokens"] = row
        metrics |= {f"{most}/{name}": value for name, value in found.items()}
    facts = paired.machine()
    note = (
        f"{facts['processor']}, {os.cpu_count()} cores, load average {facts['load_average']}; "
        f"{config.turns} rounds in turn, ± is the standard error over them"
    )
    aloud.markdown(f"**Continuous batching** ({note})", rows, console)
    after = facts["load_average"]
    return here.write(metrics, seeds=[0], facts={"machine": before, "load_after": after})


def against(
    config: Config, loaded: Any, asked: sequence.Ragged, most: int, console: Console
) -> tuple[dict[str, str], dict[str, Metric]]:
    """One bound: both samplers' times, and how much of their work was kept."""
    make = partial(
        rounds.Draw,
        model=loaded.model,
        samples=config.samples,
        max_new_tokens=most,
        stop=(tokenize.encoder(loaded.tokenizer).end,),
        rows=config.slots,
    )
    draws = {"batches": make(), "continuous": make(continuous=True)}
    key = jax.random.key(0)
    found = {name: draw(key, loaded.params, asked) for name, draw in draws.items()}
    lengths = np.asarray(found["batches"].lengths)
    same = float((found["continuous"].ids == found["batches"].ids).all(-1).mean())
    # A batch takes as many steps as its longest response has tokens.
    steps = lengths.max(1).reshape(-1, config.slots).max(1).sum()
    used = lengths.sum() / (steps * config.slots * config.samples)
    contenders = aloud.contenders(
        console, {name: partial(draw, key, loaded.params, asked) for name, draw in draws.items()}
    )
    times = paired.alternate(contenders, turns=config.turns)
    speedup = paired.ratio(times["batches"], times["continuous"])
    work = int(lengths.sum())
    rates = {name: paired.rate(work, times[name]) for name in draws}
    row = {
        "mean, longest": f"{lengths.mean():.0f}, {lengths.max()}",
        "used by batches": f"{used:.2f}",
        **{f"{name}, tokens/s": f"{r.value:,.0f} ± {r.stderr:,.0f}" for name, r in rates.items()},
        "ratio": f"{speedup.value:.2f} ± {speedup.stderr:.2f}",
        "same responses": f"{same:.3f}",
    }
    metrics = {f"{name}/tokens_per_second": rate for name, rate in rates.items()}
    metrics |= {"speedup": speedup, "used_by_batches": Metric(float(used)), "same": Metric(same)}
    return row, metrics


def _prompts(config: Config, loaded: Any) -> sequence.Ragged:
    """The first sentences of stories, in the model's tokens."""
    if config.waiting % config.slots:
        raise InputError("--waiting must be a multiple of --slots: only whole batches are counted.")
    found = texts.first_sentences(config.prompts)
    if len(found) < config.waiting:
        raise InputError(
            f"{config.prompts}: {len(found)} prompts, but --waiting is {config.waiting}."
        )
    encoder = tokenize.encoder(loaded.tokenizer)
    return ragged(*sequence.pad([encoder.prompt(text) for text in found[: config.waiting]]))


cli = study.entry(main, Config, __doc__)

if __name__ == "__main__":
    cli()
