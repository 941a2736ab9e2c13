"""The text of a compiled program (HLO) as computations of instructions.

Read is what :mod:`.cost` needs: results with their shapes and memory, operands, attributes.
"""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool
    """In on-chip memory, not in the device's main memory."""

    @property
    def elements(self) -> int:
        """Number of entries."""
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size without the padding of tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(found.group()) if (found := re.search(r"\d+", self.dtype)) else 32
        return (self.elements * bits + 7) // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """The result, a tuple's elements one after the other."""
    operands: tuple[str, ...]
    inside: str
    """The text between the parentheses: a constant's value, a parameter's number."""
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of the whole result."""
        return sum(shape.bytes for shape in self.shapes)

    def called(self, key: str) -> str | None:
        """Name of the computation given as attribute ``key``."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def numbers(self, key: str) -> tuple[int, ...]:
        """Integers of the attribute ``key={...}``; empty where it is absent."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()


class Module(NamedTuple):
    """A compiled program: computations, each a dictionary of instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """Read the text of a compiled module (``compiled.as_text()``)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in _lines(text):
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        found = _LINE.match(line)
        if found and current is not None:
            root, name, result, opcode, rest = found.groups()
            inside, attributes = _split(rest)
            current[name] = Instruction(
                name=name,
                opcode=opcode,
                shapes=_shapes(result),
                operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
                inside=inside,
                attributes=attributes,
                root=bool(root),
            )
    if not entry:
        raise ValueError("parse: the text has no ENTRY computation; give compiled.as_text().")
    partitions = re.search(r"num_partitions=(\d+)", text[:20000])
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def _lines(text: str) -> Iterator[str]:
    """Headers and instructions; a kernel's attributes may run over several lines of text."""
    whole = ""
    for line in text.splitlines():
        if re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line) or line == "}" or _HEADER.match(line):
            yield whole
            whole = line
        else:
            whole += line
    yield whole


def _split(rest: str) -> tuple[str, str]:
    """Split ``operands), attributes`` at the parenthesis that closes the operands."""
    depth = 1
    for at, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:at], rest[at + 1 :]
    return rest, ""


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            dtype,
            tuple(int(re.sub(r"\D", "", n)) for n in dims.split(",") if n),
            bool(re.search(r"S\([1-9]\d*\)", layout or "")),
        )
        for dtype, dims, layout in _SHAPE.findall(text)
    )
