"""Candidates for a slice, compiled one after the other; a table of them, the best first."""

from collections.abc import Sequence
from typing import NamedTuple

from jax_klrlhf.plan.chips import GIB, Slice
from jax_klrlhf.plan.report import Plan, collectives
from jax_klrlhf.training.mesh import WIDEST

TENSOR = 8
"""Devices that a layer is cut over at most: one row of a slice of v5e."""


class Candidate(NamedTuple):
    """What was compiled, in the options' own words, and what came of it."""

    options: str
    plan: Plan


def meshes(topology: Slice, *, rows: int) -> list[str]:
    """Meshes for training: ``fsdp`` as wide as is given by default, half of it and whole, and
    ``tensor`` of 1, 2 and 4; those that ``rows`` rows divide over."""
    count, found = topology.size, []
    for tensor in (1, 2, 4):
        rest = count // tensor
        widest = max((n for n in range(1, WIDEST + 1) if rest % n == 0), default=1)
        for fsdp in dict.fromkeys((widest, widest // 2, rest)):
            whole = fsdp > 0 and count % (tensor * fsdp) == 0
            # Nothing is cut over fsdp=1, and an unequal cut is none.
            if whole and rows % rest == 0 and (fsdp > 1 or count == tensor):
                found.append(f"data={rest // fsdp},fsdp={fsdp},tensor={tensor}")
    return list(dict.fromkeys(found))


def tensors(topology: Slice, *, rows: int) -> list[int]:
    """Sizes of ``tensor`` for a sampler whose copies have as many prompts each."""
    powers = [2**n for n in range(TENSOR.bit_length())]
    return [n for n in powers if topology.size % n == 0 and rows % (topology.size // n) == 0]


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """By program; what fits first; by the time until collectives that are waited for are over, or,
    where no peak is known, by what travels; then by memory."""

    def order(one: Candidate) -> tuple[str, bool, float, float]:
        received = sum(kind.received for kind in collectives(one.plan).values())
        took = received if one.plan.exposed is None else one.plan.exposed
        return one.plan.program.name, one.plan.refusal is not None, took, one.plan.total

    return sorted(found, key=order)


def table(found: Sequence[Candidate]) -> str:
    """The candidates as text, :func:`ranked`."""
    wide = max(len(one.options) for one in found)
    head = f"{'program':<12}{'options':<{wide + 2}}{'GiB':>8}{'TFLOP':>9}{'received GB':>13}"
    lines = [f"{head}{'waited GB':>11}{'seconds':>9}{'MFU':>7}"]
    for one in ranked(found):
        plan = one.plan
        line = f"{plan.program.name:<12}{one.options:<{wide + 2}}{plan.total / GIB:>8.2f}"
        if plan.refusal is not None:
            lines.append(f"{line}  does not fit {plan.refusal.has / GIB:.2f} GiB")
            continue
        kinds = collectives(plan).values()
        received, waited = sum(k.received for k in kinds), sum(k.waited for k in kinds)
        line += f"{plan.flops / 1e12:>9.2f}{received / 1e9:>13.2f}{waited / 1e9:>11.2f}"
        if plan.exposed is not None and plan.topology.chip is not None:
            peak = plan.topology.chip.flops * plan.topology.size
            share = plan.program.useful_flops / peak / plan.exposed
            line += f"{plan.exposed:>9.3f}{share:>7.1%}"
        lines.append(line)
    lines += [
        "seconds: arithmetic or memory traffic, the longer, and collectives that are waited for;",
        "MFU: of useful FLOPs in that time",
    ]
    return "\n".join(lines) + "\n"
