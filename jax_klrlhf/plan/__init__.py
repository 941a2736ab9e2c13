"""Will it fit? The library's own programs, compiled ahead of time for a slice of TPUs."""

from jax_klrlhf.plan.chips import CHIPS, read_topology
from jax_klrlhf.plan.command import main
from jax_klrlhf.plan.presets import PRESETS
from jax_klrlhf.plan.program import Program, Shapes, sampler, train_step
from jax_klrlhf.plan.report import Plan, compile_program, table

__all__ = [
    "CHIPS",
    "PRESETS",
    "Plan",
    "Program",
    "Shapes",
    "compile_program",
    "main",
    "read_topology",
    "sampler",
    "table",
    "train_step",
]
