"""Batches without padding: streams of tokens in few shapes, each filled nearly to its end.

A batch is `streams` rows of tokens (:class:`models.packed.Packed`) of one :class:`Layout`: so many
examples of each of its rectangles (a longest prompt and a longest response), and `T` token slots.
A layout is a compilation. One layout of all rectangles compiles once, and every batch holds long
and short examples in the proportions of the data set; a layout for each rectangle compiles more
often, and attention, which works on rectangles, then wastes least.

:func:`fit` chooses the rectangles by :func:`buckets.fit` and shares them out over layouts.
:func:`deal` distributes an epoch: the examples of a rectangle, sorted by length up to a random
tenth, are dealt one to each stream, round by round; first at random, and in the last rounds the
longest to the stream that holds least. So the streams end up with nearly equally many tokens, and
what is left of `T` is the padding.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import buckets
from jax_klrlhf.data.batch import Lengths, Own, collate
from jax_klrlhf.data.buckets import Shape
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from jax_klrlhf.models.batch import Batch, PackedBatch
from jax_klrlhf.models.packed import Packed

_JITTER = 0.1
_TRIALS = 4  # dealings that the slots are made for; the first stands in where a later fits not


class Layout(NamedTuple):
    """One shape of streams, and how many of them an epoch has."""

    groups: tuple[Shape, ...]
    """Rectangles of a stream; ``rows`` is the examples of it in one stream, 0 where unused."""
    tokens: int
    """T: token slots of a stream."""
    answers: int
    """Response tokens of a stream at most."""
    streams: int
    """Streams of a batch."""
    epoch: int
    """Streams of an epoch: a multiple of those of a batch."""


def fit(
    lengths: Lengths,
    *,
    streams: int = 1,
    token_budget: int | None = None,
    batch_size: int | None = None,
    max_shapes: int = 8,
    rectangles: int = 8,
    multiple: int = 8,
) -> tuple[Layout, ...]:
    """At most `max_shapes` layouts for a data set, short examples first.

    Args:
        lengths: token counts of all rows.
        streams: of a batch: one for each part of it that devices or micro-batches take.
        token_budget: token slots of a batch at most, over all streams.
        batch_size: examples of a batch instead, about. Exactly one of the two is given.
        max_shapes: bound on the layouts, hence on compilations.
        rectangles: bound on the rectangles of all layouts together, where it is larger.
        multiple: T and the sides of rectangles are multiples of this.

    Raises :class:`InputError` where a stream's share of the budget does not hold the longest row,
    or there is no row.
    """
    if (token_budget is None) == (batch_size is None):
        raise ValueError("give exactly one of token_budget and batch_size")
    if streams < 1 or max_shapes < 1 or rectangles < 1:
        raise ValueError(
            f"streams {streams}, max_shapes {max_shapes}, rectangles {rectangles}: at least 1"
        )
    found = buckets.fit(
        lengths.prompts,
        lengths.longest,
        responses=lengths.responses.shape[1],
        max_shapes=max(max_shapes, rectangles),
        batch_size=1,
        multiple=multiple,
    )
    total = lengths.prompts + lengths.responses.sum(axis=1)
    budget = 0 if token_budget is None else token_budget // streams
    if token_budget is not None and total.max() > budget:
        raise InputError(
            f"token budget {token_budget} gives each of {streams} streams {budget} tokens, and a "
            f"row has {total.max()}: raise it to {int(total.max()) * streams}, or cut the lengths"
        )
    shares = [share.tolist() for share in np.array_split(np.arange(len(found)), max_shapes)]
    whole = lambda n: -(-int(n) // streams) * streams  # noqa: E731
    chosen = buckets.assign(found, lengths.prompts, lengths.longest)
    layouts = []
    for share in shares:
        rows = np.flatnonzero(np.isin(chosen, share))
        if not len(rows):
            continue
        part = Lengths(lengths.prompts[rows], lengths.responses[rows])
        settings = {"streams": streams, "multiple": multiple}
        shapes = [found[number] for number in share]
        if batch_size is not None:
            count = whole(-(-len(rows) * streams // batch_size))
            layouts.append(_layout(part, shapes, count, **settings))
            continue
        count = whole(-(-int(total[rows].sum()) // budget))
        while True:
            layout = _layout(part, shapes, count, **settings)
            if layout.tokens <= budget or count >= whole(len(rows)):
                break
            count = whole(max(count + 1, count * layout.tokens // budget))
        layouts.append(layout)
    return tuple(layouts)


def _layout(
    lengths: Lengths, rectangles: Sequence[Shape], count: int, *, streams: int, multiple: int
) -> Layout:
    members = _members(lengths, rectangles, count)
    groups = tuple(shape._replace(rows=size) for shape, size, _ in members)
    loads = [_loads(lengths, _deal(lengths, groups, count, [trial])) for trial in range(_TRIALS)]
    tokens, answers = (
        -(-max(int(load[k].max()) for load in loads) // multiple) * multiple for k in (0, 1)
    )
    return Layout(groups, tokens, answers, streams, count)


def _members(
    lengths: Lengths, rectangles: Sequence[Shape], count: int
) -> list[tuple[Shape, int, Int[np.ndarray, " held"]]]:
    """Of each rectangle: its examples in a stream, and the rows it holds.

    Rows left over from equal shares join the next larger rectangle that holds them, the longest
    first, where that adds fewer slots than would stand empty.
    """
    total = lengths.prompts + lengths.responses.sum(axis=1)
    chosen = buckets.assign(rectangles, lengths.prompts, lengths.longest)
    members = [np.flatnonzero(chosen == number) for number in range(len(rectangles))]
    found = []
    for number, shape in enumerate(rectangles):
        rows = members[number][np.argsort(total[members[number]], kind="stable")]
        size, left = divmod(len(rows), count)
        larger = [k for k in range(number + 1, len(rectangles)) if rectangles[k].holds(shape)]
        if left and larger:
            target = min(larger, key=lambda k: rectangles[k].row_slots)
            added = left * (rectangles[target].row_slots - shape.row_slots)
            if added < (count - left) * shape.row_slots:
                members[target] = np.concatenate([members[target], rows[len(rows) - left :]])
                rows, left = rows[: len(rows) - left], 0
        found.append((shape, size + (left > 0), rows))
    return found


def deal(lengths: Lengths, layout: Layout, key: Sequence[int]) -> Int[np.ndarray, "count slots"]:
    """Rows of each stream of a layout's part of an epoch, group by group; -1: none is there.

    `lengths` are those of the layout's own rows, whose numbers count from 0. A function of `key`.
    Dealings that do not fit are drawn again; were many to fail, one that is known to fit is taken,
    its streams in another order.
    """
    for attempt in range(16):
        rows = _deal(lengths, layout.groups, layout.epoch, [*key, attempt])
        tokens, answers = _loads(lengths, rows)
        if tokens.max() <= layout.tokens and answers.max() <= layout.answers:
            return rows
    return np.random.default_rng(key).permutation(_deal(lengths, layout.groups, layout.epoch, [0]))


def _deal(
    lengths: Lengths, groups: Sequence[Shape], count: int, key: Sequence[int]
) -> Int[np.ndarray, "count slots"]:
    random = np.random.default_rng(key)
    answers = lengths.responses.sum(axis=1)
    total = lengths.prompts + answers
    rounds = []
    for number, (_, size, rows) in enumerate(_members(lengths, groups, count)):
        assert size == groups[number].rows
        noise = random.uniform(1 - _JITTER, 1 + _JITTER, len(rows))
        rows = rows[np.argsort(-total[rows] * noise, kind="stable")]
        rows = np.concatenate([rows, np.full(size * count - len(rows), -1)])
        rounds += list(rows.reshape(size, count))
    size = lambda rows, of: np.where(rows < 0, 0, of[rows])  # noqa: E731
    # Those that differ most first: the last rounds only have to level.
    order = sorted(range(len(rounds)), key=lambda k: -np.ptp(size(rounds[k], total)))
    load = np.zeros(count)
    dealt = np.empty((count, len(rounds)), np.int64)
    for place, number in enumerate(order):
        rows = random.permutation(rounds[number])
        if 2 * place >= len(rounds):
            rows = rows[np.argsort(-size(rows, total), kind="stable")]
            needy = np.argsort(load, kind="stable")
            rows = rows[np.argsort(needy, kind="stable")]
        dealt[:, number] = rows
        load += size(rows, total)
    return random.permutation(dealt)


def _loads(lengths: Lengths, dealt: Int[np.ndarray, "count slots"]) -> tuple[np.ndarray, ...]:
    """Tokens and response tokens of each stream."""
    answers = np.where(dealt < 0, 0, lengths.responses.sum(axis=1)[dealt])
    return (answers + np.where(dealt < 0, 0, lengths.prompts[dealt])).sum(1), answers.sum(1)


class PackedLoader:
    """Packed batches by step number, as :class:`batch.Loader` gives padded ones.

    Every row once in an epoch; the order is a function of seed and epoch. All processes deal the
    same streams, and each reads its own of every batch (``own``, as in :class:`batch.Loader`).
    """

    def __init__(
        self,
        fetch: Callable[[Sequence[int]], list[Row]],
        lengths: Lengths,
        *,
        layouts: Sequence[Layout],
        seed: int,
        own: Own = np.arange,
        pad: int = 0,
    ):
        self.shapes = tuple(layouts)
        self.lengths = lengths
        self._fetch = fetch
        self._seed = seed
        self._own = own
        self._pad = pad
        for layout in self.shapes:
            own(layout.streams)  # refused here, where they do not divide
        shapes = [shape for layout in self.shapes for shape in layout.groups]
        owner = [n for n, layout in enumerate(self.shapes) for _ in layout.groups]
        chosen = buckets.assign(shapes, lengths.prompts, lengths.longest)
        number = np.array(owner)[chosen]
        self._rows = [np.flatnonzero(number == n) for n in range(len(self.shapes))]
        self._dealt: tuple[int, list[tuple[Layout, np.ndarray]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches that visit each row once."""
        return sum(layout.epoch // layout.streams for layout in self.shapes)

    @property
    def padding_fraction(self) -> float:
        """Share of an epoch's token slots that hold no token."""
        tokens = int(self.lengths.prompts.sum()) + int(self.lengths.responses.sum())
        return 1.0 - tokens / sum(layout.epoch * layout.tokens for layout in self.shapes)

    @property
    def identity(self) -> str:
        """Hash of all that decides the global stream of batches."""
        digest = hashlib.sha256(repr((self.shapes, self._seed)).encode())
        for array in self.lengths:
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def epoch(self, epoch: int) -> list[tuple[Layout, Int[np.ndarray, "streams slots"]]]:
        """All global batches of one epoch, in order: layout, and the rows of each stream."""
        if self._dealt is None or self._dealt[0] != epoch:
            batches = []
            for number, (layout, rows) in enumerate(zip(self.shapes, self._rows, strict=True)):
                part = Lengths(self.lengths.prompts[rows], self.lengths.responses[rows])
                dealt = deal(part, layout, [self._seed, epoch, number])
                dealt = np.where(dealt < 0, -1, rows[dealt])
                for streams in dealt.reshape(-1, layout.streams, dealt.shape[1]):
                    batches.append((layout, streams))
            order = np.random.default_rng([self._seed, epoch]).permutation(len(batches))
            self._dealt = epoch, [batches[k] for k in order]
        return self._dealt[1]

    def __getitem__(self, step: int) -> PackedBatch:
        """This process's part of the batch of a step, counted from 0 over all epochs."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        epoch, place = divmod(step, self.steps_per_epoch)
        layout, dealt = self.epoch(epoch)[place]
        return collate_streams(
            self._fetch,
            layout,
            dealt[self._own(layout.streams)],
            responses=self.lengths.responses.shape[1],
            stand_in=int(dealt.max()),
            pad=self._pad,
        )


def collate_streams(
    fetch: Callable[[Sequence[int]], list[Row]],
    layout: Layout,
    dealt: Int[np.ndarray, "streams slots"],
    *,
    responses: int,
    stand_in: int,
    pad: int = 0,
) -> PackedBatch:
    """The rows dealt to some streams, -1 where there is none, as a packed batch.

    An absent example has no tokens, weight 0, and the row number `stand_in`.
    """
    absent = Row([], [[]] * responses, [0.0] * responses, 1.0, 0.0, -1)
    parts, begin = [], 0
    for shape in layout.groups:
        if not shape.rows:
            continue
        held = dealt[:, begin : begin + shape.rows].reshape(-1)
        begin += shape.rows
        there = held >= 0
        fetched = iter(fetch(held[there].tolist()))
        rows = [next(fetched) if kept else absent for kept in there]
        numbers = np.where(there, held, stand_in)
        weight = there.astype(np.float32)
        parts.append(collate(rows, shape, numbers=numbers, weight=weight, pad=pad))
    return pack(parts, streams=len(dealt), tokens=layout.tokens, answers=layout.answers)


def pack(parts: Sequence[Batch], *, streams: int, tokens: int, answers: int) -> PackedBatch:
    """Padded batches, one for each group and of `streams` times its examples, as one packed batch.

    Raises ValueError where a stream has more than `tokens` tokens or `answers` response tokens.
    """
    masks, responses = [], []
    for part in parts:
        both = [_mask(part.prompts, streams), _mask(part.responses, streams)]
        masks += both
        responses.append(both[1])
    packed = Packed(
        prompts=tuple(part.prompts for part in parts),
        responses=tuple(part.responses for part in parts),
        stream=_places(np.concatenate(masks, axis=1), tokens),  # pyright: ignore[reportArgumentType]  # NumPy: still on the host
        answers=_places(np.concatenate(responses, axis=1), answers),  # pyright: ignore[reportArgumentType]  # likewise
    )

    def rows(name: str) -> np.ndarray:
        each = [getattr(part, name) for part in parts]
        split = [x.reshape(streams, -1, *x.shape[1:]) for x in each]
        joined = np.concatenate(split, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return PackedBatch(packed, **{n: rows(n) for n in ("label", "weight", "scores", "row")})


def _mask(ragged: Ragged, streams: int) -> np.ndarray:
    ids, lengths = (np.asarray(x) for x in ragged)
    return (np.arange(ids.shape[-1]) < lengths[..., None]).reshape(streams, -1)


def _places(mask: np.ndarray, slots: int) -> np.ndarray:
    """Places of the True in each row, ascending, then -1."""
    count = mask.sum(axis=1)
    if count.max(initial=0) > slots:
        raise ValueError(f"a stream of {count.max()} tokens in {slots} slots")
    found = np.full((len(mask), slots), -1, np.int32)
    row, place = np.nonzero(mask)
    found[row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)] = place
    return found
