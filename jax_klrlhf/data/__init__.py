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
from jax_klrlhf.data.texts import batch_of_texts

__all__ = [
    "arrange",
    "batch",
    "batch_of_texts",
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
