r"""Eight bits in place of sixteen or thirty-two, for sampling: symmetric, scaled by the largest.

.. math:: q = \operatorname{round}(x / s), \qquad s = \max |x| / 127

over the entries that share a scale, so that each is off by ``max |x| / 254`` at most. Of weights
the entries of one output channel share it, of keys and values those of one head at one position.
Products are taken with ``q`` and multiplied by ``s`` afterwards: what they give is what the
dequantized array would, up to the rounding of floats, and no such array is made.

A policy with such weights is another policy, near to the one that is trained: what its sampler says
of its responses (:class:`.sampling.Samples`) is of that other one, and :func:`.sampling.mismatch`
with a scorer of the full weights tells how far apart the two are.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jax_klrlhf.models import weights as tables

LARGEST = 127


class Quantized(NamedTuple):
    """``values`` times ``scale``, which lacks the axes that share one."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]


def quantize(x: Float[Array, "..."], axes: tuple[int, ...]) -> Quantized:
    """``x`` in eight bits, with one float32 scale for all entries along ``axes``."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / LARGEST
    # Where all are zero any scale will do.
    scale = jnp.where(scale == 0, 1, scale)
    values = jnp.clip(jnp.round(x / scale), -LARGEST, LARGEST).astype(jnp.int8)
    return Quantized(values, jnp.squeeze(scale, axes))


def dequantize(found: Quantized, axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The float32 array that ``found`` stands for; ``axes`` as :func:`quantize` had them."""
    axes = tuple(axis % found.values.ndim for axis in axes)
    return found.values.astype(jnp.float32) * jnp.expand_dims(found.scale, axes)


def weights(params: Any, dtype: Any = None, *, made: Callable[[Any], Array] = lambda x: x) -> Any:
    """The decoder's parameters with kernels and embeddings in eight bits.

    ``kernel`` becomes int8 and ``kernel_scale`` stands beside it, ``[L, *features]``; so do
    ``embedding`` and ``unembedding``, with a scale for each entry of the vocabulary. Everything
    else (norms, biases, low-rank updates) is cast to ``dtype``, where that is given. The model's
    functions take such parameters as they do others; no gradient goes through them.

    ``made`` gives the array of a leaf, one after the other: where leaves are yet to be read from a
    file, one of them is held at full width at a time.

    Raises:
        ValueError: where nothing in ``params`` is a kernel or an embedding of this decoder.
    """
    found = _walked(params, "", dtype, made)
    if not any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(found)):
        raise ValueError(
            "weights: the parameters have no kernel of this library's decoder (such as "
            "layers/query/kernel); a model of one's own quantizes its own."
        )
    return found


def _walked(tree: Mapping[str, Any], path: str, dtype: Any, made: Callable[[Any], Array]) -> Any:
    found: dict[str, Any] = {}
    for name, leaf in tree.items():
        where = f"{path}/{name}"
        if isinstance(leaf, Mapping):
            found[name] = _walked(leaf, where, dtype, made)
        elif (axes := _inputs(where)) is not None:
            found[name], found[f"{name}_scale"] = _quantized(made(leaf), axes)
        else:
            leaf = made(leaf)
            cast = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
            found[name] = leaf.astype(dtype) if cast else leaf
    return found


def _inputs(path: str) -> tuple[int, ...] | None:
    """Axes of a parameter that a product with it sums over; None where it stays as it is."""
    kernel = re.search(r"layers/(\w+)/kernel$", path)
    if kernel is not None and kernel.group(1) in tables.LINEARS:
        return tuple(range(1, 1 + tables.LINEARS[kernel.group(1)][1]))
    ends = {"embedding": (-1,), "unembedding": (-2,)}
    return ends.get(path.rpartition("/")[2])


_quantized = partial(jax.jit, static_argnums=1)(quantize)
