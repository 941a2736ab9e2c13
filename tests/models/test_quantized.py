"""Eight bits: their error, and that a model of them is the model of what they stand for."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import models
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import attention, lora, partition, quantized, sampling, scoring
from jax_klrlhf.models.attention import Keys, Prompt
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import samplers
from jax_klrlhf.training.rounds.parts import ragged
from tests.models import tiny

CONFIG = ModelConfig(
    vocab_size=29, hidden_size=16, intermediate_size=24, layers=2, heads=4, kv_heads=2, head_dim=8,
    max_length=64, windows=(None, 4), qkv_bias=True, tied=False,
)  # fmt: skip
RNG = np.random.default_rng(0)
PROMPTS = ragged(RNG.integers(0, 29, (4, 7)), [7, 4, 1, 6])
IDS = RNG.integers(0, 29, (4, 2, 20)).astype(np.int32)
CONTRACTED = {"embedding": (1,), "unembedding": (0,), "out": (1, 2)}


def stands_for(values, scale, axes):
    """In float64, without the library."""
    return np.asarray(values, np.float64) * np.expand_dims(np.asarray(scale, np.float64), axes)


def dequantized(params):
    """The parameters that quantized ones stand for, in float64."""

    def walk(tree, kind):
        found = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                found[name] = walk(leaf, name)
            elif f"{name}_scale" in tree:
                axes = CONTRACTED.get(kind if name == "kernel" else name, (1,))
                found[name] = jnp.asarray(stands_for(leaf, tree[f"{name}_scale"], axes))
            elif not name.endswith("_scale"):
                found[name] = jnp.asarray(leaf, jnp.float64)
        return found

    return walk(params, "")


@pytest.mark.parametrize("axes", [(0,), (1, 2), (-1,)])
def test_every_entry_is_off_by_half_a_step_at_most(axes):
    x = RNG.normal(size=(5, 6, 7)) * RNG.lognormal(size=(5, 6, 7))
    x[:, :, 2] = 0
    found = quantized.quantize(jnp.asarray(x, jnp.float32), axes)
    assert found.values.dtype == jnp.int8
    near = stands_for(found.values, found.scale, tuple(a % 3 for a in axes))
    largest = np.abs(x).max(axes, keepdims=True)
    assert (np.abs(near - x) <= largest / 254 * (1 + 1e-5)).all()
    # The bound is met: a coarser or finer step would not be this one.
    assert (np.abs(near - x) / np.where(largest == 0, 1, largest)).max() > 0.9 / 254
    assert np.abs(np.asarray(found.values, int)).max() == 127
    # What eight bits stand for is kept to the bit.
    again = quantized.quantize(quantized.dequantize(found, axes), axes)
    np.testing.assert_array_equal(again.values, found.values)
    np.testing.assert_allclose(again.scale, found.scale, rtol=1e-6)
    np.testing.assert_allclose(quantized.dequantize(found, axes), near, rtol=1e-6)


def test_a_scale_for_each_channel_is_what_spares_the_others():
    """One large column: with a single scale for all, the others would lose nearly everything."""
    x = RNG.normal(size=(64, 8))
    x[:, 3] *= 1000
    others = np.arange(8) != 3

    def error(axes):
        found = quantized.quantize(jnp.asarray(x, jnp.float32), axes)
        return np.abs(stands_for(found.values, found.scale, axes) - x)[:, others].mean()

    # Steps of 1000 times the size; most of the others are then rounded to zero.
    assert error((0, 1)) > 50 * error((0,))


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_of_eight_bits_is_that_of_the_weights_they_stand_for(tied):
    """In float64, so that nothing but an exact rule passes: reading and decoding."""
    config = dataclasses.replace(
        CONFIG, tied=tied, dtype=jnp.float64, param_dtype=jnp.float64, embedding_scale=3.0
    )
    with jax.enable_x64(True):
        model, params = language_model(config), tiny.params(config)
        eight = quantized.weights(params)
        kept = {partition.path_name(p) for p, x in jax.tree_util.tree_leaves_with_path(eight)
                if x.dtype != jnp.int8}  # fmt: skip
        assert not any(name.endswith(("kernel", "embedding")) for name in kept)

        @jax.jit
        def logits(params):
            prompts = jax.tree.map(jnp.asarray, PROMPTS)
            prefix = model.prefill(params, prompts)
            hidden = model.extend(params, prefix, jnp.asarray(IDS))
            cache = model.start(params, prefix, 2, 2)
            step, _ = model.decode(params, prefix, cache, jnp.asarray(IDS[..., 0]), jnp.int32(0))
            return model.unembed(params, hidden), model.unembed(params, step)

        found, expected, full = (logits(p) for p in (eight, dequantized(eight), params))
    for one, other, before in zip(found, expected, full, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)
        assert 1e-3 < np.abs(one - before).max() < 0.2 * np.abs(before).max()


def test_a_step_with_keys_of_eight_bits_is_that_with_what_they_stand_for():
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)  # noqa: E731
    query, lengths = draw(2, 3, 4, 8), jnp.asarray([5, 2], jnp.int32)
    own, prompt = Keys(draw(2, 2, 3, 9, 8), draw(2, 2, 3, 9, 8)), Keys(*(draw(2, 2, 5, 8),) * 2)
    eights = [attention.eight(keys) for keys in (own, prompt)]
    means = [
        Keys(*(jnp.asarray(stands_for(x, s, -1), jnp.float32) for x, s in zip(e[:2], e[2:],
             strict=True))) for e in eights
    ]  # fmt: skip
    step = jax.jit(partial(attention.step, scale=0.4, window=jnp.int32(6), softcap=2.0))
    found, expected, full = (
        step(query, mine, Prompt(theirs, lengths), jnp.int32(7))
        for mine, theirs in (eights, means, (own, prompt))
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)
    # Errors of a 254th in keys and in values, of scores and mixtures of order one.
    assert 1e-5 < np.abs(found - full).max() < 0.05


@pytest.mark.parametrize("platform", ["gpu", pytest.param("cpu", marks=pytest.mark.slow)])
def test_decoding_with_keys_of_eight_bits_is_near(platform):
    """One cache for all layers or one for each, with room that is made half way."""
    params, prompts = tiny.params(CONFIG), jax.tree.map(jnp.asarray, PROMPTS)

    def decoded(kv, platform):
        model = language_model(dataclasses.replace(CONFIG, kv=kv, platform=platform))

        def run(params):
            prefix = model.prefill(params, prompts)
            cache = model.start(params, prefix, 2, 1)
            assert model.grow is not None
            found = []
            for step in range(2):
                if step == 1:
                    cache = model.grow(cache, 2)
                ids = jnp.asarray(IDS[..., step])
                hidden, cache = model.decode(params, prefix, cache, ids, jnp.int32(step))
                found.append(jax.nn.log_softmax(model.unembed(params, hidden)))
            return jnp.stack(found), cache

        return jax.jit(run)(params)

    exact, _ = decoded("float", "gpu")
    found, cache = decoded("int8", platform)
    kinds = [leaf.dtype for leaf in jax.tree.leaves(cache)]
    assert kinds.count(jnp.int8) == len(kinds) / 2
    # Logits of order ten, off by hundredths of a nat.
    assert 1e-4 < np.abs(found - exact).max() < 0.3


def drawn(model, params, *, mesh=None, seed=3, **options):
    draw = rounds.Draw(
        model=model, samples=2, max_new_tokens=6, rows=4, mesh=mesh, weights=quantized.weights,
        **options,
    )  # fmt: skip
    return draw.with_log_prob(jax.random.key(seed), params, PROMPTS)


@pytest.fixture(scope="module")
def alone():
    return drawn(language_model(CONFIG), tiny.params(CONFIG))


def test_what_is_drawn_is_of_the_quantized_policy_and_the_mismatch_says_so(alone):
    """And the weights' scales are not rounded to 16 bits."""
    model, params = language_model(CONFIG), tiny.params(CONFIG)
    eight = quantized.weights(params)
    responses, log_prob = alone
    score = jax.jit(partial(scoring.log_prob, model))
    prompts = jax.tree.map(jnp.asarray, PROMPTS)
    np.testing.assert_allclose(log_prob, score(eight, prompts, responses), atol=2e-4)
    mismatch = np.abs(log_prob - score(params, prompts, responses))
    assert mismatch.max() > 2e-3
    half = quantized.weights(params, jnp.bfloat16)
    kinds = {partition.path_name(p).rpartition("/")[2]: x.dtype
             for p, x in jax.tree_util.tree_leaves_with_path(half)}  # fmt: skip
    assert kinds == {
        "kernel": jnp.int8, "kernel_scale": jnp.float32, "embedding": jnp.int8, "scale":
        jnp.bfloat16, "embedding_scale": jnp.float32, "unembedding": jnp.int8, "bias":
        jnp.bfloat16, "unembedding_scale": jnp.float32,
    }  # fmt: skip


@pytest.mark.slow
def test_eight_bits_travel_to_the_mesh_that_is_sampled_on(alone, monkeypatch):
    model, params = language_model(CONFIG), tiny.params(CONFIG)
    training = meshes.make(data=2, fsdp=4)
    laid = jax.device_put(params, partition.shardings(params, training))
    on = meshes.for_sampling(training, params, tensor=2, memory=None)
    moved = []
    reshard = samplers.placement.reshard
    monkeypatch.setattr(
        samplers.placement, "reshard", lambda x, at: moved.append(x) or reshard(x, at)
    )
    found, log_prob = drawn(model, laid, mesh=on)
    np.testing.assert_array_equal(found.ids, alone[0].ids)
    np.testing.assert_allclose(log_prob, alone[1], atol=1e-4)
    (sent,) = moved
    assert sent["layers"]["up"]["kernel"].dtype == jnp.int8


def test_the_base_under_an_adapter_is_quantized_and_the_adapter_is_not():
    facts = lora.Lora(rank=2)
    model = lora.language_model(CONFIG, facts)
    adapter = lora.init(jax.random.key(0), CONFIG, facts)
    params = {"base": tiny.params(CONFIG), "lora": adapter}
    eight = quantized.weights(params)
    assert eight["base"]["layers"]["query"]["kernel"].dtype == jnp.int8
    jax.tree.map(np.testing.assert_array_equal, eight["lora"], params["lora"])
    prompts = jax.tree.map(jnp.asarray, PROMPTS)
    assert jax.eval_shape(model.prefill, eight, prompts).hidden.dtype == jnp.float32


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="have no kernel of this library's decoder"):
        quantized.weights({"mine": jnp.ones((2, 2))})
    params = quantized.weights(tiny.params(CONFIG))
    with pytest.raises(ValueError, match="in eight bits, for sampling alone; save those"):
        models.save(tmp_path / "model", CONFIG, params)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_real_model_in_eight_bits(stories_model):
    """Loaded so, and made of what was loaded: the same; near to the float model in nats."""
    loaded = models.load(stories_model, dtype=jnp.float32)
    eight = models.load(stories_model, dtype=jnp.float32, weights="int8", kv="int8")
    made = quantized.weights(loaded.params)
    jax.tree.map(np.testing.assert_array_equal, eight.params, made)
    prompts = Ragged(jnp.asarray([[1, 40, 50, 60]], jnp.int32), jnp.asarray([4], jnp.int32))
    found = sampling.generate(
        jax.random.key(0), eight.model, eight.params, prompts, samples=8, max_new_tokens=15
    )
    log_prob = jax.jit(partial(scoring.token_log_prob, loaded.model))(
        loaded.params, prompts, found.responses
    )
    off = np.abs(np.asarray(found.token_log_prob - log_prob)).mean()
    assert 1e-4 < off < 0.1
