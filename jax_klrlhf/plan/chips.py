"""Chips that a plan can be made for, and devices of a slice that nobody has rented.

Peak numbers are those of Google's public pages "TPU v5e", "TPU v5p" and "TPU v6e"
(docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e): bf16 FLOP/s, memory capacity and bandwidth, and
the bandwidth between chips, which the pages give per chip in both directions together: per link
and direction it is that number over twice the ports (4 ports in the two-dimensional v5e and v6e,
6 in v5p). Torus shapes: rings close along an axis of 16 in v5e and v6e, and along an axis of a
multiple of 4 in slices of v5p from 4x4x4 on.

What the compiler lets a program have is less than the capacity (15.75 of 16 GiB on v5e); whether a
program fits is the compiler's word, not this table's.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from jax_klrlhf.errors import InputError

GIB = float(2**30)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak numbers of one chip, in FLOP/s, bytes and bytes/s."""

    name: str
    flops: float
    """bf16 matrix products."""
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    """One link, one direction."""
    closes: int
    """Rings close along torus axes that are a multiple of this."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            flops=197e12,
            memory=16 * GIB,
            memory_bandwidth=819e9,
            link_bandwidth=50e9,
            closes=16,
        ),
        Chip(
            name="v5p",
            flops=459e12,
            memory=95 * GIB,
            memory_bandwidth=2765e9,
            link_bandwidth=100e9,
            closes=4,
        ),
        Chip(
            name="v6e",
            flops=918e12,
            memory=32 * GIB,
            memory_bandwidth=1638e9,
            link_bandwidth=100e9,
            closes=16,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A named topology: its chip (None: CPU devices, of which no peak is known) and shape."""

    name: str
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips."""
        return prod(self.shape)

    def ingress(self, group: int) -> float:
        """Bytes per second that a chip can receive in a collective over ``group`` chips.

        A collective over all chips uses the links of every axis of the torus; one over fewer is
        taken to run along a single axis. An axis has two links into a chip where the ring closes,
        one where it does not (what a chip at the border has) or is of size 2.
        """
        if self.chip is None:
            raise ValueError(f"{self.name} has no interconnect that a time could be taken from.")
        # Two rings of 4 chips are as good as closed: v5p shapes below a cube have open axes.
        closed = self.chip.closes if self.size >= 64 or self.chip.closes > 4 else 10**9
        links = [
            0 if size == 1 else 2 if size > 2 and size % closed == 0 else 1 for size in self.shape
        ]
        used = sum(links) if group >= self.size else max(links, default=0)
        return max(used, 1) * self.chip.link_bandwidth


def read_topology(name: str) -> Slice:
    """``v5e:8x8``, ``v5p:4x4x4``, or ``cpu:8`` (the CPU devices of this process).

    Raises:
        InputError: for a chip or a form that is not known.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None or (found.group(1) not in CHIPS and found.group(1) != "cpu"):
        raise InputError(
            f"topology {name!r}: give a chip and a shape, such as v5e:8x8, v5p:4x4x4 or v6e:4x4 "
            f"(chips: {', '.join(CHIPS)}), or cpu:8 for the CPU devices of this machine"
        )
    shape = tuple(int(size) for size in found.group(2).split("x"))
    return Slice(name=name, chip=CHIPS.get(found.group(1)), shape=shape)


def devices(topology: Slice) -> Sequence[Any]:
    """Devices to lay a mesh on and compile for; of a TPU they exist for the compiler only.

    Raises:
        InputError: without libtpu, for a shape that it refuses, or with too few CPU devices.
    """
    if topology.chip is None:
        found = jax.devices("cpu")
        if len(found) < topology.size:
            raise InputError(
                f"topology {topology.name}: this process has {len(found)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.size}"
            )
        return found[: topology.size]
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"topology {topology.name} needs the TPU compiler (no TPU): "
            "pip install 'jax-klrlhf[tpu]'"
        )
    if not os.path.exists("/dev/accel0") and not os.path.exists("/dev/vfio/0"):
        # No chips here: keep libtpu from asking a metadata server what machine this is, and from
        # locking others out.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies  # Loads libtpu's side of JAX.

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"topology {topology.name}: the TPU compiler says {reason}") from error
    return described.devices
