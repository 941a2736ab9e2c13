"""Who takes part: ours, whole and with parts switched off, TRL and tunix."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.benchmarks.dpo_parts.options import HOW, Config, Part

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


def contenders(
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


def peers(config: Config, console: Console) -> dict[str, Path]:
    """The interpreters of the peers there are; says how to make those that are absent."""
    found = {}
    for name, python in (("TRL", config.trl_python), ("tunix", config.tunix_python)):
        if python is None:
            console.print(
                f"{name} is not measured: make its environment with\n  {HOW[name]}\n"
                f"and name it by --{name.lower()}-python {name.lower()}/bin/python",
                highlight=False,
                soft_wrap=True,
            )
        else:
            found[name] = python
    return found


def versions(python: Path) -> dict[str, str]:
    """Versions of what matters in a peer's environment."""
    code = (
        "import importlib.metadata as m, json\n"
        "names = ('trl', 'google-tunix', 'torch', 'transformers', 'jax', 'flax')\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in names if n in found}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


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
