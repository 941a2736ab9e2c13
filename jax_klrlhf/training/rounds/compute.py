"""A program of one batch, run over all rows of host arrays a few at a time."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_klrlhf import placement
from jax_klrlhf.core.sequence import Ragged

NARROWEST = 16
"""Tokens that it does not pay to be narrower than."""


def mapped(
    function: Callable[..., Any], *, rows: int | None, mesh: Mesh | None = None, narrow: bool = True
) -> Callable[..., Any]:
    """``function(params, *arrays)`` compiled once and mapped over the rows of ``arrays``, so many
    at a time (None: all).

    With ``narrow``, rows of like length pass together, and a piece's :class:`Ragged` arguments are
    as wide as a power of two that holds its longest, for a compilation at each new width; what
    ``function`` returns must not be as wide as its arguments. (All as wide as the longest of them,
    UltraFeedback's pairs would be more than half padding.)

    Every leaf of ``arrays`` and of what is returned has the rows first. The last piece is filled
    with copies of its own first row, which are cut off again. With a mesh the rows of a piece lie
    over its devices (and processes); what is returned is whole on every host, in the order given.

    Raises:
        ValueError: where ``rows`` is not positive.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    parts = placement.parts(mesh)
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(function, out_shardings=replicated)

    def call(params: Any, *arrays: Any) -> Any:
        arrays = jax.tree.map(np.asarray, arrays)
        count = jax.tree.leaves(arrays)[0].shape[0]
        if count == 0:
            raise ValueError("no rows to compute on: hand in at least one.")
        size = -(-min(rows or count, count) // parts) * parts
        order = _by_length(arrays) if narrow and count > size else np.arange(count)
        found = []
        for begin in range(0, count, size):
            at = order[begin : begin + size]
            piece = jax.tree.map(lambda x, at=at: fill(x[at], size), arrays)
            laid = placement.put(placement.take(narrowed(piece) if narrow else piece, mesh), mesh)
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                found.append(placement.whole(jitted(params, *laid)))
        back = np.argsort(order)
        return jax.tree.map(lambda *x: np.concatenate(x)[:count][back], *found)

    return call


def narrowed(tree: Any) -> Any:
    """Every :class:`Ragged` of host arrays cut to the power of two that holds its longest row, or
    left as it is where that is no less."""

    def cut(x: Any) -> Any:
        if not isinstance(x, Ragged):
            return x
        return x._replace(ids=x.ids[..., : _width(int(np.max(x.lengths, initial=0)))])

    return jax.tree.map(cut, tree, is_leaf=lambda x: isinstance(x, Ragged))


def _width(longest: int) -> int:
    return max(NARROWEST, 1 << max(longest - 1, 0).bit_length())


def _by_length(arrays: Any) -> np.ndarray:
    """Row numbers, the shortest first; in their own order where all are as wide."""
    leaves = jax.tree.leaves(arrays, is_leaf=lambda x: isinstance(x, Ragged))
    longest = [
        np.asarray(x.lengths).reshape(len(x.lengths), -1).max(1)
        for x in leaves
        if isinstance(x, Ragged)
    ]
    widths = [np.array([_width(int(n)) for n in of]) for of in longest]
    if all(len(np.unique(of)) == 1 for of in widths):
        return np.arange(len(leaves[0] if not isinstance(leaves[0], Ragged) else leaves[0].lengths))
    # By what is compiled first, then by tokens.
    return np.lexsort(np.stack([np.sum(longest, axis=0), *widths]))


def fill(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows filled up to ``size`` with copies of the first."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])
