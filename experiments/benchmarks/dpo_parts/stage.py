"""Contenders as processes, measured against each other in turn under one allocator setting."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.benchmarks import paired
from experiments.benchmarks.dpo_parts import report
from experiments.benchmarks.dpo_parts.options import SETTINGS, Config
from experiments.benchmarks.dpo_parts.task import THETA, Task
from jax_klrlhf import results
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric

ROOT = Path(__file__).resolve().parents[3]


class Process:
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


class Stage:
    """Contenders that are measured against each other under one allocator setting."""

    def __init__(
        self, config: Config, task: Task, folder: Path, setting: str, peers: Mapping[str, Path]
    ):
        self._config, self._task, self._folder = config, task, folder
        self._setting, self._peers = setting, peers
        self._processes: dict[str, Process] = {}
        self._slots: dict[str, int] = {}
        self._times: dict[str, paired.Times] = {}
        self._peaks: dict[str, tuple[float, float]] = {}
        self._work: dict[str, list[float]] = {}

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.end()

    def start(self, contenders: Mapping[str, Mapping[str, Any]]) -> None:
        """Start every process; they load at the same time."""
        for number, (name, contender) in enumerate(contenders.items()):
            folder = results.output_folder(self._folder / str(number))
            python = self._peers.get(contender["tool"], Path(sys.executable))
            self._processes[name] = Process(
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
        losses = {name: self._processes[name].ask("check")["losses"] for name in asked}
        return report.agreement(losses)

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
        return report.stage(
            title, panel, self._times, self._peaks, self._work, self._slots,
            useful=self._task.useful, console=console,
        )  # fmt: skip

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
