"""Few batch shapes, little padding: which rectangles a data set is batched into.

A batch is ``prompts [B, P]`` and ``responses [B, K, C]``, so a row of prompt length p and longest
response c costs ``P + K C`` slots in a shape with ``p <= P`` and ``c <= C``. Every shape is a
compilation; every slot that holds no token is work thrown away. :func:`fit` chooses at most
`max_shapes` rectangles from the quantiles of both lengths, greedily by the slots they save and by
moving each to its best place, and keeps what an epoch needs fewest slots with. :func:`deal`
distributes a data set over them, part-filled batches included; it depends on counts alone, so every
epoch has the same number of steps and a step number is a whole position in the stream.

What no choice of shapes can save is what a row's shorter responses lack of its longest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jax_klrlhf.errors import InputError

_QUANTILES = 32


class Shape(NamedTuple):
    """Shape of a batch: prompts `[rows, prompt]`, responses `[rows, responses, response]`."""

    rows: int
    prompt: int
    responses: int
    response: int

    @property
    def row_slots(self) -> int:
        """Token slots of one row."""
        return self.prompt + self.responses * self.response

    @property
    def slots(self) -> int:
        """Token slots of the batch."""
        return self.rows * self.row_slots

    def holds(self, other: "Shape") -> bool:
        """Whether every row of `other` fits in this shape."""
        return self.prompt >= other.prompt and self.response >= other.response


class Deal(NamedTuple):
    """How one shape's rows of an epoch become batches (counts only)."""

    full: int
    """Batches without fill rows."""
    partial: int
    """Rows of one last, part-filled batch; 0: there is none."""
    promoted: int
    """Rows left over that join a larger shape."""
    target: int
    """The shape they join; -1: none do."""


def fit(
    prompt_lengths: Int[np.ndarray, " rows"],
    response_lengths: Int[np.ndarray, " rows"],
    *,
    responses: int,
    max_shapes: int = 8,
    token_budget: int | None = None,
    batch_size: int | None = None,
    divisor: int = 1,
    multiple: int = 8,
) -> tuple[Shape, ...]:
    """At most `max_shapes` batch shapes for these lengths, smallest row first.

    Args:
        prompt_lengths: tokens of each prompt.
        response_lengths: tokens of the longest of each row's responses.
        responses: K, the responses of a row.
        max_shapes: bound on the shapes, hence on compilations.
        token_budget: slots of a batch at most. Short rows come in larger batches, and the batches
            of a shape are made equally full.
        batch_size: rows of every batch instead. Exactly one of the two is given.
        divisor: rows of a batch are a multiple of this: the devices that share them.
        multiple: lengths of a shape are multiples of this (8 suits the tiles of a TPU).

    Raises :class:`InputError` where a single row per device exceeds the budget.
    """
    if (token_budget is None) == (batch_size is None):
        raise ValueError("give exactly one of token_budget and batch_size")
    if max_shapes < 1 or divisor < 1 or multiple < 1:
        raise ValueError(
            f"max_shapes {max_shapes}, divisor {divisor}, multiple {multiple}: at least 1"
        )
    if not len(prompt_lengths):
        raise InputError("no rows to batch: every example was dropped, or the split is empty")
    prompt_edges = _edges(prompt_lengths, multiple)
    response_edges = _edges(response_lengths, multiple) if responses else np.zeros(1, np.int64)
    places = (
        np.searchsorted(prompt_edges, prompt_lengths),
        np.searchsorted(response_edges, response_lengths),
    )
    count = np.zeros((len(prompt_edges), len(response_edges)))
    np.add.at(count, places, 1)

    def shape(pick: int) -> Shape:
        p, c = divmod(pick, len(response_edges))
        prompt, response = int(prompt_edges[p]), int(response_edges[c])
        row = prompt + responses * response
        if batch_size is not None:
            rows = batch_size
            if rows % divisor:
                raise InputError(f"batch size {rows} is no multiple of the {divisor} devices")
        else:
            assert token_budget is not None
            rows = token_budget // row // divisor * divisor
            if rows == 0:
                raise InputError(
                    f"token budget {token_budget} holds no row of {prompt} prompt and "
                    f"{responses} x {response} response tokens on each of {divisor} devices: "
                    f"raise it to {row * divisor}, or cut the lengths"
                )
        return Shape(rows, prompt, responses, response)

    best: tuple[int, tuple[Shape, ...]] | None = None
    row_slots = prompt_edges[:, None] + responses * response_edges
    for picks in _candidates(count, row_slots, max_shapes):
        shapes = tuple(sorted(map(shape, picks), key=lambda s: (s.row_slots, s)))
        chosen = assign(shapes, prompt_lengths, response_lengths)
        sizes = np.bincount(chosen, minlength=len(shapes)).tolist()
        if batch_size is None:
            shapes = tuple(_level(s, n, divisor) for s, n in zip(shapes, sizes, strict=True))
        slots = total_slots(shapes, deal(shapes, sizes))
        if best is None or slots < best[0]:
            best = slots, shapes
    assert best is not None
    return best[1]


def assign(
    shapes: Sequence[Shape],
    prompt_lengths: Int[np.ndarray, " rows"],
    response_lengths: Int[np.ndarray, " rows"],
) -> Int[np.ndarray, " rows"]:
    """The cheapest shape that holds each row. Raises ValueError for a row that none holds."""
    chosen = np.full(len(prompt_lengths), -1)
    for number in reversed(range(len(shapes))):  # the cheapest comes last and wins
        shape = shapes[number]
        chosen[(prompt_lengths <= shape.prompt) & (response_lengths <= shape.response)] = number
    if len(chosen) and chosen.min() < 0:
        row = int(chosen.argmin())
        raise ValueError(
            f"row {row} has {prompt_lengths[row]} prompt and {response_lengths[row]} response "
            f"tokens, more than any of the shapes {list(shapes)}"
        )
    return chosen


def deal(shapes: Sequence[Shape], sizes: Sequence[int]) -> list[Deal]:
    """Batches of one epoch, from the number of rows whose shape is each of `shapes`.

    Rows that do not fill a batch join the next larger shape that holds them, where their added
    slots are fewer than the slots of fill rows.
    """
    sizes = list(sizes)
    deals = []
    for number, shape in enumerate(shapes):
        full, left = divmod(sizes[number], shape.rows)
        larger = [k for k in range(number + 1, len(shapes)) if shapes[k].holds(shape)]
        target = -1
        if left and larger:
            candidate = min(larger, key=lambda k: shapes[k].row_slots)
            added = left * (shapes[candidate].row_slots - shape.row_slots)
            if added < (shape.rows - left) * shape.row_slots:
                target = candidate
                sizes[target] += left
        promoted = left if target >= 0 else 0
        deals.append(Deal(full, left - promoted, promoted, target))
    return deals


def total_slots(shapes: Sequence[Shape], deals: Sequence[Deal]) -> int:
    """Token slots of an epoch, padding and fill rows included."""
    return sum(
        (d.full + (d.partial > 0)) * shape.slots for shape, d in zip(shapes, deals, strict=True)
    )


def _edges(lengths: Int[np.ndarray, " rows"], multiple: int) -> Int[np.ndarray, " edges"]:
    """Candidate lengths: quantiles, rounded up."""
    quantiles = np.quantile(lengths, np.linspace(0, 1, _QUANTILES + 1)[1:], method="higher")
    rounded = np.ceil(quantiles / multiple).astype(np.int64) * multiple
    return np.unique(np.maximum(rounded, multiple))


def _level(shape: Shape, count: int, divisor: int) -> Shape:
    """As many batches for `count` rows as the shape needs, but all equally full."""
    batches = max(-(-count // shape.rows), 1)
    rows = max(-(-count // batches), 1)
    return shape._replace(rows=-(-rows // divisor) * divisor)


def _candidates(count: np.ndarray, cost: np.ndarray, max_shapes: int) -> list[list[int]]:
    """For 1, 2, ... shapes: flat indices into the grid whose rows need few slots."""
    p, c = np.indices(count.shape)
    grid = [(i, j) for i in range(count.shape[0]) for j in range(count.shape[1])]
    # slots[s, p, c]: of one row of cell (p, c) in candidate s; infinite where it does not fit
    slots = np.stack([np.where((p <= i) & (c <= j), cost[i, j], np.inf) for i, j in grid])

    def best_addition(current: np.ndarray) -> int:
        needed = np.where(count > 0, np.minimum(slots, current[None]), 0.0)
        return int(np.einsum("spc,pc->s", needed, count).argmin())

    def moved(picks: list[int]) -> list[int]:
        picks = list(picks)
        for _ in range(2):  # each shape to its best place, the others standing
            for place in range(1, len(picks)):
                others = [pick for k, pick in enumerate(picks) if k != place]
                picks[place] = best_addition(slots[others].min(0))
        return picks

    greedy = [len(grid) - 1]  # the one that holds every row
    tuned = list(greedy)
    result = [greedy]
    while len(greedy) < min(max_shapes, len(grid)):
        greedy = [*greedy, best_addition(slots[greedy].min(0))]
        tuned = moved([*tuned, best_addition(slots[tuned].min(0))])
        result += [greedy, tuned]
    return [sorted(set(candidate)) for candidate in result]
