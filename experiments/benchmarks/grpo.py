"""A GRPO step side by side with TRL's GRPOTrainer: sampling, scoring, and the update.

64 prompts x 8 responses x 64 tokens, none of which may end early, on a small pretrained model in
float32: the same loss (group deviation, k3 as a loss, clip 0.2), the same rule as reward, AdamW.
What is timed is whole steps: drawing, the reward, log-probabilities under policy and reference,
the gradient and the update. TRL is run with each of --trl-batches rows at a time (the rest
accumulated); its best is what ours is set against. Contenders take turns, every other round
reversed.

TRL lives in an environment of its own, named by --trl-python.
"""

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import prompts as stories
from experiments import study
from experiments.benchmarks import aloud, paired
from jax_klrlhf import models
from jax_klrlhf.core import group_losses, sequence
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import partition
from jax_klrlhf.results import Metric
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import optimizers, rounds
from jax_klrlhf.training.rounds.parts import ragged

PEER = Path(__file__).parent / "grpo_peer" / "with_trl.py"
HOW = "python3.11 -m venv trl && trl/bin/pip install 'trl==1.16.*' torch==2.13.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Benchmark a GRPO step against TRL; without --trl-python ours alone."""

    model: Path
    """Folder of a pretrained model in Hugging Face's format."""
    prompts: Path
    """Text file of stories; the first sentence of each is a prompt."""
    output: Path = Path("results/benchmarks/grpo")
    """Where results.json goes."""
    trl_python: Path | None = None
    """Interpreter of an environment with TRL."""
    trl_batches: tuple[int, ...] = (512, 128, 64)
    """Rows of TRL's forward and backward pass at one time."""
    trl_threads: int | None = None
    """Threads of torch, one per core unless given."""
    batch: int = 64
    """Prompts of a step."""
    samples: int = 8
    """Responses to each."""
    new_tokens: int = 64
    steps: int = 3
    """Steps of a turn."""
    turns: int = 5
    """Timed rounds."""
    micro_batches: tuple[int, ...] = (1, 4)
    """Pieces of our batch: each is a contender, on one device."""
    kl_coef: float = 0.04
    learning_rate: float = 1e-5
    max_prompt_tokens: int = 32
    """Longer prompts are left out."""

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.trl_python is not None and not self.trl_python.exists():
            raise InputError(f"{self.trl_python}: no such interpreter; make one: {HOW}")
        size = self.batch * self.samples
        for rows in self.trl_batches:
            if size % rows or rows % self.samples:
                raise InputError(f"--trl-batches {rows}: whole groups that divide {size} rows.")
        for pieces in self.micro_batches:
            if self.batch % pieces:
                raise InputError(f"--micro-batches {pieces} must divide --batch {self.batch}.")
        if min(self.steps, self.turns - 1, self.new_tokens) < 1 or self.samples < 2:
            raise InputError("--steps, --new-tokens: at least 1; --turns, --samples: at least 2.")


class Peer:
    """TRL in a process of its own."""

    def __init__(self, config: Config, texts: list[str], rows: int, folder: Path):
        self._log = (folder / f"trl-{rows}.log").open("w")
        self._process = subprocess.Popen(
            [str(config.trl_python), str(PEER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )
        self.versions = self._ask(
            json.dumps(
                {
                    "model": str(config.model.resolve()), "texts": texts, "batch": rows,
                    "prompts": config.batch, "samples": config.samples,
                    "new_tokens": config.new_tokens, "kl_coef": config.kl_coef,
                    "learning_rate": config.learning_rate, "threads": config.trl_threads,
                    "output": str(folder / "trl"),
                }
            )
        )  # fmt: skip
        self._config = config

    def __call__(self) -> None:
        """A turn; every completion must have had its full length."""
        found = self._ask(str(self._config.steps))
        if found["completions/mean_length"] != self._config.new_tokens:
            raise RuntimeError(f"TRL's completions ended early: {found}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise InputError(f"TRL ended by itself; its last words are in {self._log.name}")
        return json.loads(answer)


def ours(config: Config, loaded: models.Loaded, texts: list[str], *, pieces: int, mesh: Any) -> Any:
    """A turn of ours: `rounds.on_policy`, as ``klrlhf iterate --improve.method grpo`` runs it."""
    assert loaded.tokenizer is not None
    encoder = tokenize.encoder(loaded.tokenizer)
    asked = ragged(*sequence.pad([encoder.prompt(text) for text in texts]))
    params = loaded.params
    laid = None
    if mesh is not None:
        laid = partition.shardings(params, mesh)
        params = jax.device_put(params, laid)

    def score(prompts: Any, responses: Any) -> rounds.Scored:
        del prompts
        ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
        reward = np.array(
            [
                [
                    encoder.decode(row[:n].tolist()).count("a") / 8
                    for row, n in zip(g, m, strict=True)
                ]
                for g, m in zip(ids, lengths, strict=True)
            ],
            np.float32,
        )
        return rounds.Scored(reward, np.zeros_like(reward))

    improve = rounds.on_policy(
        loaded.model,
        rounds.Draw(
            model=loaded.model, samples=config.samples, max_new_tokens=config.new_tokens,
            rows=config.batch, mesh=mesh,
        ),
        group_losses.grpo(kl_coef=config.kl_coef),
        fitting=rounds.Fitting(
            optimizer=optimizers.adamw(config.learning_rate, clip=1.0), steps=1,
            batch_size=config.batch, micro_batches=pieces, mesh=mesh, shardings=laid,
        ),
        iterations=config.steps,
        rows=config.batch,
    )  # fmt: skip
    situation = rounds.Situation(
        policies=rounds.Policies(params, params, params, (params,)), start=params,
        data=rounds.Mixture([], None), prompts=asked, score=score, folder=None,
    )  # fmt: skip
    turns = iter(range(10**9))

    def turn() -> Any:
        found = improve(jax.random.key(next(turns)), situation)
        if found.metrics["length/drawn"].value != config.new_tokens:
            raise RuntimeError(f"ours ended early: {found.metrics['length/drawn']}")
        return found.params

    return turn


def main(config: Config, *, console: Console | None = None) -> Path:
    """Warm, measure, print the table and write ``results.json``."""
    here = study.begin("benchmarks/grpo", config, console=console)
    config, console, output = here.config, here.console, here.output
    before = paired.machine()
    loaded = models.load(config.model, param_dtype=jnp.float32, dtype=jnp.float32)
    assert loaded.tokenizer is not None
    encoder = tokenize.encoder(loaded.tokenizer)
    found = stories.first_sentences(config.prompts)
    texts = [t for t in found if len(encoder.prompt(t)) <= config.max_prompt_tokens]
    texts = texts[: config.batch]
    if len(texts) < config.batch:
        raise InputError(f"{config.prompts}: {len(texts)} prompts, but --batch is {config.batch}.")
    one = {
        f"ours, one device, {n} micro-batches": ours(config, loaded, texts, pieces=n, mesh=None)
        for n in config.micro_batches
    }
    mine: dict[str, Callable[[], object]] = dict(one)
    count = max(n for n in range(1, jax.device_count() + 1) if config.batch % n == 0)
    if jax.default_backend() == "cpu" and count > 1:
        mesh = meshes.make(data=count, fsdp=1, devices=jax.devices()[:count])
        mine[f"ours, {count} devices"] = ours(config, loaded, texts, pieces=1, mesh=mesh)
    peers: dict[str, Peer] = {}
    try:
        if config.trl_python is not None:
            for rows in config.trl_batches:
                peers[f"TRL, {rows} rows at a time"] = Peer(config, texts, rows, output)
        times = paired.alternate(aloud.contenders(console, {**mine, **peers}), turns=config.turns)
        versions = {name: peer.versions for name, peer in peers.items()}
    finally:
        for peer in peers.values():
            peer.close()
    work = config.batch * config.samples * config.new_tokens * config.steps
    metrics, table = _summary(work, times, list(mine), list(peers))
    aloud.markdown(
        f"**A GRPO step, {config.batch} prompts x {config.samples} x {config.new_tokens} tokens** "
        f"({before['processor']}, {os.cpu_count()} cores, load {before['load_average']}; "
        f"{config.turns} rounds of {config.steps} steps, ± one standard error over rounds)",
        table,
        console,
    )
    after = paired.machine()["load_average"]
    facts = {"machine": before, "peers": versions, "load_after": after}
    return here.end(metrics, seeds=[0], facts=facts, beside=None)


def _summary(
    work: int, times: dict[str, paired.Times], mine: list[str], peers: list[str]
) -> tuple[dict[str, Metric], dict[str, dict[str, Metric | str]]]:
    rates = {name: paired.rate(work, taken) for name, taken in times.items()}
    metrics = {f"grpo/{name}/tokens_per_second": rate for name, rate in rates.items()}
    table: dict[str, dict[str, Metric | str]] = {
        name: {"tokens/s": f"{rate.value:,.0f} ± {rate.stderr or 0:,.0f}"}
        for name, rate in rates.items()
    }
    for name in mine:
        compiling = paired.compile_seconds(times[name])
        metrics[f"grpo/{name}/compile_seconds"] = compiling
        table[name]["compile s"] = f"{compiling.value:.1f}"
    if peers:
        best = max(peers, key=lambda name: rates[name].value)
        for name in mine:
            times_faster = paired.ratio(times[best], times[name])
            metrics[f"grpo/{name}/speedup_over_best_trl"] = times_faster
            table[name]["times TRL's best"] = (
                f"{times_faster.value:.2f} ± {times_faster.stderr or 0:.2f}"
            )
    return metrics, table


cli = study.entry(main, Config, __doc__, first=paired.device_per_core)

if __name__ == "__main__":
    cli()
