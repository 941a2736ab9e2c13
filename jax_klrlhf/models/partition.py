"""Where each parameter lives: one table from a parameter's path to a partition spec.

Mesh axes are ``data`` (whole copies), ``fsdp`` (a copy cut up, gathered layer by layer) and
``tensor`` (heads and feed-forward columns apart). The leading axis of everything under ``layers``
is the scanned one and stays whole: the scan takes one layer of it at a time.
"""

import functools
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int8

ROWS = ("data", "fsdp")
"""Axes that the rows of a batch are cut along."""
RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)embedding$", P("tensor", "fsdp")),
    (r"(^|/)unembedding$", P("fsdp", "tensor")),
    (r"(^|/)positions$", P(None, "fsdp")),
    (r"layers/(query|key|value)/kernel$", P(None, "fsdp", "tensor", None)),
    (r"layers/(query|key|value)/bias$", P(None, "tensor", None)),
    (r"layers/out/kernel$", P(None, "tensor", None, "fsdp")),
    (r"layers/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/(gate|up)/bias$", P(None, "tensor")),
    (r"layers/down/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/(query|key|value|gate|up)/a$", P(None, "fsdp", None)),
    (r"layers/(query|key|value|gate|up)/b$", P(None, None, "tensor")),
    (r"layers/(out|down)/a$", P(None, "tensor", None)),
    (r"layers/(out|down)/b$", P(None, None, "fsdp")),
)
"""First match of the path (``layers/query/kernel``; prefixes such as ``base/`` are free) decides;
what no rule matches (norms, small biases, heads) is replicated."""


def spec(path: str, shape: tuple[int, ...], mesh: Any) -> P:
    """The partition spec of one parameter.

    An axis the mesh lacks, or that does not divide its dimension, is left out there: the dimension
    is then whole on every device, which is always right and costs memory only (8 key heads over
    ``tensor=16``, say). Extra leading dimensions, as of a stacked ensemble, stay whole.
    """
    found = next((rule for pattern, rule in RULES if re.search(pattern, path)), P())
    if len(found) > len(shape):
        raise ValueError(
            f"parameter {path!r} has shape {shape}, fewer axes than its rule {found}: a tree that "
            "is not this decoder's needs its own shardings"
        )
    lead = (None,) * (len(shape) - len(found)) if len(found) else ()
    sizes = dict(mesh.shape)
    axes = [
        axis if axis in sizes and size % sizes[axis] == 0 else None
        for axis, size in zip((*lead, *found), shape, strict=False)
    ]
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def shardings(params: Any, mesh: Any) -> Any:
    """A ``NamedSharding`` for every leaf of ``params`` (arrays or ``ShapeDtypeStruct``)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh)), params
    )


def path_name(path: Any) -> str:
    """``layers/query/kernel`` for a key path of JAX."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def constrain(x: jax.Array) -> jax.Array:
    """Cut activations ``[B, ...]`` along prompts over ``data`` and ``fsdp``.

    The mesh is that of ``jax.set_mesh``. Nothing happens outside one, under
    ``shard_map``, or where the axes do not divide ``B``. Without this constraint the compiler
    gathers activations instead of weights: a pure-fsdp step measured 4 times slower.
    """
    sizes = auto_axes()
    axes = tuple(axis for axis in ROWS if axis in sizes)
    size = math.prod(sizes[axis] for axis in axes)
    if size == 1 or x.shape[0] % size:
        return x
    return jax.lax.with_sharding_constraint(x, P(axes, *(None,) * (x.ndim - 1)))


def gathered(path: str, kernel: jax.Array) -> jax.Array:
    """A layer's kernel, whole over ``fsdp`` where it is used; its gradient is cut up again there.

    ``path`` is the parameter's, ``layers/query/kernel``; ``kernel`` is one layer of it. Left to
    itself the compiler may split a product along the cut axis of the kernel instead and sum
    activations over devices, and may keep gradients whole until the end of the scan.
    """
    sizes = auto_axes()
    if sizes.get("fsdp", 1) == 1:
        return kernel
    mesh = jax.sharding.get_abstract_mesh()
    cut = tuple(
        axis if axis in sizes else None for axis in spec(path, (1, *kernel.shape), mesh)[1:]
    )
    whole = tuple(None if axis == "fsdp" else axis for axis in cut)
    return _resharded(kernel, P(*whole), P(*cut))


def look_up(
    table: Float[Array, "V E"] | Int8[Array, "V E"], ids: Int[Array, "*batch"]
) -> Float[Array, "*batch E"] | Int8[Array, "*batch E"]:
    """``table[ids]``, each device of ``fsdp`` and ``tensor`` giving its part of the hidden size.

    The embedding lies cut along the vocabulary too where there is ``tensor``. Cut so, its gradient
    would gather the hidden gradients of the whole batch on every device.
    """
    sizes = auto_axes()
    wanted = tuple(a for a in ("tensor", "fsdp") if sizes.get(a, 1) > 1)
    if "fsdp" not in wanted or table.shape[1] % math.prod(sizes[a] for a in wanted):
        return table[ids]
    here, rows = _rows(ids.shape[0], sizes)
    between = (None,) * (ids.ndim - 1)
    table = jax.lax.with_sharding_constraint(table, P(None, wanted))
    x = jax.lax.with_sharding_constraint(table[ids], P(here, *between, wanted))
    # `fsdp` moves from the hidden size to the rows by itself: in one step with `tensor` the
    # compiler would gather everything and cut it again.
    return jax.lax.with_sharding_constraint(x, P(rows, *between, wanted[:-1]))


def project(
    hidden: Float[Array, "*batch E"], table: Float[Array, "_ _"], *, axis: int, dtype: Any
) -> Float[Array, "*batch V"]:
    """``hidden`` times the vocabulary projection ``table``, whose hidden size is its ``axis``.

    Each device of ``fsdp`` and ``tensor`` takes its own part of the vocabulary and all rows of its
    part of ``data``: the few hidden states of a chunk travel, never the table, of which no device
    holds more than its share, nor of its gradient. (A table cut along the hidden size would be
    gathered whole in each pass: 1 GiB in 16 bits for Llama 3 8B.) Logits are left cut along the
    vocabulary.
    """
    sizes = auto_axes()
    wanted = tuple(a for a in ("tensor", "fsdp") if sizes.get(a, 1) > 1)
    parts = math.prod(sizes[a] for a in wanted)
    dims = (((hidden.ndim - 1,), (axis,)), ((), ()))
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=dtype
    )
    if "fsdp" not in wanted or hidden.ndim < 2 or table.shape[1 - axis] % parts:
        return product(hidden, table)
    here, rows = _rows(hidden.shape[0], sizes)
    between = (None,) * (hidden.ndim - 2)
    hidden = _resharded(hidden, P(here, *between, None), P(rows, *between, None))
    table = jax.lax.with_sharding_constraint(
        table, P(*((None, wanted) if axis == 0 else (wanted,)))
    )
    return jax.lax.with_sharding_constraint(product(hidden, table), P(here, *between, wanted))


def _rows(count: int, sizes: dict[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What ``count`` rows are cut along without ``fsdp``, and with it where it divides them."""
    here = tuple(a for a in ("data",) if a in sizes and count % sizes[a] == 0)
    rows = tuple(a for a in ROWS if a in sizes)
    return here, here if count % math.prod(sizes[a] for a in rows) else rows


def auto_axes() -> dict[str, int]:
    """Axes of the mesh in use that the compiler may be told to cut along, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in kinds if kind == AxisType.Auto}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _resharded(x: jax.Array, forward: P, backward: P) -> jax.Array:
    """``x`` laid out as ``forward``, and its gradient as ``backward``.

    The transpose of a plain constraint lays the gradient out as the value: a gathered value's
    gradient would be summed whole on every device, and cut up only then.
    """
    del backward
    return jax.lax.with_sharding_constraint(x, forward)


def _resharded_forward(x: jax.Array, forward: P, backward: P) -> tuple[jax.Array, None]:
    return _resharded(x, forward, backward), None


def _resharded_backward(forward: P, backward: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    del forward
    return (jax.lax.with_sharding_constraint(gradient, backward),)


_resharded.defvjp(_resharded_forward, _resharded_backward)
