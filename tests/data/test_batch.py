"""The batch stream: every row once an epoch, the same after any resume, shared out over hosts."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_klrlhf.data import batch, buckets
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from tests.data.split import split

PAD = 99


def make_rows(count, seed=0, responses=(2,)):
    rng = np.random.default_rng(seed)
    return [
        Row(
            prompt=rng.integers(1, 50, rng.integers(1, 40)).tolist(),
            responses=[
                rng.integers(1, 50, rng.integers(1, 24)).tolist()
                for _ in range(rng.choice(responses))
            ],
            scores=[1.0, 0.0, -1.0, -2.0][: max(responses)],
            label=float(rng.uniform(0.5, 1)),
            weight=1.0,
            number=number,
        )
        for number in range(count)
    ]


def make_loader(rows, *, seed=0, max_shapes=4, divisor=1, process=(0, 1), **size):
    fetch, lengths = batch.from_rows(rows)
    shapes = buckets.fit(
        lengths.prompts,
        lengths.longest,
        responses=lengths.responses.shape[1],
        max_shapes=max_shapes,
        divisor=divisor,
        **(size or {"token_budget": 400}),
    )
    return batch.Loader(
        fetch,
        lengths,
        shapes=shapes,
        seed=seed,
        own=split(*process),
        pad=PAD,
    )


def assert_equal(one, two):
    for left, right in zip(
        [*one.prompts, *one.responses, *one[2:-1]],
        [*two.prompts, *two.responses, *two[2:-1]],
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


@given(
    count=st.integers(1, 70),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    max_shapes=st.integers(1, 5),
    epoch=st.integers(0, 2),
    size=st.sampled_from([{"token_budget": 300}, {"token_budget": 900}, {"batch_size": 6}]),
)
def test_every_row_once_an_epoch_in_a_shape_of_the_set(count, seed, max_shapes, epoch, size):
    loader = make_loader(make_rows(count), seed=seed, max_shapes=max_shapes, **size)
    seen = []
    for step in range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch):
        got = loader[step]
        b, k, c = got.responses.ids.shape
        assert buckets.Shape(b, got.prompts.ids.shape[1], k, c) in loader.shapes
        assert got.weight[0] > 0  # no batch without a row
        seen += got.row[got.weight > 0].tolist()
    assert sorted(seen) == list(range(count))
    assert len(loader.shapes) <= max_shapes


@given(start=st.integers(0, 40), seed=st.integers(0, 3))
def test_stream_resumed_anywhere_is_the_stream(start, seed):
    loader = make_loader(make_rows(40), seed=seed)
    whole = batch.Stream(loader, threads=2, ahead=4)
    for _ in range(start):
        next(whole)
    state = json.loads(json.dumps(whole.state()))  # small, and JSON
    resumed = batch.Stream(make_loader(make_rows(40), seed=seed))
    next(resumed)
    resumed.restore(state)
    for _ in range(3):
        assert_equal(next(whole), next(resumed))


@given(count=st.integers(1, 50), hosts=st.sampled_from([2, 3]))
def test_hosts_partition_every_batch(count, hosts):
    rows = make_rows(count)
    alone = make_loader(rows, divisor=hosts)
    parts = [make_loader(rows, divisor=hosts, process=(h, hosts)) for h in range(hosts)]
    for step in range(alone.steps_per_epoch):
        want = alone[step]
        for host, part in enumerate(parts):
            piece = part[step]
            np.testing.assert_array_equal(piece.row, want.row[host::hosts])
            np.testing.assert_array_equal(piece.weight, want.weight[host::hosts])
            np.testing.assert_array_equal(piece.responses.ids, want.responses.ids[host::hosts])
            assert part.piece(step).rows.tolist() == alone.piece(step).rows.tolist()
    assert {part.identity for part in parts} == {alone.identity}  # resumable on other hosts


def test_batch_holds_the_rows_and_padding_nothing_else():
    rows = make_rows(23, responses=(1, 2, 3))
    loader = make_loader(rows)
    for step in range(loader.steps_per_epoch):
        got = loader[step]
        for b, number in enumerate(got.row):
            row = rows[number]
            length = got.prompts.lengths[b]
            assert got.prompts.ids[b, :length].tolist() == row.prompt
            assert (got.prompts.ids[b, length:] == PAD).all()
            for k in range(3):
                length = got.responses.lengths[b, k]
                want = row.responses[k] if k < len(row.responses) else []
                assert got.responses.ids[b, k, :length].tolist() == want
                assert (got.responses.ids[b, k, length:] == PAD).all()
            assert got.label[b] == np.float32(row.label)
            assert got.scores[b, : len(row.responses)].tolist() == row.scores[: len(row.responses)]


def test_fill_rows_are_real_rows_of_weight_zero():
    loader = make_loader(make_rows(5), batch_size=4, max_shapes=1)
    last = loader[[len(p.rows) < 4 for p in loader.epoch(0)].index(True)]
    assert last.weight.tolist() == [1, 0, 0, 0]
    assert (last.responses.lengths > 0).all()  # no 0/0 on a row that is masked out
    assert set(last.row.tolist()) == {last.row[0]}


def test_epochs_are_shuffled_anew_and_seeds_differ():
    def order(seed, epoch):
        return [p.rows.tolist() for p in make_loader(make_rows(40), seed=seed).epoch(epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(None, 0) == order(None, 1)


def test_rows_of_weight_of_their_own_keep_it():
    rows = [row._replace(weight=0.25) for row in make_rows(4)]
    got = make_loader(rows, batch_size=4, max_shapes=1)[0]
    assert got.weight.tolist() == [0.25] * 4


@pytest.mark.parametrize("responses", [(2,), (1, 3), (4,)])
def test_padding_fraction_is_the_share_of_slots_without_a_token(responses):
    loader = make_loader(make_rows(50, responses=responses))
    slots = tokens = 0
    for step in range(loader.steps_per_epoch):
        got = loader[step]
        real = got.weight > 0
        slots += got.prompts.ids.size + got.responses.ids.size
        tokens += got.prompts.lengths[real].sum() + got.responses.lengths[real].sum()
    assert loader.padding_fraction == pytest.approx(1 - tokens / slots, rel=1e-12)


def test_more_shapes_pad_less():
    rows = make_rows(400)
    fractions = [make_loader(rows, max_shapes=s).padding_fraction for s in (1, 4, 16)]
    assert fractions[0] > fractions[1] > fractions[2]


def test_prompts_alone():
    rows = [row._replace(responses=[], scores=[]) for row in make_rows(9)]
    got = make_loader(rows, batch_size=3)[0]
    assert got.responses.ids.shape == (3, 0, 0)
    assert got.scores.shape == (3, 0)


@pytest.mark.parametrize("change", ["seed", "rows", "shapes"])
def test_state_of_another_stream_is_refused_by_name(change):
    state = batch.Stream(make_loader(make_rows(20))).state()
    other = {
        "seed": lambda: make_loader(make_rows(20), seed=1),
        "rows": lambda: make_loader(make_rows(21)),
        "shapes": lambda: make_loader(make_rows(20), token_budget=800),
    }[change]()
    with pytest.raises(InputError, match=f"{state['stream']}.*{other.identity}"):
        batch.Stream(other).restore(state)


def test_batch_that_does_not_divide_over_hosts_is_refused():
    with pytest.raises(ValueError, match="3 rows on 2 parts"):
        make_loader(make_rows(9), batch_size=3, process=(1, 2))


def test_negative_step_is_refused():
    with pytest.raises(IndexError):
        make_loader(make_rows(3))[-1]
