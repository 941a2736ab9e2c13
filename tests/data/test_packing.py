"""Packed batches: every row once, whole and in its place, streams that fit, resumable anywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_klrlhf.data import batch, packing
from jax_klrlhf.data.batch import Lengths
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import packed
from tests.data.split import split


def rows_of(seed, count, *, longest=(12, 9)):
    """Rows whose tokens say which row, response and position they are."""
    rng = np.random.default_rng(seed)
    prompts = 1 + (rng.beta(1, 3, count) * longest[0]).astype(int)
    responses = 1 + (rng.beta(1, 3, (count, 2)) * longest[1]).astype(int)
    return [
        Row(
            [1000 * n + i for i in range(prompts[n])],
            [[1000 * n + 100 * (k + 1) + i for i in range(responses[n, k])] for k in range(2)],
            [float(n), -float(n)],
            label=n / count,
            weight=1.0 + n,
            number=n,
        )
        for n in range(count)
    ]


def loader(rows, *, seed=0, process=(0, 1), **settings):
    fetch, lengths = batch.from_rows(rows)
    layouts = packing.fit(lengths, multiple=4, **settings)
    return packing.PackedLoader(
        fetch, lengths, layouts=layouts, seed=seed, own=split(*process),
    )  # fmt: skip


def streams_of(given):
    """True tokens of each stream, in order."""
    ids = np.concatenate(
        [
            part.ids.reshape(given.packed.stream.shape[0], -1)
            for pair in zip(given.packed.prompts, given.packed.responses, strict=True)
            for part in pair
        ],
        axis=1,
    )
    return [
        row[place[place >= 0]].tolist() for row, place in zip(ids, given.packed.stream, strict=True)
    ]


@given(
    st.integers(0, 2**16),
    st.integers(1, 60),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
)
def test_an_epoch_holds_every_token_once_and_fits(seed, count, streams, max_shapes, by_tokens):
    rows = rows_of(seed, count)
    size = {"token_budget": 48 * streams} if by_tokens else {"batch_size": 4 * streams}
    ours = loader(rows, streams=streams, max_shapes=max_shapes, **size)
    assert len(ours.shapes) <= max_shapes
    seen, slots = [], 0
    for step in range(ours.steps_per_epoch):
        given = ours[step]
        assert given.packed.stream.shape[0] == streams
        if by_tokens:
            assert given.packed.stream.size <= 48 * streams
        slots += given.packed.stream.size
        seen += itertools.chain(*streams_of(given))
        assert given.weight.max() > 0
        for row, weight, label, scores in zip(
            given.row, given.weight, given.label, given.scores, strict=True
        ):
            if weight:
                assert (weight, label, scores[0]) == (1.0 + row, np.float32(row / count), row)
    expected = [token for row in rows for part in (row.prompt, *row.responses) for token in part]
    assert sorted(seen) == sorted(expected)
    assert ours.padding_fraction == pytest.approx(1 - len(expected) / slots)


def test_rows_stand_in_the_order_of_the_scores():
    """Lengths in the order of `packed.rows` are those of the row numbers there."""
    rows = rows_of(3, 40)
    given = loader(rows, streams=2, batch_size=12, max_shapes=1)[0]
    prompts = np.asarray(packed.padded(given.packed, given.packed.prompts).lengths)
    responses = np.asarray(packed.padded(given.packed, given.packed.responses).lengths)
    for place, number in enumerate(given.row):
        if given.weight[place]:
            assert prompts[place] == len(rows[number].prompt)
            assert responses[place].tolist() == [len(r) for r in rows[number].responses]
        else:
            assert prompts[place] == responses[place].sum() == 0


def test_many_rows_leave_little_padding():
    ours = loader(rows_of(0, 600, longest=(200, 120)), token_budget=2048, max_shapes=4)
    assert ours.padding_fraction < 0.05
    _, lengths = batch.from_rows(rows_of(0, 600, longest=(200, 120)))
    assert ours.steps_per_epoch < 1.1 * sum(x.sum() for x in lengths) / 2048


def test_the_order_is_a_function_of_seed_and_epoch():
    rows = rows_of(1, 50)
    first, again, other = (loader(rows, seed=s, token_budget=96, max_shapes=2) for s in (5, 5, 6))
    per_epoch = first.steps_per_epoch

    def order(ours, epoch):
        return [ours[epoch * per_epoch + k].row.tolist() for k in range(per_epoch)]

    assert order(first, 1) == order(again, 1)
    assert order(first, 1) != order(first, 0)
    assert order(first, 1) != order(other, 1)
    assert first.identity == again.identity != other.identity
    # Resumed in the middle, the stream goes on as if it had not been left.
    read = batch.Stream(first)
    steps = [next(read).row.tolist() for _ in range(4)]
    state = read.state()
    resumed = batch.Stream(again)
    resumed.restore(state)
    assert state["step"] == 4
    assert next(resumed).row.tolist() == next(read).row.tolist() not in steps
    with pytest.raises(InputError, match="seed have changed"):
        batch.Stream(other).restore(state)


def test_processes_share_each_batch():
    rows = rows_of(2, 40)
    settings = {"streams": 4, "batch_size": 12, "max_shapes": 2}
    whole = loader(rows, **settings)
    parts = [loader(rows, process=(n, 2), **settings) for n in range(2)]
    for step in range(whole.steps_per_epoch):
        for n, part in enumerate(parts):
            assert streams_of(part[step]) == streams_of(whole[step])[n::2]


def test_when_no_drawing_fits_one_does_that_is_known_to(monkeypatch):
    rows = rows_of(4, 60)
    ours = loader(rows, token_budget=64, max_shapes=1)
    (layout,) = ours.shapes
    drawn = packing._deal

    def unlucky(lengths, groups, count, key):
        dealt = drawn(lengths, groups, count, key)
        return dealt if list(key) == [0] else np.sort(dealt, axis=0)  # the longest together

    monkeypatch.setattr(packing, "_deal", unlucky)
    dealt = packing.deal(ours.lengths, layout, [0, 7, 0])
    tokens, answers = packing._loads(ours.lengths, dealt)
    assert tokens.max() <= layout.tokens
    assert answers.max() <= layout.answers
    assert sorted(dealt[dealt >= 0]) == list(range(60))


def test_what_cannot_be_packed_is_said():
    _, lengths = batch.from_rows(rows_of(0, 10))
    longest = int((lengths.prompts + lengths.responses.sum(1)).max())
    with pytest.raises(InputError, match=f"raise it to {2 * longest}"):
        packing.fit(lengths, streams=2, token_budget=longest)
    with pytest.raises(InputError, match="no rows"):
        packing.fit(Lengths(lengths.prompts[:0], lengths.responses[:0]), batch_size=4)
    with pytest.raises(ValueError, match="exactly one"):
        packing.fit(lengths)
    with pytest.raises(ValueError, match="at least 1"):
        packing.fit(lengths, batch_size=4, streams=0)
    with pytest.raises(ValueError, match="1 rows on 2 parts"):
        loader(rows_of(0, 10), batch_size=4, process=(0, 2))
    part = loader(rows_of(0, 10), batch_size=4)[0].packed
    with pytest.raises(ValueError, match="in 2 slots"):
        packing._places(np.ones((1, 3), bool), 2)
    assert part.stream.dtype == np.int32
