"""How fast responses are drawn, against transformers and against ourselves without shared prompts.

    python -m experiments.benchmarks.sampling --model MODEL --prompts STORIES --output FOLDER

took 1.5 minutes on four quiet cores and prints every turn as it ends. Panels, each paired within
one run (contenders take turns, every other round reversed), each written to ``results.json`` as
soon as it is there:

- ``transformers``: tokens per second on a pretrained model and real prompts, against Hugging Face
  ``generate`` (torch with as many threads as cores; same machine, prompts and law; exactly
  ``--new-tokens`` tokens of every sample on either side, none stopped early). A short sweep over
  its batch sizes finds its best, which is what we are compared with. On CPU there are two of us:
  one JAX device, whose threads share each operation, and one device per core with the prompts
  divided over them by a mesh. The small products of a decoding step
  share badly among threads, so the second is much the faster of the two.
- ``sharing``: the time of our sampler with a prompt read once for its K samples against the same
  sampler given every prompt K times, by prompt length, on a Llama-shaped model of random weights;
  and the bytes of keys and values that each of them keeps.
- ``bandwidth`` (with ``--bandwidth``, in GB/s): tokens per second of a Llama-shaped bfloat16 model
  of about 1B parameters, and the share of the time that moving its weights and caches once per
  step would take at that bandwidth.

Finished rows are neither refilled nor compacted here, because no row finishes early; whether that
would pay on real stories is in the documentation of :func:`jax_klrlhf.models.sampling.sample`.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
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
from jax_klrlhf import models, results
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import sampling
from jax_klrlhf.results import Metric
from jax_klrlhf.training import mesh as meshes


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
    hf_batches: tuple[int, ...] = (64, 256, 512)
    """Sequences at a time for transformers; its best is what we compare with."""
    hf_threads: int | None = None
    """Threads of torch, one per core unless given: beside other programs its threads wait for each
    other hundreds of times longer than they work, and 1 is its best."""
    sweep_turns: int = 2
    """Timed rounds of the sweep that finds it."""
    lengths: tuple[int, ...] = (64, 512, 2048)
    """Prompt lengths of the sharing panel."""
    sharing_batch: int = 4
    """Prompts of the sharing panel."""
    sharing_turns: int = 3
    """Timed rounds of the sharing panel, whose longest prompts take seconds a turn."""
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
    here = study.begin("benchmarks/sampling", config, console=console)
    config, console = here.config, here.console
    metrics: dict[str, Metric] = {}
    before = paired.machine()

    def write() -> Path:
        """What there is so far: a run that is cut short leaves its finished panels."""
        after = paired.machine()["load_average"]
        return here.write(metrics, seeds=[0], facts={"machine": before, "load_after": after})

    if config.model is not None and config.prompts is not None:
        metrics |= against_transformers(config, config.model, config.prompts, console)
        write()
    rows: dict[str, dict[str, Metric | str]] = {}
    for length in config.lengths:
        rows[f"prompts of {length} tokens"], found = sharing(config, length, console)
        metrics |= found
        write()
    if rows:
        _show(f"A prompt once for {config.samples} samples", rows, config.sharing_turns, console)
    if config.bandwidth is not None:
        metrics |= of_bandwidth(config, config.bandwidth, console)
    return write()


def against_transformers(
    config: Config, folder: Path, stories: Path, console: Console
) -> dict[str, Metric]:
    """Tokens per second on the same prompts, ours and theirs."""
    import torch  # pyright: ignore[reportMissingImports]
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

    torch.set_num_threads(config.hf_threads or os.cpu_count() or 1)
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

    def ours(key: Any, params: Any, prompts: Ragged) -> sampling.Samples:
        return sampling.generate(
            key,
            loaded.model,
            params,
            prompts,
            samples=config.samples,
            max_new_tokens=config.new_tokens,
        )

    work = config.batch * config.samples * config.new_tokens
    console.print(f"transformers, {work} tokens a turn, sequences at a time:")
    contenders = aloud.contenders(
        console,
        {f"transformers, {n} at a time": partial(transformers_at, n) for n in config.hf_batches},
    )
    sweep = paired.alternate(contenders, turns=config.sweep_turns)
    found = {name: paired.rate(work, taken) for name, taken in sweep.items()}
    best = max(found, key=lambda name: found[name].value)
    metrics = {f"transformers/{name}/tokens_per_second": rate for name, rate in found.items()}

    mine: dict[str, Callable[[], object]] = {
        "ours": partial(ours, jax.random.key(0), loaded.params, prompts)
    }
    if (spread := _spread(jax.random.key(0), loaded.params, prompts)) is not None:
        count, laid = spread
        mine[f"ours, {count} devices"] = lambda: _on(laid[0], partial(ours, *laid[1:]))
    console.print(f"its best, {best}, and ours:")
    times = paired.alternate(
        {**aloud.contenders(console, mine), best: contenders[best]}, turns=config.turns
    )
    rows = {name: {"tokens/s": _whole(rate)} for name, rate in found.items() if name != best}
    rows[best] = {"tokens/s": _whole(paired.rate(work, times[best]))}
    metrics[f"transformers/{best}/tokens_per_second"] = paired.rate(work, times[best])
    for name in mine:
        speedup = paired.ratio(times[best], times[name])
        rate, compiling = paired.rate(work, times[name]), paired.compile_seconds(times[name])
        rows[name] = {
            "tokens/s": _whole(rate),
            "times transformers' best": _short(speedup),
            "compile s": _short(compiling),
        }
        metrics[f"transformers/{name}/tokens_per_second"] = rate
        metrics[f"transformers/{name}/speedup_over_best"] = speedup
        metrics[f"transformers/{name}/compile_seconds"] = compiling
    _show("Drawing responses", rows, config.turns, console)
    return metrics


def _spread(key: Any, params: Any, prompts: Ragged) -> tuple[int, tuple[Any, ...]] | None:
    """Mesh, key, parameters and prompts over the CPU's devices; None where there is one device, or
    an accelerator, of which one is what we compare with."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if prompts.ids.shape[0] % n == 0)
    if jax.default_backend() != "cpu" or count == 1:
        return None
    mesh = meshes.make(data=count, fsdp=1, devices=devices[:count])
    everywhere = jax.device_put((key, params), jax.NamedSharding(mesh, jax.P()))
    width = sampling.bucket(prompts.ids.shape[1])
    ids = jnp.pad(prompts.ids, ((0, 0), (0, width - prompts.ids.shape[1])))
    rows = jax.device_put(Ragged(ids, prompts.lengths), jax.NamedSharding(mesh, jax.P("data")))
    return count, (mesh, *everywhere, rows)


def _on(mesh: Any, run: Callable[[], Any]) -> Any:
    with jax.set_mesh(mesh):
        return run()


def sharing(
    config: Config, length: int, console: Console
) -> tuple[dict[str, Metric | str], dict[str, Metric]]:
    """Each prompt once for K samples against each prompt K times, for prompts of one length.

    Returns its row of the table, and its metrics.
    """
    model = models.language_model(
        _llama(config.width, config.layers, context=length + config.sharing_new_tokens)
    )
    params = model.init(jax.random.key(0))
    shape = (config.sharing_batch, length)
    ids = np.random.default_rng(length).integers(0, model.vocab_size, shape, np.int32)
    lengths = np.full(config.sharing_batch, length, np.int32)
    once = Ragged(jnp.asarray(ids), jnp.asarray(lengths))
    repeated = Ragged(*(jnp.repeat(leaf, config.samples, axis=0) for leaf in once))
    layouts = {"shared": (once, config.samples), "repeated": (repeated, 1)}

    def kept(prompts: Ragged, samples: int) -> float:
        """MiB of keys and values at the end, by the shapes of the model's own caches."""

        def caches(params: Any, prompts: Ragged) -> Any:
            prefix = model.prefill(params, prompts)
            return prefix.cache, model.start(params, prefix, samples, config.sharing_new_tokens)

        leaves = jax.tree.leaves(jax.eval_shape(caches, params, prompts))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20

    runs = {
        name: partial(
            sampling.generate,
            jax.random.key(0),
            model,
            params,
            prompts,
            samples=samples,
            max_new_tokens=config.sharing_new_tokens,
        )
        for name, (prompts, samples) in layouts.items()
    }
    console.print(f"prompts of {length} tokens, {config.samples} samples of each:")
    times = paired.alternate(aloud.contenders(console, runs), turns=config.sharing_turns)
    work = config.sharing_batch * config.samples * config.sharing_new_tokens
    speedup = paired.ratio(times["repeated"], times["shared"])
    row: dict[str, Metric | str] = {}
    metrics = {f"sharing/length {length}/speedup": speedup}
    for name, (prompts, samples) in layouts.items():
        rate, mebibytes = paired.rate(work, times[name]), Metric(kept(prompts, samples))
        row[f"{name}, tokens/s"] = _whole(rate)
        row[f"{name}, cache MiB"] = f"{mebibytes.value:,.1f}"
        metrics[f"sharing/length {length}/{name}_tokens_per_second"] = rate
        metrics[f"sharing/length {length}/{name}_cache_mebibytes"] = mebibytes
    row["speedup"] = _short(speedup)
    return row, metrics


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
    row: dict[str, Metric | str] = {
        "tokens/s while decoding": _whole(rate),
        "share of bandwidth": _short(share),
    }
    _show("A Llama-shaped model of 1B parameters", {"ours": row}, config.turns, console)
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


def _short(metric: Metric) -> str:
    spread = "" if metric.stderr is None else f" ± {metric.stderr:.2f}"
    return f"{metric.value:.2f}{spread}"


def _show(title: str, rows: Any, turns: int, console: Console) -> None:
    facts = paired.machine()
    note = (
        f"{facts['processor']}, {os.cpu_count()} cores, load average {facts['load_average']}; "
        f"{turns} rounds in turn, ± is the standard error over them"
    )
    aloud.markdown(f"**{title}** ({note})", rows, console)


cli = study.entry(main, Config, __doc__, first=paired.device_per_core)

if __name__ == "__main__":
    cli()
