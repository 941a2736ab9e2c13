"""Which rows and which bytes are whose: the one module that knows of several processes.

A program on several hosts is one program: every process runs the same lines, and each feeds and
sees the devices of its own host. What must be the same everywhere (row numbers, lengths, whether a
file is there) is counted over the *global* batch or asked of the first process; what differs is
decided here.

**The order of a mesh is not the order of the hosts.** On a TPU slice neighbours in the torus are
neighbours in the mesh, so a host's parts of a batch are scattered over it, and with ``tensor`` a
part may lie on two hosts. Nothing may assume that process p has the p-th block of the rows:
:func:`own_rows` says which it has, :func:`put` lays them out, :func:`whole` hands rows back in the
order they were given in.

Nothing here imports the rest of the library, so that every layer may ask.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import permutations
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from jax_klrlhf.errors import InputError

T = TypeVar("T")
ROWS = ("data", "fsdp")
"""Axes of the mesh that the rows of a batch are cut along."""
BATCH = PartitionSpec(ROWS)
FEW = 16
"""Devices of a mesh on CPUs whose every group is joined at once."""
GATHERED = 256 * 2**20
"""Bytes of an array that are whole on a device at one time while it is gathered to the hosts."""


def leader() -> bool:
    """Whether this is the first process, the one that writes."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether there is no other process."""
    return jax.process_count() == 1


def agreed(value: bool) -> bool:
    """The first process's answer, for all: others may look when it has already written."""
    if alone():
        return bool(value)
    return bool(multihost_utils.broadcast_one_to_all(np.array(bool(value))))


def anyone(value: bool) -> bool:
    """Whether any process says yes. All must ask at the same place."""
    if alone():
        return bool(value)
    return bool(np.any(multihost_utils.process_allgather(np.array(bool(value)))))


def meet(name: str) -> None:
    """Wait for the other processes."""
    if not alone():
        multihost_utils.sync_global_devices(name)


def connect(mesh: Mesh) -> None:
    """Let the processes on CPUs reach each other in every group of devices that ``mesh`` has.

    Gloo joins a group where a collective first asks for it, on every device for itself, and gives
    up after 30 seconds. Processes that compile at different speeds meet in so many groups at once
    that one in a group waits for one in another. Here they take the groups in one order. All
    processes must call it; on other platforms it does nothing.
    """
    if alone() or mesh.devices.flat[0].platform != "cpu":
        return
    for group in groups(mesh.devices):
        if any(_mine(device) for device in group):
            line = Mesh(np.array(group), ("group",))
            ones = jax.make_array_from_callback(
                (line.size,),
                NamedSharding(line, PartitionSpec("group")),
                lambda at: np.ones(line.size, np.float32)[at],  # noqa: B023 (called at once)
            )
            total = jax.jit(jnp.sum, out_shardings=NamedSharding(line, PartitionSpec()))
            total(ones).block_until_ready()


def groups(devices: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Devices of a mesh that differ along some of its axes alone, each group once in every order
    that a collective may number it in.

    The compiler also cuts an axis in two, so that these are groups along the axes' prime factors;
    of more than :data:`FEW` devices, where those would be thousands, along whole axes.
    """
    if devices.size <= FEW:
        devices = devices.reshape([prime for size in devices.shape for prime in _primes(size)])
    seen = set()
    for size in range(1, devices.ndim + 1):
        for axes in permutations(range(devices.ndim), size):
            last = np.moveaxis(devices, axes, range(-size, 0))
            length = int(np.prod(last.shape[-size:]))
            for row in last.reshape(-1, length):
                group = tuple(row)
                if length > 1 and group not in seen:
                    seen.add(group)
                    yield group


def _primes(number: int) -> list[int]:
    """Prime factors, ascending."""
    for prime in range(2, number + 1):
        if number % prime == 0:
            return [prime, *_primes(number // prime)]
    return []


def lead(write: Callable[[], Any]) -> None:
    """The first process calls ``write``; all return when it has, and raise where it raised.

    Raises:
        InputError: in the other processes, where the first one failed; there, its own error.
    """
    failure: Exception | None = None
    if leader():
        try:
            write()
        except Exception as error:
            failure = error
    if agreed(failure is not None):
        raise failure or InputError("the first process could not write; its message says why.")


def shared(read: Callable[[], np.ndarray], like: jax.ShapeDtypeStruct) -> np.ndarray:
    """An array that the first process reads or computes alone, on every host.

    Disks need not be shared. ``like`` is its shape and type, which the others know.

    Raises:
        InputError: in the other processes, where the first one failed; there, its own error.
    """
    found = np.zeros(like.shape, like.dtype)

    def keep() -> None:
        nonlocal found
        found = np.asarray(read(), like.dtype).reshape(like.shape)

    lead(keep)
    if alone():
        return found
    # As bytes: the broadcast is a sum over devices, which would round or narrow some types.
    flat = np.frombuffer(np.ascontiguousarray(found).tobytes(), np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(flat), np.uint8)
    return np.frombuffer(sent.tobytes(), like.dtype).reshape(like.shape)


def parts(mesh: Mesh | None) -> int:
    """Number of parts that a batch is split into: its rows must be a multiple of this."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def own_parts(mesh: Mesh | None) -> Int[np.ndarray, " own"]:
    """Parts of a batch that lie on this process's devices, ascending.

    Processes may have unequally many, and with ``tensor`` over hosts a part has several owners.
    """
    if mesh is None:
        return np.zeros(1, np.int64)
    axes = [mesh.axis_names.index(axis) for axis in ROWS]
    devices = np.moveaxis(mesh.devices, axes, (0, 1)).reshape(parts(mesh), -1)
    return np.flatnonzero([any(_mine(device) for device in row) for row in devices])


def _mine(device: Any) -> bool:
    return device.process_index == jax.process_index()


def own_device(mesh: Mesh | None) -> Any:
    """A device of this process: one of the mesh, or the default one."""
    return jax.local_devices()[0] if mesh is None else mesh.local_devices[0]


def memory(mesh: Mesh | None) -> float | None:
    """Bytes that a device of this process lets a program have; None where it does not say (CPU)."""
    found = (own_device(mesh).memory_stats() or {}).get("bytes_limit")
    return None if found is None else float(found)


def own_rows(mesh: Mesh | None, count: int) -> Int[np.ndarray, " own"]:
    """Numbers of the rows, in a global batch of ``count``, that this process must have.

    Raises:
        ValueError: where ``count`` does not divide over the parts of the mesh.
    """
    if count % parts(mesh):
        raise ValueError(
            f"a batch of {count} rows does not divide over the {parts(mesh)} parts of the mesh: "
            "make it a multiple of them (rows of weight 0 may fill it)."
        )
    each = count // parts(mesh)
    return (own_parts(mesh)[:, None] * each + np.arange(each)).ravel()


def take(batch: T, mesh: Mesh | None) -> T:
    """This process's rows of a batch of host arrays that every process has whole."""
    if alone():
        return batch
    return jax.tree.map(lambda x: np.asarray(x)[own_rows(mesh, len(x))], batch)


def put(batch: Any, mesh: Mesh | None) -> Any:
    """Lay host arrays on the mesh, each process giving its own rows; the result is global.

    ``batch`` holds the rows :func:`own_rows` (with one process these are all) in that order.
    Without a mesh the arrays go to the one device.
    """
    if mesh is None:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, BATCH)
    if alone():
        return jax.device_put(batch, sharding)
    own = own_parts(mesh)

    def lay(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        each = len(leaf) // len(own)
        place = {int(part) * each: k * each for k, part in enumerate(own)}

        def rows(index: Any) -> np.ndarray:
            begin = place[index[0].start or 0]
            return leaf[(slice(begin, begin + each), *index[1:])]

        shape = (parts(mesh) * each, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, rows)

    return jax.tree.map(lay, batch)


def whole(tree: Any) -> Any:
    """Arrays in host memory, whole, on every host; rows in the order they were given in."""
    return jax.tree.map(host, tree)


def host(x: Any) -> np.ndarray:
    """One array whole in host memory (C order, its own rank), wherever it lies. All must call.

    What lies on other hosts travels a few hundred MiB at a time: no device has a large parameter
    whole.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.array(jax.device_get(x), order="C")
    pieces = [multihost_utils.process_allgather(piece, tiled=True) for piece in _pieces(x)]
    return np.array(pieces[0] if x.ndim == 0 else np.concatenate(pieces), order="C")


def _pieces(x: jax.Array) -> Iterable[jax.Array]:
    if x.ndim == 0 or x.nbytes <= GATHERED:
        return [x]
    rows = max(1, len(x) * GATHERED // x.nbytes)
    return (x[at : at + rows] for at in range(0, len(x), rows))


def from_host(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, laid out: each device takes its own part of it."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def reshard(params: Any, shardings: Any) -> Any:
    """Parameters moved to other shardings, of another mesh too (that of sampling, say)."""
    return jax.device_put(params, shardings)
