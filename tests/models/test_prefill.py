"""Prompts read piece by piece: the same prefix, in less memory."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import attention, partition, sampling
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model
from jax_klrlhf.training import mesh as meshes
from tests.models import tiny

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, layers=2, heads=4, kv_heads=2, head_dim=4,
    max_length=64,
)  # fmt: skip
WIDTH = 21
RNG = np.random.default_rng(0)
# One ends in each piece, one at an edge, and a fill row has none.
PROMPTS = jax.tree.map(
    jnp.asarray,
    Ragged(
        RNG.integers(1, 50, (6, WIDTH)).astype(np.int32), np.array([21, 1, 7, 8, 13, 0], np.int32)
    ),
)


def prefix(chunk, **options):
    config = dataclasses.replace(CONFIG, **options)
    model = language_model(dataclasses.replace(config, prefill_chunk=chunk))
    return jax.jit(model.prefill)(tiny.params(config), PROMPTS)


@pytest.mark.parametrize(
    ("chunk", "options"),
    [
        (1, {}),
        pytest.param(7, {}, marks=pytest.mark.slow),
        pytest.param(8, {}, marks=pytest.mark.slow),  # three pieces, of which the last is cut
        (8, {"windows": (5, None)}),
        pytest.param(20, {}, marks=pytest.mark.slow),
        pytest.param(8, {"learned_positions": True, "ropes": None}, marks=pytest.mark.slow),
        pytest.param(8, {"attention_softcap": 5.0}, marks=pytest.mark.slow),
        pytest.param(
            8,
            {"attention": partial(attention.splash, interpret=True)},
            marks=pytest.mark.slow,
            id="splash",
        ),
    ],
    ids=str,
)
def test_the_prefix_is_that_of_whole_prompts(chunk, options):
    # The plain form of attention is what the others are compared with.
    expected = prefix(None, **{k: v for k, v in options.items() if k != "attention"})
    found = prefix(chunk, **options)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    # A fill row is nobody's answer: its hidden state only has to be finite.
    np.testing.assert_allclose(found.hidden[:-1], expected.hidden[:-1], atol=2e-5)
    assert np.isfinite(found.hidden).all()
    seen = np.arange(WIDTH) < np.asarray(PROMPTS.lengths)[:, None]
    for ours, theirs in zip(found.cache[:2], expected.cache[:2], strict=True):
        assert ours.shape == theirs.shape
        at = np.broadcast_to(seen[None, :, None, :, None], ours.shape)
        np.testing.assert_allclose(np.asarray(ours)[at], np.asarray(theirs)[at], atol=2e-5)


def test_responses_are_the_same():
    asked = jax.tree.map(lambda x: x[:-1], PROMPTS)
    draw = partial(sampling.generate, jax.random.key(1), samples=3, max_new_tokens=9, stop=(0,))
    params = tiny.params(CONFIG)
    chunked = language_model(dataclasses.replace(CONFIG, prefill_chunk=8))
    found, expected = (draw(model, params, asked) for model in (chunked, language_model(CONFIG)))
    np.testing.assert_array_equal(found.responses.ids, expected.responses.ids)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-4)


def test_it_takes_less_memory():
    """What the compiler reserves besides arguments and results: wide layers, a long prompt."""
    config = dataclasses.replace(CONFIG, intermediate_size=2048, max_length=1024)
    params = jax.eval_shape(language_model(config).init, jax.random.key(0))
    prompts = Ragged(
        jax.ShapeDtypeStruct((4, 1024), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    )

    def temporary(chunk):
        model = language_model(dataclasses.replace(config, prefill_chunk=chunk))
        compiled = jax.jit(model.prefill).lower(params, prompts).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, pieces = temporary(None), temporary(128)
    # Gate and up of a layer, for every token and for those of a piece.
    assert whole > 2 * 4 * 1024 * 2048 * 4
    assert pieces < whole / 3


def test_keys_stay_where_their_rows_and_heads_are():
    """Compiled for two devices of rows by two of heads: no collective but the sums over heads."""
    mesh = meshes.make(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    rows = jax.NamedSharding(mesh, jax.P("data"))
    asked = jax.device_put(jax.tree.map(lambda x: x[:4], PROMPTS), rows)
    model = language_model(dataclasses.replace(CONFIG, prefill_chunk=8))
    params = tiny.params(CONFIG)
    params = jax.device_put(params, partition.shardings(params, mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(model.prefill).lower(params, asked).compile()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert set(re.findall(rf" ({kinds})\(", compiled.as_text())) == {"all-reduce"}
    specs = {s.spec for s in jax.tree.leaves(compiled.output_shardings.cache)}
    assert specs == {jax.P(None, "data", "tensor")}


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="prefill_chunk=0: must be at least 1"):
        dataclasses.replace(CONFIG, prefill_chunk=0)
