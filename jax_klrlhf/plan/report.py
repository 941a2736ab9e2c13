"""Compile a program for chips that nobody has rented, and say what it would need.

Times are roofs, not measurements: what the arithmetic, the memory traffic and the interconnect
would each take at the chip's peak. A step takes at least the longest of the three (all
overlapped) and, none overlapped, their sum. The MFU shown is useful FLOPs over peak FLOPs in the
first of these times: the highest that this program could reach.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jax_klrlhf.errors import InputError
from jax_klrlhf.plan import hlo
from jax_klrlhf.plan.chips import GIB, Slice
from jax_klrlhf.plan.cost import Collective, Cost, cost
from jax_klrlhf.plan.program import Program, shard_bytes
from jax_klrlhf.results import Metric

# The compiler counts in GiB and says G.
_REFUSED = re.compile(
    r"\((?P<need>[\d.]+)(?P<need_unit>[KMGT]?)\) exceeds available HBM \((?P<have>[\d.]+)"
    r"(?P<have_unit>[KMGT]?)\)"
    r"|Used (?P<need2>[\d.]+)(?P<need2_unit>[KMGT]?) of "
    r"(?P<have2>[\d.]+)(?P<have2_unit>[KMGT]?) hbm"
)
_WHOLE = ("all-gather", "all-reduce", "reduce-scatter", "collective-broadcast")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The compiler's own out-of-memory answer, in bytes per chip."""

    needs: float
    has: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one program needs on one slice; bytes and FLOPs are of one chip and one run."""

    program: Program
    topology: Slice
    seconds: float
    """That compiling took."""
    arguments: dict[str, int]
    """Bytes of the arguments, by kind."""
    refusal: Refusal | None = None
    peak: int = 0
    """Bytes that the compiler says are in use at one time; 0: it does not say. Less than the sum of
    ``memory``, whose kinds share buffers."""
    memory: dict[str, int] | None = None
    """Bytes by kind, of a program that fits: the arguments, what else comes out, temporaries and
    the program itself."""
    work: Cost | None = None
    text: str = ""
    """The compiled program."""

    @property
    def flops(self) -> float:
        """Of one chip: matrix products, and what attention kernels do at most.

        JAX's splash attention does not declare its FLOPs. In units of a forward pass (two
        products of a query with a key) the kernel of the query's gradient takes 1.5, that of the
        keys' and values' 2. Each pass runs one on each piece of the prompts, and one on responses.
        """
        if self.work is None:
            return 0.0
        units = {"fwd": 1.0, "dq": 1.5, "dkv": 2.0}
        passes = 0.0
        for name, runs in self.work.kernels:
            found = re.match(r"splash_m[hq]a_([a-z]+)", name)
            passes += runs * units.get(found.group(1), 0.0) if found else 0.0
        per_pass = self.program.attention_flops / self.topology.size
        kernels = (1 + self.program.pieces) * self.program.layers
        return self.work.flops + passes / kernels * per_pass

    @property
    def unread(self) -> list[str]:
        """What the FLOPs leave out."""
        known = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
        kernels = [name for name, _ in self.work.kernels] if self.work else []
        other = [f"the FLOPs of kernel {name}" for name in kernels if not known.match(name)]
        return [*other, *(self.work.unread if self.work else [])]

    @property
    def total(self) -> float:
        """Bytes that a chip needs: the compiler's peak, or the sum where it tells none."""
        if self.refusal is not None:
            return self.refusal.needs
        return float(self.peak or sum((self.memory or {}).values()))

    @property
    def roofs(self) -> dict[str, float] | None:
        """Seconds by what would take them; None where no peak is known."""
        chip = self.topology.chip
        if chip is None or self.work is None:
            return None
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.work.bytes / chip.memory_bandwidth,
            "interconnect": sum(map(self._wire, self.work.collectives)),
        }

    def _wire(self, collective: Collective) -> float:
        """Seconds that all runs of a collective take."""
        assert self.topology.chip is not None  # Asked where there are peaks.
        speed = self.topology.ingress(collective.group)
        if collective.kind == "collective-permute":
            # One hop uses one link; the others all that reach the group.
            speed = self.topology.chip.link_bandwidth
        return collective.runs * collective.received / speed

    @property
    def exposed(self) -> float | None:
        """Seconds of arithmetic or memory traffic, whichever is longer, and of the collectives that
        nothing overlaps; None where no peak is known.

        Below it no asynchronous collective is late. Between the overlapped time and the sum.
        """
        if self.roofs is None or self.work is None:
            return None
        waited = [one for one in self.work.collectives if not one.asynchronous]
        return max(self.roofs["arithmetic"], self.roofs["memory"]) + sum(map(self._wire, waited))

    @property
    def mfu(self) -> float | None:
        """The highest model FLOPs utilization that the roofs allow."""
        if self.roofs is None or self.topology.chip is None:
            return None
        peak = self.topology.chip.flops * self.topology.size
        return self.program.useful_flops / peak / max(self.roofs.values())

    @property
    def largest(self) -> Collective | None:
        """The collective with the most entries, of those that hold a whole array on each chip.

        An all-to-all or a permutation moves shards.
        """
        found = self.work.collectives if self.work else []
        found = [one for one in found if one.kind in _WHOLE]
        return max(found, key=lambda one: one.elements, default=None)

    @property
    def gathers_too_much(self) -> bool:
        """Some collective carries a whole vocabulary projection, or all layers at once."""
        largest = self.largest
        landmark = min(self.program.vocabulary, self.program.stack)
        return largest is not None and largest.elements >= landmark


def compile_program(program: Program, topology: Slice) -> Plan:
    """Compile, and read the answer; being refused for memory is an answer.

    Raises:
        InputError: where the compiler refuses for another reason.
    """
    arguments = {kind: shard_bytes(tree) for kind, tree in program.arguments.items()}
    begun = time.perf_counter()
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error))
        if refusal is None:
            raise InputError(
                f"{program.name} on {topology.name}: the compiler says {str(error).splitlines()[0]}"
            ) from error
        return Plan(
            program=program,
            topology=topology,
            seconds=time.perf_counter() - begun,
            arguments=arguments,
            refusal=refusal,
        )
    seconds = time.perf_counter() - begun
    stats, text = compiled.memory_analysis(), compiled.as_text()
    memory = {
        # What the compiler holds beyond the arrays themselves is the padding of tiles.
        **arguments,
        "padding": max(0, stats.argument_size_in_bytes - sum(arguments.values())),
        "new outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    return Plan(
        program=program,
        topology=topology,
        seconds=seconds,
        arguments=arguments,
        peak=_peak(stats),
        memory=memory,
        work=cost(hlo.parse(text)),
        text=text,
    )


def _peak(stats: Any) -> int:
    """The compiler's peak, the program itself included; 0 where it tells too little."""
    peak = int(getattr(stats, "peak_memory_in_bytes", 0))
    if peak < stats.argument_size_in_bytes:
        return 0
    return peak + stats.generated_code_size_in_bytes


def read_refusal(message: str) -> Refusal | None:
    """The bytes in the compiler's out-of-memory message; None where it is another message."""
    found = _REFUSED.search(message)
    if found is None:
        return None
    groups = found.groupdict()
    old = "2" if groups["need2"] else ""
    need, have = (
        float(groups[f"{key}{old}"]) * _UNITS[groups[f"{key}{old}_unit"]]
        for key in ("need", "have")
    )
    return Refusal(needs=need, has=have)


def verdict(plan: Plan) -> str:
    """One line: fits or not, and by how much."""
    if plan.refusal is not None:
        return (
            f"does not fit: needs {plan.refusal.needs / GIB:.2f} of "
            f"{plan.refusal.has / GIB:.2f} GiB"
        )
    if plan.topology.chip is None:
        return f"needs {plan.total / GIB:.2f} GiB on each of {plan.topology.size} CPU devices"
    return f"fits: {plan.total / GIB:.2f} of {plan.topology.chip.memory / GIB:.0f} GiB"


def table(plan: Plan) -> str:
    """The whole plan as text."""
    lines = [f"{plan.program.name} on {plan.topology.name} ({plan.topology.size} devices)"]
    lines += [f"  {verdict(plan)}; the compiler took {plan.seconds:.0f} s", ""]
    kinds = plan.memory if plan.memory is not None else plan.arguments
    title = "memory per chip" if plan.memory is not None else "arguments per chip"
    lines.append(f"  {title:<34}{'GiB':>10}")
    lines += [f"    {kind:<32}{size / GIB:>10.3f}" for kind, size in kinds.items()]
    if plan.work is None:
        return "\n".join(lines) + "\n"
    lines.append(f"    {'at one time':<32}{plan.total / GIB:>10.3f}")
    lines += ["", f"  {'work per chip':<34}{'':>10}"]
    useful = plan.program.useful_flops / plan.topology.size
    lines.append(f"    {'TFLOP':<32}{plan.flops / 1e12:>10.2f}")
    lines.append(f"    {'  of which useful':<32}{useful / 1e12:>10.2f}")
    lines.append(f"    {'GB to and from memory':<32}{plan.work.bytes / 1e9:>10.2f}")
    lines.append(f"    {'GB received from other chips':<32}{_received(plan) / 1e9:>10.2f}")
    title = f"  {'collectives':<22}{'runs':>10}{'largest MB':>14}{'received GB':>14}"
    lines += ["", f"{title}{'waited for GB':>16}"]
    for kind, one in collectives(plan).items():
        line = f"    {kind:<20}{one.runs:>10}{one.largest / 1e6:>14.2f}"
        lines.append(f"{line}{one.received / 1e9:>14.3f}{one.waited / 1e9:>16.3f}")
    lines += ["", *_landmark_lines(plan)]
    if plan.roofs is not None:
        lines += ["", f"  {'seconds at peak':<34}"]
        lines += [f"    {kind:<32}{took:>10.3f}" for kind, took in plan.roofs.items()]
        low, high = max(plan.roofs.values()), sum(plan.roofs.values())
        lines.append(f"    {'overlapped':<32}{low:>10.3f}")
        lines.append(f"    {'collectives waited for apart':<32}{plan.exposed:>10.3f}")
        lines.append(f"    {'one after the other':<32}{high:>10.3f}")
        lines.append(f"    {'MFU, overlapped':<32}{plan.mfu:>10.1%}")
    lines += [f"  not counted: {reason}" for reason in dict.fromkeys(plan.unread)]
    return "\n".join(lines) + "\n"


class Traffic(NamedTuple):
    """Collectives of one kind; bytes are those of one chip."""

    runs: int = 0
    largest: int = 0
    """Of the whole array."""
    received: float = 0.0
    waited: float = 0.0
    """Of the bytes received, those of synchronous collectives, during which nothing else is done.
    """


def collectives(plan: Plan) -> dict[str, Traffic]:
    """What travels, by kind, the most first."""
    found: dict[str, Traffic] = {}
    for one in plan.work.collectives if plan.work else []:
        so_far, received = found.get(one.kind, Traffic()), one.runs * one.received
        found[one.kind] = Traffic(
            so_far.runs + one.runs,
            max(so_far.largest, one.size),
            so_far.received + received,
            so_far.waited + (0.0 if one.asynchronous else received),
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].received))


def metrics(plan: Plan) -> Mapping[str, Metric]:
    """The plan as numbers for ``results.json``."""
    name = plan.program.name.replace(" ", "_")
    numbers: dict[str, Any] = {
        f"fit/{name}/gib": plan.total / GIB,
        f"fit/{name}/fits": float(plan.refusal is None),
        f"fit/{name}/compile_seconds": plan.seconds,
    }
    for kind, size in (plan.memory or plan.arguments).items():
        numbers[f"memory_gib/{name}/{kind}"] = size / GIB
    if plan.work is not None:
        numbers[f"work/{name}/tflop"] = plan.flops / 1e12
        numbers[f"work/{name}/useful_tflop"] = plan.program.useful_flops / plan.topology.size / 1e12
        numbers[f"work/{name}/memory_gb"] = plan.work.bytes / 1e9
        for kind, one in collectives(plan).items():
            numbers[f"collectives/{name}/{kind}_runs"] = one.runs
            numbers[f"collectives/{name}/{kind}_largest_mb"] = one.largest / 1e6
            numbers[f"collectives/{name}/{kind}_received_gb"] = one.received / 1e9
            numbers[f"collectives/{name}/{kind}_waited_gb"] = one.waited / 1e9
    for kind, took in (plan.roofs or {}).items():
        numbers[f"seconds/{name}/{kind}"] = took
    if plan.mfu is not None and plan.exposed is not None:
        numbers[f"seconds/{name}/exposed"] = plan.exposed
        numbers[f"seconds/{name}/mfu"] = plan.mfu
    return {key: Metric(float(value)) for key, value in numbers.items()}


def _received(plan: Plan) -> float:
    return sum(one.received for one in collectives(plan).values())


def _landmark_lines(plan: Plan) -> list[str]:
    largest, program = plan.largest, plan.program
    if largest is None:
        return ["  no collective holds a whole array"]
    source = largest.source[-72:] or "no source"
    size, whole, stack = (
        f"{n / 1e6:.1f} M" for n in (largest.elements, program.vocabulary, program.stack)
    )
    lines = [
        f"  largest collective: {largest.kind} of {size} entries ({source})",
        f"    the whole vocabulary projection has {whole}, the smallest stack of layers {stack}",
    ]
    if plan.gathers_too_much:
        lines.append("    WARNING: that is a whole vocabulary projection, or all layers, at once")
    return lines
