"""Streams without padding against the same examples in rectangles: values, gradients, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jax_klrlhf import placement
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import packing
from jax_klrlhf.models import ModelConfig, language_model, packed, partition, scoring
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.training import mesh as meshes
from tests.models import toy

K, V = 2, 11
SIZES = ((2, 4, 5), (1, 7, 3))  # examples in a stream, P and C of each group
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=8,
    intermediate_size=12,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    max_length=32,
    # Everything that attention can be asked for, and one layer of each kind.
    windows=(3, None),
    attention_softcap=5.0,
    final_softcap=9.0,
    init_scale=0.3,
)
MODEL = language_model(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))


def examples(streams, lengths, seed=0):
    """Groups of ``streams`` times their examples, random ids at padding too, packed."""
    rng = np.random.default_rng(seed)
    given_lengths, parts = iter(lengths), []
    for size, prompt, response in SIZES:
        count = size * streams
        prompts = np.array([1 + next(given_lengths) % prompt for _ in range(count)], np.int32)
        answers = [[next(given_lengths) % (response + 1) for _ in range(K)] for _ in range(count)]
        parts.append(
            Batch(
                prompts=Ragged(rng.integers(0, V, (count, prompt), np.int32), prompts),
                responses=Ragged(
                    rng.integers(0, V, (count, K, response), np.int32), np.array(answers, np.int32)
                ),
                label=np.ones(count, np.float32),
                weight=np.ones(count, np.float32),
                scores=np.zeros((count, K), np.float32),
                row=np.arange(count, dtype=np.int32),
            )
        )
    streamed = packing.pack(parts, streams=streams, tokens=54, answers=28)
    return jax.tree.map(jnp.asarray, streamed.packed)


def by_rectangles(params, streams):
    """The same by :mod:`scoring`, group by group."""
    return packed.rows(
        streams,
        [
            scoring.log_prob(MODEL, params, prompts, responses, chunk=7)
            for prompts, responses in zip(streams.prompts, streams.responses, strict=True)
        ],
    )


def with_gradient(function):
    def weighted(params, streams):
        found = function(params, streams)
        weight = jnp.linspace(-1.0, 2.0, found.size).reshape(found.shape)
        return (weight * found).sum(), found

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


OURS = with_gradient(lambda params, streams: packed.log_prob(MODEL, params, streams, chunk=7))
THEIRS = with_gradient(by_rectangles)


def assert_close(actual, expected):
    """Within 1e-4, of the largest entry where that is above 1: float32 has no more digits."""
    np.testing.assert_allclose(actual, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.slow
@example([0, 0, 0, 0, 4, *[0] * 19], 1194)
@given(st.lists(st.integers(0, 100), min_size=24, max_size=24), st.integers(0, 2**16))
def test_equals_the_rectangles(lengths, seed):
    streams = examples(2, lengths, seed)
    (_, ours), gradient = OURS(PARAMS, streams)
    (_, theirs), expected = THEIRS(PARAMS, streams)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    jax.tree.map(assert_close, gradient, expected)


def test_what_an_example_is_beside_does_not_matter():
    """To the bit: a response sees its prompt and itself, never a sibling or another example."""
    lengths = [3, 4, 2, 1, 3, 5, 2, 2, 6, 1, 3, 2] * 2
    streams = examples(2, lengths)
    (_, before), _ = OURS(PARAMS, streams)
    ids = streams.responses[0].ids
    other = (ids[1, 1] + 1) % V
    changed = streams._replace(
        responses=(streams.responses[0]._replace(ids=ids.at[1, 1].set(other)), streams.responses[1])
    )
    (_, after), _ = OURS(PARAMS, changed)
    row = 1  # the second example of the first stream comes second in the order of rows
    assert before[row, 1] != after[row, 1]
    unchanged = np.ones(before.shape, bool)
    unchanged[row, 1] = False
    np.testing.assert_array_equal(before[unchanged], after[unchanged])


def test_tokens_left_out_are_not_passed_over_in_silence():
    streams = examples(2, [3] * 24)
    cut = streams._replace(stream=streams.stream.at[1, 20:].set(-1))
    (_, found), _ = OURS(PARAMS, cut)
    assert np.isfinite(found[:3]).all()
    assert np.isnan(found[3:]).all()


@pytest.mark.slow
def test_eight_devices_equal_one():
    streams = examples(4, [5, 2, 8, 1, 9, 4] * 8)
    (value, ours), gradient = OURS(PARAMS, streams)
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    laid = jax.device_put(PARAMS, partition.shardings(PARAMS, mesh))
    with jax.set_mesh(mesh):
        (told, spread), moved = OURS(laid, placement.put(streams, mesh))
    np.testing.assert_allclose(told, value, rtol=1e-5)
    np.testing.assert_allclose(spread, ours, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), moved, gradient)


def test_a_model_without_a_packed_form_says_so():
    model = toy.language_model(vocab=V)
    with pytest.raises(ValueError, match="no packed form"):
        packed.log_prob(model, model.init(jax.random.key(0)), examples(2, [3] * 24))


def test_padded_is_the_batch_again():
    streams = examples(2, [3, 4, 2, 1, 3, 5, 2, 2, 6, 1, 3, 2] * 2)
    prompts = packed.padded(streams, streams.prompts)
    assert prompts.ids.shape == (6, 7)
    first, second = streams.prompts
    # Rows: two of the first group and one of the second, stream by stream.
    np.testing.assert_array_equal(
        prompts.lengths,
        np.r_[first.lengths[:2], second.lengths[:1], first.lengths[2:], second.lengths[1:]],
    )
    np.testing.assert_array_equal(prompts.ids[2], second.ids[0])
