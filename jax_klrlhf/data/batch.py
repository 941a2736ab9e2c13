"""Batches of preferences in the layout of the whole library, as a function of the step number.

A :class:`Loader` maps a step to a :class:`Batch`, and nothing else is state: the stream after step
n is the same whether n was reached or resumed at. Rows are reshuffled every epoch; each appears
exactly once in it. A last, part-filled batch is filled up with copies of its own first row at
weight 0, so that no row is ever wholly masked.

All processes of a run deal the same global batches and read only their own rows of each.

Axes: ``B`` prompts of this process, ``K`` responses, ``P`` prompt and ``C`` response positions.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import buckets
from jax_klrlhf.data.buckets import Shape
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from jax_klrlhf.models.batch import Batch

Own = Callable[[int], Int[np.ndarray, " own"]]
"""``own(count)``: which rows of a global batch of ``count`` are this process's."""


class Lengths(NamedTuple):
    """Token counts of all rows: what batching must know of a data set."""

    prompts: Int[np.ndarray, " rows"]
    responses: Int[np.ndarray, "rows K"]

    @property
    def longest(self) -> Int[np.ndarray, " rows"]:
        """Tokens of each row's longest response."""
        return self.responses.max(axis=1, initial=0)


class Piece(NamedTuple):
    """One global batch of an epoch: its shape, and the rows it holds."""

    shape: Shape
    rows: Int[np.ndarray, " held"]


class Loader:
    """Batches by step number: ``loader[step]``. See :func:`stream` for reading ahead.

    Args:
        fetch: row numbers to rows, at random access (``Prepared.fetch``, or :func:`from_rows`).
        lengths: token counts of all rows.
        shapes: global batch shapes, from :func:`buckets.fit`.
        seed: of the order. None: by shape and number, every epoch alike, for evaluation.
        own: numbers of the rows of a global batch of ``count`` that this process reads,
            ``own(count)`` (:func:`placement.own_rows` of a mesh); all of them by default.
        pad: id in the slots that hold no token; no result depends on it.
    """

    def __init__(
        self,
        fetch: Callable[[Sequence[int]], list[Row]],
        lengths: Lengths,
        *,
        shapes: Sequence[Shape],
        seed: int | None,
        own: Own = np.arange,
        pad: int = 0,
    ):
        for shape in shapes:
            own(shape.rows)  # refused here, where a batch does not divide, not at its first step
        self.shapes = tuple(shapes)
        self.lengths = lengths
        self._fetch = fetch
        self._seed = seed
        self._own = own
        self._pad = pad
        number = buckets.assign(self.shapes, lengths.prompts, lengths.longest)
        self._groups = [np.flatnonzero(number == n) for n in range(len(self.shapes))]
        self._deals = buckets.deal(self.shapes, [len(group) for group in self._groups])
        self._pieces: tuple[int, list[Piece]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches that visit each row once; the same in every epoch."""
        return sum(deal.full + (deal.partial > 0) for deal in self._deals)

    @property
    def padding_fraction(self) -> float:
        """Share of an epoch's token slots that hold no token, fill rows included."""
        slots = buckets.total_slots(self.shapes, self._deals)
        tokens = int(self.lengths.prompts.sum()) + int(self.lengths.responses.sum())
        return 1.0 - tokens / slots

    @property
    def identity(self) -> str:
        """Hash of all that decides the global stream. The number of processes does not."""
        digest = hashlib.sha256(repr((self.shapes, self._seed)).encode())
        for array in self.lengths:
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, step: int) -> Batch:
        """This process's rows of the batch of a step, counted from 0 over all epochs."""
        piece = self.piece(step)
        held = len(piece.rows)
        filled = np.concatenate(
            [piece.rows, np.full(piece.shape.rows - held, piece.rows[0], piece.rows.dtype)]
        )
        weight = (np.arange(piece.shape.rows) < held).astype(np.float32)
        own = self._own(piece.shape.rows)
        rows = self._fetch(filled[own].tolist())
        return collate(rows, piece.shape, numbers=filled[own], weight=weight[own], pad=self._pad)

    def piece(self, step: int) -> Piece:
        """The global batch of a step as row numbers: the same in every process."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[place]

    def epoch(self, epoch: int) -> list[Piece]:
        """All global batches of one epoch, in order."""
        cached = self._pieces  # one epoch at a time: steps come nearly in order
        if cached is None or cached[0] != epoch:
            cached = self._pieces = epoch, self._deal_epoch(epoch)
        return cached[1]

    def _deal_epoch(self, epoch: int) -> list[Piece]:
        order = (
            (lambda values: values)
            if self._seed is None
            else np.random.default_rng([self._seed, epoch]).permutation
        )
        waiting = [[group] for group in self._groups]
        pieces = []
        for number, (shape, deal) in enumerate(zip(self.shapes, self._deals, strict=True)):
            rows = order(np.concatenate(waiting[number]))
            for k in range(deal.full):
                pieces.append(Piece(shape, rows[k * shape.rows : (k + 1) * shape.rows]))
            left = rows[deal.full * shape.rows :]
            if deal.promoted:
                waiting[deal.target].append(left)
            elif deal.partial:
                pieces.append(Piece(shape, left))
        return [pieces[k] for k in order(np.arange(len(pieces)))]


def collate(
    rows: Sequence[Row],
    shape: Shape,
    *,
    numbers: Int[np.ndarray, " B"],
    weight: Float[np.ndarray, " B"],
    pad: int = 0,
) -> Batch:
    """Rows to one padded batch of their number; `numbers` name them, `weight` scales their own."""
    size, count = len(rows), shape.responses
    prompts = np.full((size, shape.prompt), pad, np.int32)
    responses = np.full((size, count, shape.response), pad, np.int32)
    prompt_lengths = np.zeros(size, np.int32)
    response_lengths = np.zeros((size, count), np.int32)
    scores = np.zeros((size, count), np.float32)
    for b, row in enumerate(rows):
        prompts[b, : len(row.prompt)] = row.prompt
        prompt_lengths[b] = len(row.prompt)
        for k, response in enumerate(row.responses):
            responses[b, k, : len(response)] = response
            response_lengths[b, k] = len(response)
            scores[b, k] = row.scores[k]
    return Batch(
        prompts=_ragged(prompts, prompt_lengths),
        responses=_ragged(responses, response_lengths),
        label=np.array([row.label for row in rows], np.float32),
        weight=np.array([row.weight for row in rows], np.float32) * weight,
        scores=scores,
        row=numbers.astype(np.int32),
    )


def _ragged(ids: np.ndarray, lengths: np.ndarray) -> Ragged:
    return Ragged(ids, lengths)  # pyright: ignore[reportArgumentType]  # NumPy: still on the host


def from_rows(rows: Sequence[Row]) -> tuple[Callable[[Sequence[int]], list[Row]], Lengths]:
    """``fetch`` and ``lengths`` of rows already in memory."""
    count = max((len(row.responses) for row in rows), default=0)
    responses = np.zeros((len(rows), count), np.int32)
    for number, row in enumerate(rows):
        responses[number, : len(row.responses)] = [len(response) for response in row.responses]
    lengths = Lengths(np.array([len(row.prompt) for row in rows], np.int32), responses)
    return (lambda numbers: [rows[number] for number in numbers]), lengths


@runtime_checkable
class Steps(Protocol):
    """What :class:`Stream` reads: batches by step number, padded or packed."""

    @property
    def identity(self) -> str:
        """Hash of all that decides the stream."""
        ...

    def __getitem__(self, step: int, /) -> Any:
        """The batch of a step."""
        ...


class Stream:
    """Endless iteration over a loader, read ahead by Grain's threads, resumable at any step."""

    def __init__(self, loader: Steps, *, start: int = 0, threads: int = 2, ahead: int = 8):
        self._loader = loader
        self._threads, self._ahead = threads, ahead
        self._seek(start)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Position, as a small dict for JSON: the step of the next batch, and whose it is."""
        return {"step": self._step, "stream": self._loader.identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken.

        Raises :class:`InputError` where the state is of another stream: other rows, lengths,
        shapes or seed.
        """
        if state["stream"] != self._loader.identity:
            raise InputError(
                f"the data position was saved for stream {state['stream']}, and this is stream "
                f"{self._loader.identity}: data, lengths, batch shapes or seed have changed; give "
                "those of the saved run, or start anew"
            )
        self._seek(int(state["step"]))

    def _seek(self, step: int) -> None:
        import grain

        # Steps are a whole position, so that Grain's own state, whose form is its own, is not kept.
        data = grain.MapDataset.source(_Steps(self._loader, step))
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._ahead)
        self._iterator = iter(data.to_iter_dataset(options))
        self._step = step


class _Steps:
    """The batches from a step on as Grain's random-access source: practically endless."""

    def __init__(self, loader: Steps, start: int):
        self._loader = loader
        self._start = start

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Any:
        return self._loader[self._start + index]
