"""Where each parameter lives: one table from a parameter's path to a partition spec.

Mesh axes are ``data`` (whole copies), ``fsdp`` (a copy cut up, gathered layer by layer) and
``tensor`` (heads and feed-forward columns apart). The leading axis of everything under ``layers``
is the scanned one and stays whole: the scan takes one layer of it at a time.
"""

import re
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(a for a in ("data", "fsdp") if kinds.get(a) == AxisType.Auto)
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    if size == 1 or x.shape[0] % size:
        return x
    return jax.lax.with_sharding_constraint(x, P(axes, *(None,) * (x.ndim - 1)))
