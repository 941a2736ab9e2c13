"""Timing contenders against each other, so that a machine's drift falls on all of them alike."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from jax_klrlhf import results
from jax_klrlhf.results import Metric

PAUSE = 0.2
"""Seconds between turns: thread pools of other libraries spin for a while after their last job."""


class Times(NamedTuple):
    """Seconds of each turn, and of the first call, which compiles."""

    first: float
    turns: np.ndarray


def alternate(contenders: Mapping[str, Callable[[], object]], *, turns: int) -> dict[str, Times]:
    """Run every contender once to warm it, then all of them in turn, every other round reversed."""
    names = list(contenders)
    first = {name: _seconds(contenders[name]) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        for name in names if turn % 2 == 0 else reversed(names):
            time.sleep(PAUSE)
            taken[name].append(_seconds(contenders[name]))
    return {name: Times(first[name], np.array(taken[name])) for name in names}


def rate(work: float, times: Times) -> Metric:
    """Work per second, over the turns."""
    return results.mean(work / times.turns)


def ratio(slow: Times, fast: Times) -> Metric:
    """How many times faster, turn by turn: both ran within seconds of each other."""
    return results.mean(slow.turns / fast.turns)


def compile_seconds(times: Times) -> Metric:
    """The first call less a usual one: tracing and compiling."""
    return Metric(float(max(0.0, times.first - np.median(times.turns))))


def device_per_core(config: object = None) -> None:
    """One CPU device per core, unless the environment has said how many. Before JAX starts."""
    del config
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def machine() -> dict[str, object]:
    """What a timing is worth nothing without: the processor, its cores and how busy it was."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [platform.processor() or platform.machine()]
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "devices": [device.device_kind for device in jax.local_devices()],
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    out = run()
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, Array)])
    return time.perf_counter() - begin
