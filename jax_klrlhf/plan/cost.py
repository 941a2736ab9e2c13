r"""What a compiled program does, counted from its text.

XLA's own ``cost_analysis()`` counts the body of a loop once. Here the text of the compiled module
(HLO, after partitioning: the program of *one* device) is read, every loop's trip count is found,
and operations, memory traffic and collectives are added up with the counts multiplied through.

- FLOPs are those of ``dot`` and ``convolution`` (the form in which the TPU compiler writes matrix
  products): twice the number of multiply-adds that do not fall on padding.
- Bytes are those that operations outside of fusions read from and write to main memory; operands
  that the compiler placed in on-chip memory (``S(1)`` in their layout) are not counted, and of an
  operand that is only sliced the slice is.
- A collective's ``size`` is that of the *whole* array over the group: what an all-gather makes,
  what an all-reduce or reduce-scatter takes in.

Loops whose end depends on data (sampling stops when all rows have) count as if they ran to the
bound in their condition.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from jax_klrlhf.plan.hlo import Instruction, Module, Shape

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Operations that move nothing: views, names, and the pieces of asynchronous ones.
_FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "partition-id", "replica-id", "domain"),
    *("opt-barrier", "optimization-barrier", "send", "send-done", "recv", "recv-done"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done"),
}


class Collective(NamedTuple):
    """One collective operation, with how often a run of the program executes it."""

    kind: str
    size: int
    """Bytes of the whole array over the group, in one execution."""
    elements: int
    group: int
    """Devices that take part together."""
    runs: int
    source: str
    """The operation of the JAX program that it was made for."""
    asynchronous: bool = False
    """Begun and waited for apart, with other work between."""

    @property
    def received(self) -> float:
        """Bytes that a device receives in one execution (ring algorithms)."""
        share = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            return 2 * share * self.size
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.size)
        return share * self.size


@dataclass
class Cost:
    """What one device does in one run of the program."""

    flops: int = 0
    bytes: int = 0
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[tuple[str, int]] = field(default_factory=list)
    """Kernels that do not declare their FLOPs, and how often each is run."""
    unread: list[str] = field(default_factory=list)
    """What could not be counted: loops without a bound."""


def cost(module: Module) -> Cost:
    """Add up a module, loops multiplied by their trip counts."""
    total, seen = Cost(), set()
    _visit(module, module.entry, 1, module.entry, False, total, seen)
    return total


def trips(module: Module, computation: dict[str, Instruction], loop: Instruction) -> int | None:
    """How often a ``while`` runs its body; its bound where the end depends on data.

    The CPU compiler writes the number beside the loop. The TPU compiler does not: it is read off
    a condition ``counter < bound``, with the counter's start and step. None where there is none.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called("condition") or ""]
    body = module.computations[loop.called("body") or ""]
    bounds = []
    for where, line, outer in _flat(module, condition):
        if line.opcode != "compare" or len(line.operands) != 2:
            continue
        direction = re.search(r"direction=(\w+)", line.attributes)
        left, right = (_resolve(where, name, outer) for name in line.operands)
        if direction and direction.group(1) in ("GT", "GE"):
            left, right = right, left
        if left is None or right is None or direction is None:
            continue
        if left.opcode != "get-tuple-element" or right.opcode != "constant":
            continue
        index, bound = int(left.attributes.split("index=")[1].split(",")[0]), _integer(right)
        start, step = _start(module, computation, loop, index), _step(module, body, index)
        if bound is not None and step > 0:
            last = bound + 1 if direction.group(1) in ("LE", "GE") else bound
            bounds.append(max(0, -(-(last - start) // step)))
    return min(bounds) if bounds else None


def _visit(
    module: Module, name: str, times: int, control: str, fused: bool, total: Cost, seen: set
) -> None:
    """Add ``times`` runs of one computation; ``control`` is the one outside of all fusions."""
    computation = module.computations[name]
    for line in computation.values():
        opcode = line.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            # One asynchronous collective of the TPU compiler is spread over several fusions, with
            # one channel; outside of fusions different collectives may share a channel.
            channel = re.search(r"channel_id=(\d+)", line.attributes)
            key = (control, opcode, channel.group(1), line.bytes) if channel and fused else None
            if key is None or key not in seen:
                seen.add(key)
                total.collectives.append(_collective(module, name, line, opcode, times))
                if _group(line, module.partitions) is None:
                    total.unread.append(f"the groups of {line.name}: all devices are taken for one")
        elif opcode == "dot":
            total.flops += times * _dot_flops(computation, line)
        elif opcode == "convolution":
            total.flops += times * _convolution_flops(computation, line)
        elif opcode == "custom-call":
            _custom_call(line, times, total)
        elif opcode == "while":
            count = trips(module, computation, line)
            if count is None:
                total.unread.append(f"loop {line.name} has no bound: its body is counted once")
            body = line.called("body") or ""
            _visit(module, body, times * (1 if count is None else count), body, False, total, seen)
        elif opcode == "conditional":
            _branches(module, line, times, control, total, seen)
        elif opcode == "fusion":
            _visit(module, line.called("calls") or "", times, control, True, total, seen)
        elif opcode in ("call", "async"):
            inner = line.called("to_apply") or line.called("calls")
            before = len(total.collectives)
            if inner:
                _visit(module, inner, times, control, fused, total, seen)
            if opcode == "async":
                begun = total.collectives[before:]
                total.collectives[before:] = [one._replace(asynchronous=True) for one in begun]
        if not fused:
            total.bytes += times * _traffic(module, computation, line)


def _branches(module, line: Instruction, times: int, control: str, total: Cost, seen: set) -> None:
    """Of a conditional the costliest branch counts."""
    names = re.search(r"branch_computations=\{([^}]*)\}", line.attributes)
    branches = re.findall(r"[\w.\-]+", names.group(1)) if names else []
    for key in ("true_computation", "false_computation"):
        found = line.called(key)
        branches += [found] if found else []
    parts = []
    for branch in branches:
        part = Cost()
        _visit(module, branch, times, control, False, part, seen)
        parts.append(part)
    if parts:
        worst = max(parts, key=lambda part: (part.flops, part.bytes))
        total.flops += worst.flops
        total.bytes += worst.bytes
        for part in parts:
            total.collectives += part.collectives
            total.kernels += part.kernels
            total.unread += part.unread


def _custom_call(line: Instruction, times: int, total: Cost) -> None:
    """A kernel's cost is what its author declared (``pallas_call(cost_estimate=...)``)."""
    if 'custom_call_target="tpu_custom_call"' not in line.attributes:
        return
    found = _declared(line, "flops")
    if found is None:
        total.kernels.append((line.name, times))
    else:
        total.flops += times * found


def _declared(line: Instruction, what: str) -> int | None:
    """A number of a kernel's declared cost; None where it declares none."""
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{what}":"?(\d+)', line.attributes)
    return int(found.group(1)) if found else None


def _collective(
    module: Module, where: str, line: Instruction, opcode: str, times: int
) -> Collective:
    computation = module.computations[where]
    kind, group = opcode, _group(line, module.partitions) or module.partitions
    taken = [s for name in line.operands for s in computation[name].shapes]
    made = list(line.shapes)
    if line.opcode.endswith("-start") and kind != "all-reduce":
        # The result repeats the operands, then the arrays made, then flags.
        made = made[len(taken) : 2 * len(taken)]
    if kind == "all-reduce" and "reduce-scatter" in where:
        kind = "reduce-scatter"  # A fusion that reduces and keeps a shard: TPU's reduce-scatter.
    shapes = taken if kind == "reduce-scatter" else made
    source = re.search(r'op_name="([^"]*)"', line.attributes)
    return Collective(
        kind=kind,
        size=sum(shape.bytes for shape in shapes),
        elements=sum(shape.elements for shape in shapes),
        group=group,
        runs=times,
        source=source.group(1) if source else "",
        asynchronous=line.opcode.endswith("-start")
        or any("AsyncCollective" in other.attributes for other in computation.values()),
    )


def _group(line: Instruction, partitions: int) -> int | None:
    """Devices in a group, from any of the ways in which groups are written; None: in another."""
    if line.opcode.startswith("collective-permute"):
        return 2
    text = line.attributes
    # Of devices in an order of their own: mesh['a'=16,'b'=4], device_ids=([4,16]T(1,0)) {'a'}.
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*(?:\S*\s)?\{([^}]*)\}"
    if found := re.search(mesh, text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found.group(2))
        return prod(int(part) if part else sizes[axis] for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found.group(1).split(","))
    everyone = "replica_groups=" not in text or "replica_groups={}" in text
    return partitions if everyone else None


def _dot_flops(computation: dict[str, Instruction], line: Instruction) -> int:
    left = computation[line.operands[0]].shapes[0].dims
    contracted = prod(left[axis] for axis in line.numbers("lhs_contracting_dims"))
    return 2 * line.shapes[0].elements * contracted


def _convolution_flops(computation: dict[str, Instruction], line: Instruction) -> int:
    """Multiply-adds on true entries: a batched product is a convolution that is mostly padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    if labels is None:
        return 0
    left, right, out = (
        dict(zip(names, dims, strict=True))
        for names, dims in zip(
            labels.groups(),
            (
                *(computation[name].shapes[0].dims for name in line.operands[:2]),
                line.shapes[0].dims,
            ),
            strict=True,
        )
    )
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    settings = dict(part.split("=") for part in window.group(1).split()) if window else {}
    flops = 2 * out["b"] * out["f"] * right["i"]
    for axis in (name for name in out if name.isdigit()):
        at = int(axis)

        def setting(key: str, default: str, at: int = at) -> str:
            return settings[key].split("x")[at] if key in settings else default

        low = int(setting("pad", "0_0").split("_")[0])
        dilation = int(setting("lhs_dilate", "1"))
        position = (
            np.arange(out[axis])[:, None] * int(setting("stride", "1"))
            + np.arange(right[axis])[None] * int(setting("rhs_dilate", "1"))
            - low
        )
        inside = (position >= 0) & (position <= (left[axis] - 1) * dilation)
        flops *= int((inside & (position % dilation == 0)).sum())
    return flops


def _traffic(module: Module, computation: dict[str, Instruction], line: Instruction) -> int:
    """Bytes between main memory and the cores for one operation outside of fusions."""
    if line.opcode in _FREE:
        return 0
    operands = [computation[name] for name in line.operands if name in computation]
    if line.opcode == "copy-start":
        return sum(s.bytes for s in line.shapes[:2] if not s.on_chip)
    if line.opcode == "slice-start":  # (source, slice, flag)
        source, made = line.shapes[:2]
        return made.bytes * ((not source.on_chip) + (not made.on_chip))
    if line.opcode == "custom-call" and "AllocateBuffer" in line.attributes:
        return 0
    if line.opcode == "custom-call" and (size := _declared(line, "bytes_accessed")) is not None:
        return size  # Of a stack of which it reads a part, say.
    if line.opcode == "dynamic-slice":
        return 2 * _outside(line.shapes)
    if line.opcode == "dynamic-update-slice":
        return 2 * _outside(operands[1].shapes) if len(operands) > 1 else 0
    if line.opcode != "fusion":
        return _outside(line.shapes) + sum(_outside(o.shapes) for o in operands)
    inner = module.computations[line.called("calls") or ""]
    parameters = {int(i.inside): i.name for i in inner.values() if i.opcode == "parameter"}
    read = sum(
        min(operand.bytes, _read(module, inner, parameters[number]))
        for number, operand in enumerate(operands)
        if len(operand.shapes) == 1 and not operand.shapes[0].on_chip
    )
    return read + _fusion_written(inner, line)


def _read(module: Module, inner: dict[str, Instruction], name: str) -> int:
    """Bytes that a fusion reads of one of its values: of what is only sliced, the slices."""
    size = 0
    for user in inner.values():
        if name not in user.operands or user.opcode in ("tuple", *COLLECTIVES):
            continue  # Handed on; the buffers of an asynchronous collective are.
        if user.opcode == "custom-call" and "AsyncCollective" in user.attributes:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            size += user.bytes
        elif user.opcode == "bitcast" or (user.opcode == "copy" and not user.root):
            size += _read(module, inner, user.name)
        elif user.opcode == "fusion":
            deeper = module.computations[user.called("calls") or ""]
            number = str(user.operands.index(name))
            parameter = next(
                i for i in deeper.values() if i.opcode == "parameter" and i.inside == number
            )
            if not _passes(deeper, parameter.name):
                size += _read(module, deeper, parameter.name)
            elif user.root:  # All of it is what the fusion makes.
                return inner[name].bytes
            else:
                size += _read(module, inner, user.name)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return inner[name].bytes
    return size


def _passes(inner: dict[str, Instruction], name: str) -> bool:
    """Whether a nested fusion's result is one of its values in another shape or layout, which it
    hands on entry by entry: what is read of it is what its users read."""
    root = next(i for i in inner.values() if i.root)
    while root.opcode in ("bitcast", "copy") and root.operands[0] in inner:
        root = inner[root.operands[0]]
    return root.name == name


def _fusion_written(inner: dict[str, Instruction], line: Instruction) -> int:
    """Bytes that a fusion writes: of an array updated in place, the update."""
    root = next(i for i in inner.values() if i.root)
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    size = 0
    for part, shape in zip(parts, line.shapes, strict=False):
        while part.opcode == "bitcast" and part.operands[0] in inner:
            part = inner[part.operands[0]]
        if shape.on_chip or part.opcode in ("parameter", *COLLECTIVES):
            continue
        if part.opcode == "custom-call" and "AsyncCollective" in part.attributes:
            continue
        updated = part.opcode == "dynamic-update-slice"
        size += inner[part.operands[1]].bytes if updated else shape.bytes
    return size


def _outside(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _flat(module: Module, computation: dict[str, Instruction]) -> Iterator:
    """Lines of a computation and of the fusions in it, with what their parameters stand for."""
    for line in computation.values():
        yield computation, line, None
        if line.opcode == "fusion":
            inner = module.computations[line.called("calls") or ""]
            for deeper in inner.values():
                yield inner, deeper, (computation, line)


def _resolve(where: dict[str, Instruction], name: str, outer) -> Instruction | None:
    """What a name stands for, through copies and out of a fusion."""
    line = where.get(name)
    while line is not None and line.opcode in ("copy", "bitcast", "convert") and line.operands:
        line = where.get(line.operands[0])
    if line is not None and line.opcode == "parameter" and outer is not None:
        computation, fusion = outer
        return _resolve(computation, fusion.operands[int(line.inside)], None)
    return line


def _integer(line: Instruction) -> int | None:
    return int(line.inside) if re.fullmatch(r"-?\d+", line.inside) else None


def _start(
    module: Module, computation: dict[str, Instruction], loop: Instruction, index: int
) -> int:
    """First value of a loop's counter: a constant, or where the loop before it left it; else 0."""
    first = computation.get(loop.operands[0])
    if first is None or first.opcode != "tuple":
        return 0
    value = _resolve(computation, first.operands[index], None)
    if value is not None and value.opcode == "get-tuple-element":
        before = computation.get(value.operands[0])
        if before is not None and before.opcode == "while":
            place = int(value.attributes.split("index=")[1].split(",")[0])
            body = module.computations[before.called("body") or ""]
            turns = trips(module, computation, before) or 0
            begun = _start(module, computation, before, place)
            return begun + turns * _step(module, body, place)
    number = _integer(value) if value is not None and value.opcode == "constant" else None
    return number or 0


def _step(module: Module, body: dict[str, Instruction], index: int) -> int:
    """What a loop adds to its counter in each turn: 1 unless a constant is seen."""
    root = next(i for i in body.values() if i.root)
    if root.opcode != "tuple":
        return 1
    value = _resolve(body, root.operands[index], None)
    where, outer = body, None
    if value is not None and value.opcode == "fusion":
        outer = (body, value)
        where = module.computations[value.called("calls") or ""]
        value = next(i for i in where.values() if i.root)
    if value is None or value.opcode != "add":
        return 1
    for name in value.operands:
        line = _resolve(where, name, outer)
        if line is not None and line.opcode == "constant" and _integer(line):
            return _integer(line) or 1
    return 1
