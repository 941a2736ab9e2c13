"""Rows of like length pass together, and are as wide as those beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training.rounds import fitting
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import Comparisons, ragged

RNG = np.random.default_rng(0)
COUNT, SIZE = 30, 8
PROMPTS = ragged(RNG.integers(1, 9, (COUNT, 100)), RNG.permutation(COUNT) + 1)
LENGTHS = np.stack([RNG.permutation(np.arange(COUNT) * 4), RNG.integers(0, 5, COUNT)], 1)
RESPONSES = ragged(RNG.integers(1, 9, (COUNT, 2, 128)), LENGTHS)


def program(*, narrow, mesh=None):
    """Sums over tokens, and the shapes that were compiled for."""
    shapes = []

    def total(params, numbers, prompts, responses):
        shapes.append((prompts.ids.shape[-1], responses.ids.shape[-1]))
        found = jnp.where(responses.mask, responses.ids, 0).sum(-1)
        asked = jnp.where(prompts.mask, prompts.ids, 0).sum(-1)
        return params * (found + asked[:, None]), numbers

    return mapped(total, rows=SIZE, mesh=mesh, narrow=narrow), shapes


@pytest.mark.parametrize("spread", [False, True])
def test_what_comes_back_is_in_order_and_less_was_computed(spread):
    mesh = meshes.make(data=2, fsdp=4) if spread else None
    run, shapes = program(narrow=True, mesh=mesh)
    sums, numbers = run(jnp.int32(3), np.arange(COUNT, dtype=np.int32), PROMPTS, RESPONSES)
    np.testing.assert_array_equal(numbers, np.arange(COUNT))
    tokens = np.arange(128) < np.asarray(RESPONSES.lengths)[..., None]
    asked = np.arange(100) < np.asarray(PROMPTS.lengths)[:, None]
    expected = (np.asarray(RESPONSES.ids) * tokens).sum(-1)
    expected += (np.asarray(PROMPTS.ids) * asked).sum(-1)[:, None]
    np.testing.assert_array_equal(sums, 3 * expected)
    # Four pieces, at most one compilation each, of widths that hold what is in them.
    assert len(shapes) <= 4
    assert {wide for _, wide in shapes} <= {16, 32, 64, 128}
    assert min(wide for _, wide in shapes) < 128
    assert max(prompt for prompt, _ in shapes) == 32  # the longest has 30 tokens of 100
    whole, all_wide = program(narrow=False, mesh=mesh)
    same, _ = whole(jnp.int32(3), np.arange(COUNT, dtype=np.int32), PROMPTS, RESPONSES)
    np.testing.assert_array_equal(same, sums)
    assert all_wide == [(100, 128)]


def test_rows_that_are_all_as_wide_keep_their_order():
    """And so the same neighbours: a rounding of theirs does not change."""
    alike = ragged(np.asarray(RESPONSES.ids)[:, :, :14], np.minimum(LENGTHS, 14))
    seen = []

    def note(params, numbers, responses):
        jax.debug.callback(lambda x: seen.append(x.tolist()), numbers, ordered=True)
        return responses.lengths * params

    mapped(note, rows=10)(jnp.int32(1), np.arange(COUNT), alike)
    jax.effects_barrier()
    assert seen == [list(range(k, k + 10)) for k in (0, 10, 20)]


def test_a_batch_of_a_fit_is_as_wide_as_its_own_longest():
    data = Comparisons(PROMPTS, RESPONSES, np.ones(COUNT, np.float32), np.ones(COUNT, np.float32))
    deal = fitting.deal([fitting.batch_of(data)])
    stream = deal.stream(jax.random.key(0), batch_size=4)
    widths = set()
    for _ in range(12):
        batch = next(stream)
        longest = int(np.max(batch.responses.lengths))
        wide = batch.responses.ids.shape[-1]
        assert longest <= wide <= max(16, 2 * longest)
        widths.add(wide)
        rows = [
            int(np.flatnonzero((np.asarray(RESPONSES.lengths) == one).all(1))[0])
            for one in np.asarray(batch.responses.lengths)
        ]
        np.testing.assert_array_equal(
            batch.responses.ids, np.asarray(RESPONSES.ids)[rows][..., :wide]
        )
        assert isinstance(batch.prompts, Ragged)
        assert batch.prompts.ids.shape[-1] <= 32
    assert len(widths) > 1
