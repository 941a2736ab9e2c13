"""Memory and time of scoring's vocabulary projection, chunked against whole.

The gradient of the summed log-probability of B x K responses is compiled with the projection in
chunks and with all logits at once, at vocabularies of 32k and 128k. Temporaries are the compiler's
own account (``memory_analysis``), so the whole projection is not run, only compiled.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from experiments.benchmarks import paired
from jax_klrlhf import models, results
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError, reported
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
    console = console or Console()
    output = results.output_folder(config.output)
    begin = time.perf_counter()
    metrics: dict[str, Metric] = {}
    rows: dict[str, dict[str, Metric | str]] = {}
    tokens = config.batch * config.samples * config.length
    for vocabulary in config.vocabularies:
        logits = 4 * tokens * vocabulary / MIB
        rows[f"{vocabulary} words, all logits (float32)"] = {"MiB": f"{logits:,.0f}"}
        metrics[f"memory/{vocabulary} logits/mebibytes"] = Metric(logits)
        compiled = {}
        for chunk in (*config.chunks, tokens):
            program, arguments = gradient(config, vocabulary, chunk)
            analysis = program.memory_analysis()
            if analysis is None:
                raise InputError("this backend reports no memory analysis: run on CPU, GPU or TPU.")
            temporaries = analysis.temp_size_in_bytes / MIB
            name = "whole" if chunk == tokens else f"chunks of {chunk}"
            rows[f"{vocabulary} words, {name}"] = {"MiB": f"{temporaries:,.0f}"}
            metrics[f"memory/{vocabulary} {name}/mebibytes"] = Metric(temporaries)
            if chunk != tokens and config.turns:
                compiled[name] = lambda program=program, arguments=arguments: program(*arguments)
        for name, times in (
            paired.alternate(compiled, turns=config.turns).items() if compiled else ()
        ):
            speed = paired.rate(tokens, times)
            rows[f"{vocabulary} words, {name}"] |= {"response tokens/s": f"{speed.value:,.0f}"}
            metrics[f"time/{vocabulary} {name}/tokens_per_second"] = speed
    results.print_table(
        f"Temporaries of the gradient of {tokens} response tokens' log-probabilities",
        rows,
        console=console,
        caption=f"{paired.machine()['processor']}, hidden size {config.width}, one layer",
    )
    return results.write_results(
        output,
        name="benchmarks/scoring",
        config={**dataclasses.asdict(config), "machine": paired.machine()},
        seeds=[0],
        seconds=time.perf_counter() - begin,
        metrics=metrics,
    )


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


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Config, description=__doc__))
