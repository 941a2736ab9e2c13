"""Batches of a split: as the loaders have them, and what of them the training step takes."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jax_klrlhf import placement
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import packing
from jax_klrlhf.data.batch import Lengths, Loader, Stream
from jax_klrlhf.data.packing import PackedLoader
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from jax_klrlhf.models.batch import Batch, PackedBatch
from jax_klrlhf.programs.config import TrainingConfig
from jax_klrlhf.programs.run import Run


def loader(run: Run, data: Prepared, *, seed: int | None) -> Loader:
    """Batches of a split that divide over micro-batches and devices."""
    config: TrainingConfig = run.config
    parts = placement.parts(run.mesh)
    # Evaluation takes batches whole.
    divisor = parts * (config.micro_batches if seed is not None else 1)
    size = config.batch_size
    if seed is None:
        size = -(-min(size, len(data)) // divisor) * divisor
    elif config.token_budget is None and size % divisor:
        raise InputError(
            f"--batch-size {size} must be a multiple of {divisor}: {config.micro_batches} "
            f"micro-batches on {parts} parts of the mesh."
        )
    return data.loader(
        seed=seed,
        token_budget=config.token_budget,
        batch_size=size if config.token_budget is None else None,
        max_shapes=config.max_shapes,
        divisor=divisor,
        own=partial(placement.own_rows, run.mesh),
    )


def packed_loader(run: Run, data: Prepared, take: np.ndarray) -> PackedLoader:
    """Packed batches of a split, of the responses ``take [rows, K]`` of each row.

    Raises:
        InputError: where the token budget does not hold the longest row on each device.
    """
    config: TrainingConfig = run.config
    parts = placement.parts(run.mesh)
    rows = np.arange(len(data))[:, None]
    lengths = Lengths(data.lengths.prompts, data.lengths.responses[rows, take])

    def fetch(numbers: Sequence[int]) -> list[Row]:
        return [
            row._replace(
                responses=[row.responses[k] for k in take[number]],
                scores=[row.scores[k] for k in take[number]],
            )
            for number, row in zip(numbers, data.fetch(numbers), strict=True)
        ]

    layouts = packing.fit(
        lengths,
        streams=parts * config.micro_batches,
        token_budget=config.token_budget,
        batch_size=config.batch_size if config.token_budget is None else None,
        max_shapes=config.max_shapes,
    )
    return PackedLoader(
        fetch,
        lengths,
        layouts=layouts,
        seed=config.seed,
        own=partial(placement.own_rows, run.mesh),
    )


def whole_epoch(loaded: Loader) -> Iterator[Any]:
    """Every row once, in order of the loader."""
    return (loaded[step] for step in range(loaded.steps_per_epoch))


class Prompts(NamedTuple):
    """Prompts of the first batches of a loader."""

    batches: list[Ragged]
    """Of each batch this process's rows."""
    where: list[np.ndarray]
    """False at rows that only fill a batch."""
    longest: int
    """Tokens of the longest of all processes' prompts."""


def first_prompts(loaded: Loader, count: int) -> Prompts:
    """Batches of at least ``count`` prompts in all (fewer where there are fewer).

    Counted over the global batches: every process takes as many, whatever its own rows are.
    """
    batches, where, total, longest = [], [], 0, 0
    for step in range(loaded.steps_per_epoch):
        if total >= count:
            break
        rows = loaded.piece(step).rows
        batch = loaded[step]
        batches.append(batch.prompts)
        where.append(np.asarray(batch.weight) > 0)
        total += len(rows)
        longest = max(longest, int(loaded.lengths.prompts[rows].max()))
    return Prompts(batches, where, longest)


def pairs(batch: Any, table: np.ndarray | None = None) -> Batch:
    """A batch for the training step: its best and its last response, with pi0's ``table``.

    Of K > 2 responses to a prompt the best and the worst are the pair.
    """
    take = best_and_worst(np.asarray(batch.responses.lengths))
    rows = np.arange(len(take))[:, None]
    return batch._replace(
        responses=Ragged(batch.responses.ids[rows, take], batch.responses.lengths[rows, take]),
        scores=batch.scores[rows, take],
        ref_log_prob=None if table is None else table[batch.row[:, None], take],
        row=None,
    )


def best_and_worst(lengths: np.ndarray) -> np.ndarray:
    """Numbers ``[rows, 2]`` of the first and the last response of each row that has tokens."""
    count = np.maximum((lengths > 0).sum(-1), 1)
    return np.stack([np.zeros_like(count), count - 1], -1)


def best(lengths: np.ndarray) -> np.ndarray:
    """Numbers ``[rows, 1]`` of the first response of each row: 0."""
    return np.zeros((len(lengths), 1), np.int64)


def packed(batch: PackedBatch, table: np.ndarray | None = None) -> PackedBatch:
    """A packed batch for the training step, with pi0's ``table`` of the responses in it."""
    ref_log_prob: Any = None if table is None else table[batch.row]
    return batch._replace(ref_log_prob=ref_log_prob, row=None)


def firsts(batch: Batch, table: np.ndarray | None = None) -> Batch:
    """A batch for supervised training: its best response alone."""
    del table
    first = Ragged(batch.responses.ids[:, :1], batch.responses.lengths[:, :1])
    return batch._replace(responses=first, label=None, scores=None, row=None)


class Feed:
    """A stream of loaded batches, made into training batches; its position is the stream's."""

    def __init__(self, stream: Stream, convert: Any):
        self._stream, self._convert = stream, convert

    def __next__(self) -> Batch | PackedBatch:
        """The next batch."""
        return self._convert(next(self._stream))

    def state(self) -> Any:
        """Position of the next batch."""
        return self._stream.state()

    def restore(self, state: Any) -> None:
        """Go on from a position."""
        self._stream.restore(state)
