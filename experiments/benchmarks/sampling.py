"""How fast responses are drawn, against transformers and against ourselves without shared prompts.

Three panels, each paired within one run (contenders take turns, every other round reversed):

- ``transformers``: tokens per second on a pretrained model and real prompts, against Hugging Face
  ``generate`` (torch, same machine, no early stop on either side) at each of several batch sizes.
- ``sharing``: the time of our sampler with a prompt read once for its K samples against the same
  sampler given every prompt K times, by prompt length, on a Llama-shaped model of random weights.
- ``bandwidth`` (with ``--bandwidth``, in GB/s): tokens per second of a Llama-shaped bfloat16 model
  of about 1B parameters, and the share of the time that moving its weights and caches once per
  step would take at that bandwidth.
"""

import dataclasses
import importlib.util
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments import prompts as texts
from experiments.benchmarks import paired
from jax_klrlhf import models, results
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError, reported
from jax_klrlhf.models import sampling
from jax_klrlhf.results import Metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Benchmark the sampler; without --model and --prompts the first panel is left out."""

    model: Path | None = None
    """Folder of a pretrained model in Hugging Face's format."""
    prompts: Path | None = None
    """Text file of stories; the first sentence of each is a prompt."""
    output: Path = Path("results/benchmarks/sampling")
    """Where results.json goes."""
    batch: int = 64
    """Prompts."""
    samples: int = 8
    """Samples of each prompt."""
    new_tokens: int = 64
    """Tokens of each sample."""
    turns: int = 7
    """Timed rounds."""
    hf_batches: tuple[int, ...] = (128, 256, 512)
    """Sequences at a time for transformers; its best is what we compare with."""
    lengths: tuple[int, ...] = (64, 512, 2048)
    """Prompt lengths of the sharing panel."""
    sharing_batch: int = 8
    """Prompts of the sharing panel."""
    sharing_new_tokens: int = 32
    """Tokens of each sample in the sharing panel."""
    width: int = 256
    """Hidden size of the sharing panel's model."""
    layers: int = 4
    """Its layers."""
    bandwidth: float | None = None
    """GB/s of the device's memory: adds the panel of a 1B model."""

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if (self.model is None) != (self.prompts is None):
            raise InputError("--model and --prompts go together; give both, or neither.")
        if self.model is not None and importlib.util.find_spec("torch") is None:
            raise InputError("comparing with transformers needs torch: install the parity extra.")


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the panels, print their tables and write ``results.json``."""
    config.check()
    console = console or Console()
    output = results.output_folder(config.output)
    begin = time.perf_counter()
    metrics: dict[str, Metric] = {}
    before = paired.machine()
    if config.model is not None and config.prompts is not None:
        metrics |= against_transformers(config, config.model, config.prompts, console)
    metrics |= sharing(config, console)
    if config.bandwidth is not None:
        metrics |= of_bandwidth(config, config.bandwidth, console)
    after = paired.machine()
    return results.write_results(
        output,
        name="benchmarks/sampling",
        config={
            **dataclasses.asdict(config),
            "machine": before,
            "load_after": after["load_average"],
        },
        seeds=[0],
        seconds=time.perf_counter() - begin,
        metrics=metrics,
    )


def against_transformers(
    config: Config, folder: Path, stories: Path, console: Console
) -> dict[str, Metric]:
    """Tokens per second on the same prompts, ours and theirs."""
    import torch
    import transformers

    loaded = models.load(folder, dtype=jnp.float32)
    found = texts.first_sentences(stories)
    if len(found) < config.batch:
        raise InputError(f"{stories}: {len(found)} prompts, but --batch is {config.batch}.")
    begin = loaded.tokenizer.bos_token_id
    rows = [
        [
            *([] if begin is None else [begin]),
            *loaded.tokenizer(text, add_special_tokens=False)["input_ids"],
        ]
        for text in found[: config.batch]
    ]
    width = max(map(len, rows))
    lengths = np.array([len(row) for row in rows], np.int32)
    right = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
    prompts = Ragged(jnp.asarray(right), jnp.asarray(lengths))
    left = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor(np.arange(width)[None] >= width - lengths[:, None]).long()

    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=config.new_tokens,
        num_return_sequences=config.samples,
        pad_token_id=0,
        eos_token_id=None,
    )

    def transformers_at(sequences: int) -> None:
        size = max(1, sequences // config.samples)
        with torch.inference_mode():
            for at in range(0, config.batch, size):
                out = theirs.generate(
                    left[at : at + size],
                    attention_mask=mask[at : at + size],
                    generation_config=settings,
                )
                if out.shape[1] != width + config.new_tokens:
                    raise RuntimeError(f"transformers stopped early: {tuple(out.shape)}")

    def ours() -> sampling.Samples:
        return sampling.generate(
            jax.random.key(0),
            loaded.model,
            loaded.params,
            prompts,
            samples=config.samples,
            max_new_tokens=config.new_tokens,
        )

    contenders = {
        f"transformers, {n} at a time": partial(transformers_at, n) for n in config.hf_batches
    }
    times = paired.alternate({"ours": ours, **contenders}, turns=config.turns)
    work = config.batch * config.samples * config.new_tokens
    rates = {name: paired.rate(work, taken) for name, taken in times.items()}
    best = max(contenders, key=lambda name: rates[name].value)
    speedup = paired.ratio(times[best], times["ours"])
    rows_of = {name: {"tokens/s": _whole(rate)} for name, rate in rates.items()}
    rows_of["ours"] |= {"times transformers' best": str(speedup)}
    rows_of["ours"] |= {"compile s": str(paired.compile_seconds(times["ours"]))}
    results.print_table("Drawing responses", rows_of, console=console, caption=_caption(config))
    metrics = {f"transformers/{name}/tokens_per_second": rate for name, rate in rates.items()}
    metrics["transformers/ours/speedup_over_best"] = speedup
    metrics["transformers/ours/compile_seconds"] = paired.compile_seconds(times["ours"])
    return metrics


def sharing(config: Config, console: Console) -> dict[str, Metric]:
    """Each prompt once for K samples against each prompt K times, by prompt length."""
    model = models.language_model(
        _llama(config.width, config.layers, context=max(config.lengths) + config.sharing_new_tokens)
    )
    params = model.init(jax.random.key(0))
    metrics: dict[str, Metric] = {}
    rows: dict[str, dict[str, Metric | str]] = {}
    work = config.sharing_batch * config.samples * config.sharing_new_tokens
    for length in config.lengths:
        shape = (config.sharing_batch, length)
        ids = np.random.default_rng(length).integers(0, model.vocab_size, shape, np.int32)
        lengths = np.full(config.sharing_batch, length, np.int32)
        run = partial(
            sampling.generate,
            jax.random.key(0),
            model,
            params,
            max_new_tokens=config.sharing_new_tokens,
        )
        once = Ragged(jnp.asarray(ids), jnp.asarray(lengths))
        repeated = Ragged(*(jnp.repeat(leaf, config.samples, axis=0) for leaf in once))
        times = paired.alternate(
            {
                "shared": partial(run, once, samples=config.samples),
                "repeated": partial(run, repeated, samples=1),
            },
            turns=config.turns,
        )
        speedup = paired.ratio(times["repeated"], times["shared"])
        rates = {name: paired.rate(work, taken) for name, taken in times.items()}
        rows[f"prompts of {length} tokens"] = {
            **{f"{name}, tokens/s": _whole(rate) for name, rate in rates.items()},
            "speedup": speedup,
        }
        metrics[f"sharing/length {length}/speedup"] = speedup
        for name, rate in rates.items():
            metrics[f"sharing/length {length}/{name}_tokens_per_second"] = rate
    results.print_table(
        f"A prompt once for {config.samples} samples",
        rows,
        console=console,
        caption=_caption(config),
    )
    return metrics


def of_bandwidth(config: Config, bandwidth: float, console: Console) -> dict[str, Metric]:
    """Tokens per second of a 1B model, and its share of what the memory would allow."""
    prompt = 512
    shape = models.ModelConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, layers=16, heads=32,
        kv_heads=8, head_dim=64, max_length=prompt + config.new_tokens,
        dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
    )  # fmt: skip
    model = models.language_model(shape)
    params = jax.jit(model.init)(jax.random.key(0))
    ids = jnp.ones((config.batch, prompt), jnp.int32)
    run = partial(
        sampling.generate, jax.random.key(0), model, params,
        Ragged(ids, jnp.full(config.batch, prompt, jnp.int32)),
        samples=config.samples,
    )  # fmt: skip
    # The difference of a long run and a short one leaves the prefill out.
    times = paired.alternate(
        {
            "long": partial(run, max_new_tokens=config.new_tokens),
            "short": partial(run, max_new_tokens=config.new_tokens // 2),
        },
        turns=config.turns,
    )
    steps = config.new_tokens - config.new_tokens // 2
    seconds = (times["long"].turns - times["short"].turns) / steps
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    per_token = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
    filled = config.samples * 3 * config.new_tokens / 4
    moved = weights + per_token * config.batch * (prompt + filled)
    share = results.mean(moved / (seconds * bandwidth * 1e9))
    rate = results.mean(config.batch * config.samples / seconds)
    results.print_table(
        "A Llama-shaped model of 1B parameters",
        {"ours": {"tokens/s while decoding": _whole(rate), "share of bandwidth": share}},
        console=console,
        caption=_caption(config),
    )
    return {
        "bandwidth/ours/decode_tokens_per_second": rate,
        "bandwidth/ours/share_of_limit": share,
    }


def _llama(width: int, layers: int, *, context: int) -> models.ModelConfig:
    return models.ModelConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=3 * width,
        layers=layers,
        heads=8,
        kv_heads=4,
        head_dim=width // 8,
        max_length=context,
    )


def _whole(metric: Metric) -> str:
    spread = "" if metric.stderr is None else f" ± {metric.stderr:,.0f}"
    return f"{metric.value:,.0f}{spread}"


def _caption(config: Config) -> str:
    facts = paired.machine()
    return (
        f"{facts['processor']}, load average {facts['load_average']}, {config.turns} rounds in "
        "turn; ± is the standard error over rounds"
    )


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Config, description=__doc__))
