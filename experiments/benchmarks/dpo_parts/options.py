"""What is measured, under which allocator settings, at which size."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from jax_klrlhf.errors import InputError

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
Part = Literal["cached", "live", "breakdown"]


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

    def check(self) -> None:
        """Refuse what cannot run, before anything is prepared."""
        for name in self.settings:
            if name not in SETTINGS:
                raise InputError(f"--settings {name}: choose from {', '.join(SETTINGS)}.")
        if not self.settings or not self.parts or self.turns < 1 or self.batches < 1:
            raise InputError("--settings, --parts, --turns and --batches: at least one of each.")
        if self.hidden_size % self.heads:
            raise InputError(f"--hidden-size {self.hidden_size}: no multiple of {self.heads} heads")
        for flag, name, python in (
            ("--trl-python", "TRL", self.trl_python),
            ("--tunix-python", "tunix", self.tunix_python),
        ):
            if python is not None and not os.access(python, os.X_OK):
                raise InputError(
                    f"{flag} {python}: no interpreter there; make it with: {HOW[name]}"
                )
