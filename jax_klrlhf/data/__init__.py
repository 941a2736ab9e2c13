"""Preference data: from files, hub and TFDS to token ids to bucketed, resumable batches."""

from jax_klrlhf.data import (
    arrange,
    batch,
    buckets,
    check,
    examples,
    facts,
    packing,
    prepare,
    rows,
    sources,
    statistics,
    tokenize,
)

__all__ = [
    "arrange",
    "batch",
    "buckets",
    "check",
    "examples",
    "facts",
    "packing",
    "prepare",
    "rows",
    "sources",
    "statistics",
    "tokenize",
]
