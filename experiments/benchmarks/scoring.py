"""Memory and time of scoring's vocabulary projection, chunked against whole.

The gradient of the summed log-probability of B x K responses is compiled with the projection in
chunks and with all logits at once, at vocabularies of 32k and 128k. Temporaries are the compiler's
own account (``memory_analysis``), so the whole projection is not run, only compiled.

    python -m experiments.benchmarks.scoring --output FOLDER

takes about 2 minutes on four cores, prints what it finds as it goes, and writes ``results.json``
after each vocabulary.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments import study
from experiments.benchmarks import aloud, paired
from jax_klrlhf import models
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import scoring
from jax_klrlhf.results import Metric

MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Benchmark scoring, forward and backward."""

    output: Path = Path("results/benchmarks/scoring")
    """Where results.json goes."""
    vocabularies: tuple[int, ...] = (32768, 131072)
    """Sizes of the vocabulary."""
    batch: int = 8
    """Prompts, of 64 tokens each."""
    samples: int = 2
    """Responses to each."""
    length: int = 256
    """Tokens of each response."""
    width: int = 128
    """Hidden size."""
    chunks: tuple[int, ...] = (256, 1024)
    """Tokens projected at one time."""
    turns: int = 3
    """Timed rounds; 0 measures memory only."""


def main(config: Config, *, console: Console | None = None) -> Path:
    """Compile, measure, print the table and write ``results.json``."""
    here = study.begin("benchmarks/scoring", config, console=console)
    console = here.console
    metrics: dict[str, Metric] = {}
    rows: dict[str, dict[str, Metric | str]] = {}

    def write() -> Path:
        return here.write(metrics, seeds=[0], facts={"machine": paired.machine()})

    for vocabulary in config.vocabularies:
        found, mine = of_vocabulary(config, vocabulary, console)
        rows |= {f"{vocabulary} words, {name}": row for name, row in mine.items()}
        metrics |= found
        write()
    tokens = config.batch * config.samples * config.length
    machine = paired.machine()
    aloud.markdown(
        f"**Temporaries of the gradient of {tokens} response tokens' log-probabilities** "
        f"({machine['processor']}, load average {machine['load_average']}, hidden size "
        f"{config.width}, one layer; {config.turns} rounds in turn, ± is the standard error)",
        rows,
        console,
    )
    return write()


def of_vocabulary(
    config: Config, vocabulary: int, console: Console
) -> tuple[dict[str, Metric], dict[str, dict[str, Metric | str]]]:
    """Metrics and table rows of one vocabulary: every chunk compiled, all but the whole run."""
    tokens = config.batch * config.samples * config.length
    logits = Metric(4 * tokens * vocabulary / MIB)
    metrics = {f"memory/{vocabulary} logits/mebibytes": logits}
    rows: dict[str, dict[str, Metric | str]] = {
        "all logits (float32)": {"MiB": f"{logits.value:,.0f}"}
    }
    console.print(f"vocabulary {vocabulary}:", highlight=False)
    compiled = {}
    for chunk in (*config.chunks, tokens):
        program, arguments = gradient(config, vocabulary, chunk)
        analysis = program.memory_analysis()
        if analysis is None:
            raise InputError("this backend reports no memory analysis: run on CPU, GPU or TPU.")
        temporaries = Metric(analysis.temp_size_in_bytes / MIB)
        name = "whole" if chunk == tokens else f"chunks of {chunk}"
        console.print(f"  {name}: {temporaries.value:,.0f} MiB of temporaries", highlight=False)
        rows[name] = {"MiB": f"{temporaries.value:,.0f}"}
        metrics[f"memory/{vocabulary} {name}/mebibytes"] = temporaries
        if chunk != tokens:
            compiled[name] = partial(program, *arguments)
    if config.turns:
        times = paired.alternate(aloud.contenders(console, compiled), turns=config.turns)
        for name, taken in times.items():
            speed = paired.rate(tokens, taken)
            rows[name]["response tokens/s"] = f"{speed.value:,.0f} ± {speed.stderr or 0:,.0f}"
            metrics[f"time/{vocabulary} {name}/tokens_per_second"] = speed
    return metrics, rows


def gradient(config: Config, vocabulary: int, chunk: int):
    """The compiled gradient of the summed log-probabilities, and its arguments."""
    model = models.language_model(
        models.ModelConfig(
            vocab_size=vocabulary,
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            layers=1,
            heads=4,
            kv_heads=2,
            head_dim=config.width // 4,
            max_length=64 + config.length,
        )
    )
    params = jax.jit(model.init)(jax.random.key(0))
    shape = (config.batch, config.samples, config.length)
    prompts = Ragged(jnp.ones((config.batch, 64), jnp.int32), jnp.full((config.batch,), 64))
    responses = Ragged(jnp.ones(shape, jnp.int32), jnp.full(shape[:2], config.length))

    @jax.jit
    @jax.grad
    def program(params, prompts, responses):
        return scoring.log_prob(model, params, prompts, responses, chunk=chunk).sum()

    arguments = params, prompts, responses
    return program.lower(*arguments).compile(), arguments


cli = study.entry(main, Config, __doc__)

if __name__ == "__main__":
    cli()
