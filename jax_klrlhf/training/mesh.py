"""One mesh, one way to lay a training state on it.

Axes of the mesh:

- ``data``: copies of the model, each with its own rows of the batch;
- ``fsdp``: rows of the batch *and* shards of every parameter, gathered layer by layer;
- ``tensor``: one layer's matrices split over devices.

A batch is split over ``data`` and ``fsdp`` together. Axes are ``Auto``: the compiler places what
no constraint pins down, and the functions of the core (a Gram matrix, a gather) work unchanged on
sharded arrays. ``jax.make_mesh`` would make them ``Explicit``, on which those raise.

Optimizer state and gradients are sharded as the parameters are, by :func:`state_shardings`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from jax_klrlhf import placement
from jax_klrlhf.placement import BATCH
from jax_klrlhf.training import state as state_of
from jax_klrlhf.training.state import TrainState, path_name

AXES = ("data", "fsdp", "tensor")
WIDEST = 16
"""``fsdp`` by default at most. On wider axes the TPU compiler sums gradients whole, by all-reduce,
where on a ring of 16 it scatters them: half the traffic."""
SHARE, READ = 0.25, 4 * 2**30
"""Of a device's memory, and in bytes: what the weights of a sampler come to on it at most, if there
are devices enough. The first leaves room for caches; the second is read for every token, which
takes 5 ms on a v5e and 1.6 ms on a v5p."""


def make(
    *,
    data: int | None = None,
    fsdp: int | None = None,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Mesh of axes (data, fsdp, tensor) over ``devices`` (all there are, by default).

    One size may be -1: it takes the devices that the others leave. Where neither ``data`` nor
    ``fsdp`` is given, ``fsdp`` is the largest that divides and is at most :data:`WIDEST`, and
    ``data`` takes the rest; where one of them is, ``data`` is 1 or ``fsdp`` the rest.

    Raises:
        ValueError: where the sizes do not multiply to the number of devices, or ``data`` does not
            divide over their slices.
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = [*_rows(count, data, fsdp, tensor), tensor]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {named}: sizes are positive, and one of them may be -1.")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if int(np.prod(sizes)) != count:
        raise ValueError(
            f"mesh {named}: the sizes must multiply to the {count} devices there are; "
            "set one of them to -1 to let it take the rest."
        )
    return _of(arrange(sizes, jax.devices() if devices is None else devices))


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices in the shape of a mesh, neighbours in it neighbours in the torus.

    ``jax.make_mesh`` splits an axis of the torus on v5e alone (it refuses 4 x 16 on 8 x 8 of v6e),
    and knows one slice alone. Of several slices each has its part of ``data``: gradients are all
    that travels between them.

    Raises:
        ValueError: where ``data`` does not divide over the slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(
            f"data={sizes[0]}: the devices are {slices} slices, over which data must divide; make "
            "it a multiple of them."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]),
        (slices, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )


def _rows(count: int, data: int | None, fsdp: int | None, tensor: int) -> tuple[int, int]:
    """Sizes of ``data`` and ``fsdp``, with what was not given."""
    if data is None and fsdp is None:
        rest = count // max(tensor, 1)
        fsdp = max((n for n in range(1, WIDEST + 1) if rest % n == 0), default=1)
        return max(rest // fsdp, 1), fsdp
    return 1 if data is None else data, -1 if fsdp is None else fsdp


def for_sampling(
    mesh: Mesh | None, params: Any, *, tensor: int | None, memory: float | None
) -> Any:
    """The mesh to sample on, of the devices of ``mesh`` in their order: ``data`` x ``tensor``.

    Each token reads every weight, so nothing is cut over ``fsdp``: a decoding step would gather it
    again for each token. A copy of the weights is cut over ``tensor`` devices that are neighbours
    in ``mesh``, and ``data`` copies answer their own prompts.

    Args:
        mesh: that of training, or None for one device.
        params: arrays or shapes, in the type that is sampled with.
        tensor: devices of a copy; 0 for ``mesh`` itself. By default the fewest on which a device's
            part is a :data:`SHARE` of its memory and :data:`READ` bytes at most, in powers of two;
            ``mesh`` itself where it cuts nothing over ``fsdp``.
        memory: bytes of a device; None where it is not known, and :data:`READ` bytes decide.

    Raises:
        ValueError: where ``tensor`` does not divide the devices.
    """
    if mesh is None or tensor == 0 or (tensor is None and mesh.shape["fsdp"] == 1):
        return mesh
    if tensor is None:
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        most = min(SHARE * (memory or np.inf), READ)
        tensor = 1
        while mesh.size % (2 * tensor) == 0 and held > tensor * most:
            tensor *= 2
    if tensor < 0 or mesh.size % tensor:
        raise ValueError(f"tensor={tensor} for sampling does not divide the {mesh.size} devices.")
    devices = mesh.devices.reshape(mesh.size // tensor, 1, tensor)
    return _of(devices)


def _of(devices: np.ndarray) -> Mesh:
    """The mesh of devices in its shape, which reach each other."""
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    placement.connect(mesh)
    return mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ``data`` and ``fsdp``; every other axis whole."""
    return NamedSharding(mesh, BATCH)


def rows(mesh: Mesh) -> int:
    """Number of parts that a batch is split into: its rows must be a multiple of this."""
    return placement.parts(mesh)


def state_shardings(state: Any, shardings: Any) -> Any:
    """Shardings of a whole :class:`TrainState` from those of the parameters.

    ``state`` holds arrays or shapes (``jax.eval_shape`` of :func:`state.init`), ``shardings`` a
    ``NamedSharding`` for every parameter (for the library's models,
    :func:`models.partition.shardings`). A leaf of the optimizer state whose path ends with a
    parameter's path, and whose shape is that parameter's, is laid out like it; other leaves
    (counters, Adafactor's row and column means) are replicated.
    """
    by_path = {
        path_name(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }
    shapes = {
        path_name(path): leaf.shape
        for tree in (state.params, state.frozen)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    missing = sorted(set(shapes) - set(by_path))
    if missing:
        raise ValueError(f"state_shardings: no sharding for the parameter {missing[0]}.")
    replicated = NamedSharding(next(iter(by_path.values())).mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            name = path_name(path[start:])
            if shapes.get(name) == leaf.shape:
                return by_path[name]
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def init(
    key: PRNGKeyArray,
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    shardings: Any,
    donate: bool = False,
    **options: Any,
) -> tuple[TrainState, Any]:
    """:func:`state.init` on a mesh: the state and its shardings, for :func:`.make_train_step`.

    Every part is computed where it belongs, so that no device holds the whole. ``shardings`` are
    those of the parameters, as in :func:`state_shardings`; ``options`` those of ``state.init``.
    With ``donate`` all of ``params`` is used up at once.
    """
    options = {name: value for name, value in options.items() if value is not None}
    trainable = options.pop("trainable", None)
    reference = options.pop("ref_params", None)
    if reference is not None:
        options["fingerprint"] = state_of.digest(reference)

    def make(key: Any, params: Any, arrays: Any) -> TrainState:
        return state_of.init(key, params, optimizer, trainable=trainable, **arrays)

    shapes = jax.eval_shape(make, key, params, options)
    laid = state_shardings(shapes, shardings)
    made = jax.jit(make, out_shardings=laid, donate_argnums=(1,) if donate else ())
    state = made(key, jax.device_put(params, shardings), options)
    if reference is None:
        return state, laid
    # Held, not copied: the reference does not pass through the program.
    reference = jax.device_put(reference, shardings)
    return state._replace(ref_params=reference), laid._replace(ref_params=shardings)
