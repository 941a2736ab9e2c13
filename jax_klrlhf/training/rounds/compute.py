"""A program of one batch, run over all rows of host arrays a few at a time."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_klrlhf import placement


def mapped(
    function: Callable[..., Any], *, rows: int, mesh: Mesh | None = None
) -> Callable[..., Any]:
    """``function(params, *arrays)`` compiled once and mapped over the rows of ``arrays``.

    Every leaf of ``arrays`` and of what is returned has the rows first. The last piece is filled
    with copies of its own first row, which are cut off again. With a mesh the rows of a piece lie
    over its devices (and processes); what is returned is whole on every host, in the order given.

    Raises:
        ValueError: where ``rows`` is not positive.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    parts = placement.parts(mesh)
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(function, out_shardings=replicated)

    def call(params: Any, *arrays: Any) -> Any:
        arrays = jax.tree.map(np.asarray, arrays)
        count = jax.tree.leaves(arrays)[0].shape[0]
        if count == 0:
            raise ValueError("no rows to compute on: hand in at least one.")
        size = -(-min(rows, count) // parts) * parts
        found = []
        for begin in range(0, count, size):
            piece = jax.tree.map(lambda x, at=begin: fill(x[at : at + size], size), arrays)
            laid = placement.put(placement.take(piece, mesh), mesh)
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                found.append(placement.whole(jitted(params, *laid)))
        return jax.tree.map(lambda *x: np.concatenate(x)[:count], *found)

    return call


def fill(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows filled up to ``size`` with copies of the first."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])
