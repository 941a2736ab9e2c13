"""DPO side by side: this library, TRL and tunix on one machine, one model and the same real pairs.

Every tool trains the same Llama-shaped model from the same weights on the same pairs of token ids,
in float32 with AdamW. Before anything is timed, the losses of the first steps must agree; otherwise
nothing is reported. Each tool is a process of its own, warmed first (compiling apart), and then all
take their turns alternately. What is counted is *useful* tokens: each prompt once, each response
once, no padding.

The pairs are those of whole batches of an epoch of ours (``--layout packed``), taken evenly over
the batch shapes; the peers get the same pairs in random order (TRL also in order of length) in
batches of --batch-size. Allocator settings are equal for all within a table; each tool's best of
them is set against ours. Results are written after every table; after --minutes no other is begun.

TRL and tunix live in environments of their own, named by --trl-python and --tunix-python.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments.benchmarks import paired
from jax_klrlhf import models, results
from jax_klrlhf.data import packing, prepare, tokenize
from jax_klrlhf.data.packing import PackedLoader
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.data.sources import open_source
from jax_klrlhf.errors import InputError, reported
from jax_klrlhf.models.config import Rope
from jax_klrlhf.results import Metric

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "default": {},
    "retain": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(2**26),
    },
    "hugepages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
"""Environments of glibc's allocator: as it is, never giving memory back, transparent huge pages."""
HOW = {
    "TRL": "python3.11 -m venv trl && trl/bin/pip install 'trl==1.16.*' torch==2.13.0",
    "tunix": "python3.11 -m venv tunix && tunix/bin/pip install google-tunix==0.1.7",
}
THETA = 1_000_000.0
"""RoPE's base: the only one that tunix's Llama has, whatever its configuration says."""
AGREEMENT = 1e-3
"""Largest difference of a loss (nats) from ours."""
Part = Literal["cached", "live", "breakdown"]
OFF = {
    "reference cache off": ["cache"],
    "packing off": ["packing"],
    "packing, length buckets off": ["packing", "buckets"],
    "packing, shared prompts off": ["packing", "sharing"],
    "packing, shared prompts off, all logits at once": ["packing", "projection"],
    "attention in one block": ["blocks"],
    "rematerialization off": ["remat"],
}
"""The breakdown: what of ours is switched off (prompts are copied in rectangles alone)."""
TITLES = {
    "cached": "reference cached",
    "live": "reference live",
    "breakdown": "ours, parts off",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Benchmark DPO training against TRL and tunix."""

    data: Path
    """Preference pairs as any program of ours reads them: hh_harmless.jsonl.gz."""
    output: Path = Path("results/benchmarks/dpo")
    """Where results.json goes, and the work folder."""
    trl_python: Path | None = None
    """Interpreter of an environment with TRL."""
    tunix_python: Path | None = None
    """Interpreter of an environment with tunix."""
    parts: tuple[Part, ...] = ("cached", "live", "breakdown")
    """Reference computed before, reference in each step, and ours with parts switched off."""
    settings: tuple[str, ...] = ("default", "retain", "hugepages")
    """Allocator settings to compare under."""
    batches: int = 6
    """Batches of ours whose pairs are trained on in a turn."""
    turns: int = 3
    """Timed turns of each contender under each setting."""
    minutes: float = 14.0
    """No further table is begun that would likely end later than this."""
    check_steps: int = 20
    """Steps whose losses must agree."""
    max_prompt_length: int = 384
    max_response_length: int = 256
    batch_size: int = 8
    """Pairs in a batch of the peers."""
    token_budget: int = 2048
    """Token slots in a batch of ours: about as many pairs as the peers'."""
    max_shapes: int = 8
    """Batch shapes of ours: the default of klrlhf dpo."""
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 8
    heads: int = 8
    learning_rate: float = 1e-4
    kl_coef: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all contenders are given."""

    model: Path
    pairs: list[list[list[int]]]
    """Prompt, chosen and rejected ids."""
    batches: Sequence[tuple[Sequence[Any], list[int]]]
    """Layouts and rows of our batches."""
    check: list[list[list[int]]]
    useful: int
    """Tokens of the pairs, each prompt once."""
    padding: tuple[float, float]
    """Padding fraction of a whole epoch of ours, packed and in as many padded shapes."""


def main(config: Config, *, console: Console | None = None) -> Path:
    """Prepare, check, measure, print the tables and write ``results.json``."""
    console = console or Console()
    began = time.perf_counter()
    peers = _check(config, console)
    output = results.output_folder(config.output)
    work = results.output_folder(output / "work")
    task = _prepare(config, work)
    packed, padded = task.padding
    console.print(
        f"{len(task.pairs)} pairs, {task.useful} useful tokens; padding of an epoch of ours "
        f"{packed:.1%} (in padded batches of as many shapes {padded:.1%})",
        highlight=False,
    )
    metrics: dict[str, Metric] = {
        "data/pairs/number": Metric(len(task.pairs)),
        "data/pairs/useful_tokens": Metric(task.useful),
        "data/ours/padding_fraction": Metric(packed),
        "data/ours/padding_fraction_bucketed": Metric(padded),
    }
    versions = {name: _versions(python) for name, python in peers.items()}

    def write() -> Path:
        return results.write_results(
            output,
            name="benchmarks/dpo",
            config={
                **dataclasses.asdict(config),
                "machine": paired.machine(),
                "peers": versions,
            },
            seeds=[0],
            seconds=time.perf_counter() - began,
            metrics=metrics,
        )

    found: dict[str, dict[str, dict[str, paired.Times]]] = {"cached": {}, "live": {}}
    agreed, longest = False, 0.0
    for part, setting in _stages(config):
        start = time.perf_counter() - began
        if start + longest > 60 * config.minutes:
            console.print(f"left out for lack of time: {part}, allocator {setting}")
            continue
        console.print(f"{start:.0f} s: {part}, allocator {setting}", highlight=False)
        with _Stage(config, task, work / f"{part}-{setting}", setting, peers) as run:
            everything = setting == config.settings[0]
            run.start(_contenders(part, peers, heads=config.heads, everything=everything))
            if not agreed:
                metrics |= run.agree()
                agreed = True
            times = run.measure(console)
            if part in found:
                found[part][setting] = times
            metrics |= run.report(
                f"{TITLES[part]}, allocator {setting}", f"{part} {setting}", console
            )
        longest = max(longest, time.perf_counter() - began - start)
        write()
    metrics |= _at_best(found, task.useful, console)
    path = write()
    console.print(f"{path}, in {time.perf_counter() - began:.0f} s", highlight=False)
    return path


def _stages(config: Config) -> list[tuple[Part, str]]:
    """What to measure, in order of worth: all parts as the system is, then other allocators."""
    first, *others = config.settings
    stages: list[tuple[Part, str]] = [(part, first) for part in config.parts]
    return stages + [(p, s) for s in others for p in config.parts if p != "breakdown"]


def _contenders(
    part: Part, peers: Mapping[str, Path], *, heads: int, everything: bool
) -> dict[str, Any]:
    """Who takes part; those that trade speed for memory only where ``everything`` is wanted."""
    if part == "breakdown":
        return {"ours": _ours()} | {name: _ours(*off) for name, off in OFF.items()}
    off = [] if part == "cached" else ["cache"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    found = {"ours": _ours(*off)}
    if cores > 1 and heads % cores == 0:
        found["ours, a device per core"] = _ours(*off, devices=cores)
    if "TRL" in peers and part == "cached":
        found |= {"TRL": _trl("cached"), "TRL, by length": _trl("cached", grouped=True)}
        if everything:
            found["TRL, checkpointing"] = _trl("cached", grouped=True, checkpointing=True)
    elif "TRL" in peers:
        found |= {"TRL": _trl("live"), "TRL, by length": _trl("live", grouped=True)}
    if "tunix" in peers and part == "cached":
        found["tunix, no reference"] = _tunix("none")
    elif "tunix" in peers:
        found["tunix"] = _tunix("live")
        if everything:
            found["tunix, remat"] = _tunix("live", remat="DECODER")
    return found


def _check(config: Config, console: Console) -> dict[str, Path]:
    """The peers there are; says how to make those that are absent."""
    for name in config.settings:
        if name not in SETTINGS:
            raise InputError(f"--settings {name}: choose from {', '.join(SETTINGS)}.")
    if not config.settings or not config.parts or config.turns < 1 or config.batches < 1:
        raise InputError("--settings, --parts, --turns and --batches: at least one of each.")
    if config.hidden_size % config.heads:
        raise InputError(f"--hidden-size {config.hidden_size}: no multiple of {config.heads} heads")
    peers = {}
    for name, python in (("TRL", config.trl_python), ("tunix", config.tunix_python)):
        flag = f"--{name.lower()}-python"
        if python is None:
            console.print(
                f"{name} is not measured: make its environment with\n  {HOW[name]}\n"
                f"and name it by {flag} {name.lower()}/bin/python",
                highlight=False,
                soft_wrap=True,
            )
        elif not os.access(python, os.X_OK):
            raise InputError(f"{flag} {python}: no interpreter there; make it with: {HOW[name]}")
        else:
            peers[name] = python
    return peers


def _prepare(config: Config, work: Path) -> Task:
    """Tokenizer, token ids, model and batches, all from the data and fixed seeds."""
    source = open_source(str(config.data))
    # Prompt and responses one by one, which is how rows are encoded.
    texts = [
        text
        for example in source.examples()
        for text in (example.prompt, *example.responses)
        if isinstance(text, str)
    ]
    tokenizer = tokenize.train_tokenizer(
        texts, vocab_size=config.vocab_size, folder=work / "tokenizer"
    )
    data = prepare.build(
        str(config.data),
        tokenizer,
        work / "data",
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
    )["train"]
    if data.responses != 2:
        raise InputError(f"{config.data}: {data.responses} responses to a prompt; pairs are wanted")
    settings: dict[str, Any] = {
        "token_budget": config.token_budget,
        "max_shapes": config.max_shapes,
    }
    # A rectangle for each shape: attention then wastes least, which is what a CPU spends most on.
    layouts = packing.fit(data.lengths, **settings, rectangles=config.max_shapes)
    loader = PackedLoader(data.fetch, data.lengths, layouts=layouts, seed=0)
    padded = data.loader(seed=0, **settings).padding_fraction
    pieces = sorted(loader.epoch(0), key=lambda piece: piece[0].groups[0].row_slots)
    count = min(config.batches, len(pieces))
    # Every n-th of the batches in order of shape: a small epoch of the same make-up.
    taken = [pieces[math.floor((k + 0.5) * len(pieces) / count)] for k in range(count)]
    taken = [(layout, streams[streams >= 0]) for layout, streams in taken]
    rows = np.random.default_rng(0).permutation(np.concatenate([held for _, held in taken]))
    place = {int(row): number for number, row in enumerate(rows)}
    held = [
        ((tuple(layout.groups[0]), layout.tokens, layout.answers), [place[int(n)] for n in numbers])
        for layout, numbers in taken
    ]
    used = data.lengths.prompts[rows].sum() + data.lengths.responses[rows].sum()
    model = models.ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_length=config.max_prompt_length + config.max_response_length,
        tied=False,
        ropes=(Rope(theta=THETA),),
    )
    params = jax.jit(models.language_model(model).init)(jax.random.key(0))
    folder = models.save(work / "model", model, params, tokenizer)
    return Task(
        model=folder,
        pairs=_ids(data, rows),
        batches=held,
        check=_ids(data, _short(data, config)),
        useful=int(used),
        padding=(loader.padding_fraction, padded),
    )


def _short(data: Prepared, config: Config) -> np.ndarray:
    """Rows for the check: drawn from the shorter half, where all steps are quick."""
    longest = data.lengths.prompts + data.lengths.longest
    half = np.argsort(longest, kind="stable")[: max(1, len(longest) // 2)]
    drawn = np.random.default_rng(1).permutation(half)
    return np.resize(drawn, config.check_steps * config.batch_size)


def _ids(data: Prepared, rows: np.ndarray) -> list[list[list[int]]]:
    return [[row.prompt, *row.responses] for row in data.fetch(rows.tolist())]


def _ours(*without: str, devices: int = 1) -> dict[str, Any]:
    return {"tool": "ours", "module": "with_ours", "without": list(without), "devices": devices}


def _trl(reference: str, *, grouped: bool = False, checkpointing: bool = False):
    return {
        "tool": "TRL",
        "module": "with_trl",
        "reference": reference,
        "grouped": grouped,
        "checkpointing": checkpointing,
    }


def _tunix(reference: str, *, remat: str = "NONE") -> dict[str, Any]:
    return {"tool": "tunix", "module": "with_tunix", "reference": reference, "remat": remat}


class _Process:
    """A contender's process, its job and its log."""

    def __init__(self, name: str, python: Path, job: Mapping[str, Any], folder: Path, env: Any):
        self.name = name
        self._log = folder / "log.txt"
        path = folder / "job.json"
        path.write_text(json.dumps(job))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", f"experiments.benchmarks.dpo_peers.{job['module']}", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ
                | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(job.get("devices", 1))}
                | env,
            )

    def ask(self, command: str | None = None) -> dict[str, Any]:
        """Send a command, if any, and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            if command is not None:
                self._process.stdin.write(command + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # It has ended: said below, with the log.
        if not line:
            last = self._log.read_text().strip().splitlines()[-1:] or ["no message"]
            raise InputError(f"{self.name} failed: {last[0]} (log: {self._log})")
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class _Stage:
    """Contenders that are measured against each other under one allocator setting."""

    def __init__(
        self, config: Config, task: Task, folder: Path, setting: str, peers: Mapping[str, Path]
    ):
        self._config, self._task, self._folder = config, task, folder
        self._setting, self._peers = setting, peers
        self._processes: dict[str, _Process] = {}
        self._slots: dict[str, int] = {}
        self._times: dict[str, paired.Times] = {}
        self._peaks: dict[str, tuple[float, float]] = {}
        self._work: dict[str, list[float]] = {}

    def __enter__(self) -> "_Stage":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.end()

    def start(self, contenders: Mapping[str, Mapping[str, Any]]) -> None:
        """Start every process; they load at the same time."""
        for number, (name, contender) in enumerate(contenders.items()):
            folder = results.output_folder(self._folder / str(number))
            python = self._peers.get(contender["tool"], Path(sys.executable))
            self._processes[name] = _Process(
                name, python, self._job(contender), folder, SETTINGS[self._setting]
            )
        for name, process in self._processes.items():
            self._slots[name] = process.ask()["slots"]

    def agree(self) -> dict[str, Metric]:
        """Losses of the first steps from the same weights; raises where they differ from ours.

        Contenders without the reference in their loss have another, and are left out; so are
        parts of ours switched off, whose equality the tests of scoring hold.
        """
        asked = [n for n in self._processes if n in ("ours", "ours, a device per core", "TRL")]
        return agreement({name: self._processes[name].ask("check")["losses"] for name in asked})

    def measure(self, console: Console) -> dict[str, paired.Times]:
        """Warm them one by one, then time them in turn, every other round reversed."""
        warmed = {}
        for name, process in self._processes.items():
            # Side by side they would take far longer: torch's threads spin where cores are short.
            begin = time.perf_counter()
            warmed[name] = process.ask("warm")
            seconds = time.perf_counter() - begin
            console.print(f"  {name}: compiled and warm in {seconds:.0f} s", highlight=False)
        taken: dict[str, list[float]] = {name: [] for name in self._processes}
        self._work = {name: [] for name in self._processes}
        training = dict.fromkeys(self._processes, 0.0)
        for turn in range(self._config.turns):
            names = list(self._processes)
            for name in names if turn % 2 == 0 else reversed(names):
                time.sleep(paired.PAUSE)
                answer = self._processes[name].ask("turn")
                taken[name].append(answer["seconds"])
                self._work[name].append(answer["cpu_seconds"])
                training[name] = answer["peak"]
            said = ", ".join(f"{name} {seconds[-1]:.1f}" for name, seconds in taken.items())
            console.print(f"  turn {turn + 1}, seconds: {said}", highlight=False, soft_wrap=True)
        self._times = {name: paired.Times(0.0, np.array(t)) for name, t in taken.items()}
        self._peaks = {name: (warmed[name]["peak"], training[name]) for name in taken}
        return self._times

    def report(self, title: str, panel: str, console: Console) -> dict[str, Metric]:
        """Print the table; the metrics of it."""
        metrics, rows = {}, {}
        for name, times in self._times.items():
            speed = paired.rate(self._task.useful, times)
            ratio = paired.ratio(times, self._times["ours"])
            whole, training = self._peaks[name]
            whole = max(whole, training)
            metrics |= {
                f"{panel}/{name}/tokens_per_second": speed,
                f"{panel}/{name}/ours_is_faster": ratio,
                f"{panel}/{name}/core_seconds": results.mean(self._work[name]),
                f"{panel}/{name}/slots_per_token": Metric(self._slots[name] / self._task.useful),
                f"{panel}/{name}/peak_mebibytes": Metric(whole),
                f"{panel}/{name}/training_peak_mebibytes": Metric(training),
            }
            rows[name] = {
                "useful tokens/s": _plus_minus(speed, 0),
                "ours is faster": "" if name == "ours" else _plus_minus(ratio, 2),
                "core-seconds": f"{np.mean(self._work[name]):.1f}",
                "slots per token": f"{self._slots[name] / self._task.useful:.2f}",
                "peak MiB": f"{whole:,.0f}",
                "while training": f"{training:,.0f}",
            }
        results.print_table(title, rows, console=console)
        return metrics

    def _job(self, contender: Mapping[str, Any]) -> dict[str, Any]:
        task, config = self._task, self._config
        pairs = task.pairs
        if contender.get("grouped"):
            pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(map(len, pair[1:])))
        return {
            **contender,
            "model": str(task.model.resolve()),
            "pairs": pairs,
            "batches": task.batches,
            "check": task.check,
            "batch_size": config.batch_size,
            "lengths": [config.max_prompt_length, config.max_response_length],
            "learning_rate": config.learning_rate,
            "kl_coef": config.kl_coef,
            "rope_theta": THETA,
        }


def agreement(losses: Mapping[str, Sequence[float]]) -> dict[str, Metric]:
    """First and last loss of each, and how far it strays from ours; raises where that is too far.

    Raises too where agreement would say nothing: the reference is not pi0, or nothing moved.
    """
    ours = np.asarray(losses["ours"])
    first, last = float(ours[0]), float(ours[-1])
    if not abs(first - math.log(2)) < AGREEMENT:
        raise InputError(f"the first loss is {first:.5f}, not ln 2: the reference is not pi0")
    if len(ours) > 1 and not abs(first - last) > 10 * AGREEMENT:
        raise InputError(
            f"the loss moved by {abs(first - last):.1e} only in {len(ours)} steps, so agreement "
            "would say nothing: raise --learning-rate"
        )
    metrics = {}
    for name, found in losses.items():
        apart = float(np.abs(np.asarray(found) - ours).max()) if len(found) == len(ours) else np.inf
        if not apart < AGREEMENT:
            raise InputError(
                f"{name} computes another loss: {apart:.1e} apart within {len(ours)} steps, "
                f"allowed {AGREEMENT}; nothing is reported"
            )
        metrics |= {
            f"agreement/{name}/first_loss": Metric(float(found[0])),
            f"agreement/{name}/last_loss": Metric(float(found[-1])),
            f"agreement/{name}/largest_difference": Metric(apart, n=len(ours)),
        }
    return metrics


def _at_best(
    found: Mapping[str, Mapping[str, Mapping[str, paired.Times]]], useful: int, console: Console
) -> dict[str, Metric]:
    """Every contender under the setting that suits it best, against ours under its own."""
    metrics, rows = {}, {}
    for part, by_setting in found.items():
        names = dict.fromkeys(name for times in by_setting.values() for name in times)
        best = {}
        for name in names:
            # Those that trade speed for memory take part under the first setting alone.
            rates = {
                setting: paired.rate(useful, times[name])
                for setting, times in by_setting.items()
                if name in times
            }
            setting = max(rates, key=lambda s: rates[s].value)
            best[name] = setting, rates[setting]
        for name, (setting, speed) in best.items():
            ratio = _quotient(best["ours"][1], speed)
            metrics[f"best {part}/{name}/tokens_per_second"] = speed
            metrics[f"best {part}/{name}/ours_is_faster"] = ratio
            rows[f"{name}, reference {part}"] = {
                "allocator": setting,
                "useful tokens/s": _plus_minus(speed, 0),
                "ours is faster": "" if name == "ours" else _plus_minus(ratio, 2),
            }
    if rows:
        results.print_table("each at its best allocator setting", rows, console=console)
    return metrics


def _quotient(first: Metric, second: Metric) -> Metric:
    """Ratio of independent means, its error to first order."""
    value = first.value / second.value
    if first.stderr is None or second.stderr is None:
        return Metric(value)
    spread = math.hypot(first.stderr / first.value, second.stderr / second.value)
    return Metric(value, value * spread, first.n)


def _plus_minus(metric: Metric, digits: int) -> str:
    text = f"{metric.value:,.{digits}f}"
    return text if metric.stderr is None else f"{text} ± {metric.stderr:,.{digits}f}"


def _versions(python: Path) -> dict[str, str]:
    """Versions of what matters in a peer's environment."""
    code = (
        "import importlib.metadata as m, json\n"
        "names = ('trl', 'google-tunix', 'torch', 'transformers', 'jax', 'flax')\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in names if n in found}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Config, description=__doc__))
