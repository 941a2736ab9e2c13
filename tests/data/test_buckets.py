"""Batch shapes: few, sufficient, and no worse than any choice that can be enumerated."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_klrlhf.data import buckets
from jax_klrlhf.data.buckets import Deal, Shape
from jax_klrlhf.errors import InputError

lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=60).map(
    lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True))
)


@given(
    lengths=lengths,
    max_shapes=st.integers(1, 5),
    divisor=st.integers(1, 3),
    multiple=st.sampled_from([1, 8]),
    budget=st.integers(600, 2000),
)
def test_shapes_hold_every_row_within_bound_budget_and_multiples(
    lengths, max_shapes, divisor, multiple, budget
):
    shapes = buckets.fit(
        *lengths,
        responses=2,
        max_shapes=max_shapes,
        token_budget=budget,
        divisor=divisor,
        multiple=multiple,
    )
    assert 1 <= len(shapes) <= max_shapes
    chosen = buckets.assign(shapes, *lengths)
    for p, c, number in zip(*lengths, chosen, strict=True):
        assert shapes[number].prompt >= p
        assert shapes[number].response >= c
        # and no cheaper shape would have held it
        assert all(s.prompt < p or s.response < c for s in shapes[:number])
    for shape in shapes:
        assert shape.slots <= budget
        assert shape.rows % divisor == 0
        assert shape.prompt % multiple == shape.response % multiple == 0


@given(lengths=lengths, divisor=st.integers(1, 3), budget=st.integers(600, 2000))
def test_budget_leaves_less_than_a_row_per_device_to_fill_in_each_batch(lengths, divisor, budget):
    shapes = buckets.fit(*lengths, responses=2, max_shapes=3, token_budget=budget, divisor=divisor)
    sizes = np.bincount(buckets.assign(shapes, *lengths), minlength=len(shapes)).tolist()
    for shape, size in zip(shapes, sizes, strict=True):
        batches = -(-size // shape.rows)
        assert batches * shape.rows - size < max(batches, 1) * divisor
        # and a fuller batch would not have made them fewer
        largest = budget // shape.row_slots // divisor * divisor
        assert batches == -(-size // largest)


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_choice_of_shapes_against_all_choices(seed):
    # A heuristic: no bound is proven. On these rows it finds the optimum of all choices, which
    # adding shapes greedily, without moving them, misses by up to 3 %. One row a batch: nothing to
    # fill.
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(1, 49, 60), rng.integers(1, 41, 60)

    def slots(shapes):
        return sum(
            min(s.row_slots for s in shapes if s.prompt >= p and s.response >= c)
            for p, c in zip(prompts.tolist(), responses.tolist(), strict=True)
        )

    grid = [
        Shape(1, p, 2, c)
        for p in sorted({-(-x // 8) * 8 for x in prompts.tolist()})
        for c in sorted({-(-x // 8) * 8 for x in responses.tolist()})
    ]
    for count in (1, 2, 3):
        best = min(slots([*some, grid[-1]]) for some in combinations(grid[:-1], count - 1))
        found = buckets.fit(prompts, responses, responses=2, max_shapes=count, batch_size=1)
        assert len(found) <= count
        assert slots(found) == best


@given(sizes=st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_deal_loses_no_row_and_fills_no_more_than_it_must(sizes):
    shapes = [Shape(8, 8, 2, 8), Shape(5, 16, 2, 8), Shape(5, 8, 2, 16), Shape(3, 16, 2, 16)]
    deals = buckets.deal(shapes, sizes)
    arriving = list(sizes)
    for number, (shape, deal) in enumerate(zip(shapes, deals, strict=True)):
        assert arriving[number] == deal.full * shape.rows + deal.partial + deal.promoted
        assert deal.partial < shape.rows
        assert not (deal.partial and deal.promoted)
        if deal.promoted:
            assert shapes[deal.target].holds(shape)
            arriving[deal.target] += deal.promoted
    apart = sum(
        -(-size // shape.rows) * shape.slots for size, shape in zip(sizes, shapes, strict=True)
    )
    # Joining a larger shape may cost that shape one more part-filled batch, never more.
    assert buckets.total_slots(shapes, deals) <= apart + max(shape.slots for shape in shapes)


def test_rows_left_over_join_a_larger_shape_where_that_is_cheaper():
    small, large = Shape(10, 8, 2, 8), Shape(4, 16, 2, 8)
    assert buckets.deal([small, large], [11, 3])[0] == Deal(1, 0, 1, 1)  # 8 slots more, not 9 x 24
    assert buckets.deal([small, large], [19, 3])[0] == Deal(1, 9, 0, -1)  # 72 more, not 24


def test_prompts_alone_need_no_response_slots():
    shapes = buckets.fit(np.array([3, 9]), np.zeros(2, int), responses=0, batch_size=2)
    assert {shape.response for shape in shapes} == {0}


def test_budget_below_one_row_names_the_remedy():
    with pytest.raises(InputError, match=r"100 holds no row of 64 .*2 x 32 .*4 devices.*512"):
        buckets.fit(np.array([60]), np.array([30]), responses=2, token_budget=100, divisor=4)


def test_batch_size_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="6 is no multiple of the 4 devices"):
        buckets.fit(np.array([60]), np.array([30]), responses=2, batch_size=6, divisor=4)


@pytest.mark.parametrize("kwargs", [{}, {"token_budget": 100, "batch_size": 2}])
def test_budget_or_batch_size(kwargs):
    with pytest.raises(ValueError, match="exactly one"):
        buckets.fit(np.array([6]), np.array([3]), responses=2, **kwargs)


def test_no_rows_is_an_input_error():
    with pytest.raises(InputError, match="no rows"):
        buckets.fit(np.zeros(0, int), np.zeros(0, int), responses=2, batch_size=2)


def test_row_that_no_shape_holds_is_named():
    with pytest.raises(ValueError, match="row 1 has 9 prompt and 3 response"):
        buckets.assign([Shape(1, 8, 2, 8)], np.array([8, 9]), np.array([8, 3]))
