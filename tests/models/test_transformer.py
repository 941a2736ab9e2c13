"""The decoder's six functions against each other, and a compiled program that holds one block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import attention
from jax_klrlhf.models.config import ModelConfig, Rope
from jax_klrlhf.models.transformer import language_model
from tests.models import tiny

CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_length=64,
    windows=(None, 4, None),
    ropes=(Rope(), Rope(theta=50.0), Rope()),
    attention_softcap=3.0,
    final_softcap=5.0,
    tied=False,
)
B, P, K, C = 2, 7, 3, 6
LENGTHS = (7, 4)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    prompts = Ragged(
        jnp.asarray(rng.integers(0, 29, (B, P)), jnp.int32), jnp.asarray(LENGTHS, jnp.int32)
    )
    params = tiny.params(CONFIG)
    return params, prompts, jnp.asarray(rng.integers(0, 29, (B, K, C)), jnp.int32)


def whole(config, params, prompts, ids):
    model = language_model(config)
    prefix = model.prefill(params, prompts)
    return prefix.hidden, model.extend(params, prefix, ids)


def stepwise(config, params, prompts, ids):
    model = language_model(config)
    prefix = model.prefill(params, prompts)

    def read(cache, column):
        step, token = column
        hidden, cache = model.decode(params, prefix, cache, token, step)
        return cache, hidden

    # Room for all from the start, and room made half way.
    columns = jnp.arange(C, dtype=jnp.int32), jnp.moveaxis(ids, -1, 0)
    _, at_once = jax.lax.scan(read, model.start(params, prefix, K, C), columns)
    steps, tokens = columns
    cache, first = jax.lax.scan(read, model.start(params, prefix, K, 2), (steps[:2], tokens[:2]))
    _, then = jax.lax.scan(read, model.grow(cache, C), (steps[2:], tokens[2:]))
    return jnp.moveaxis(at_once, 0, 2), jnp.moveaxis(jnp.concatenate([first, then]), 0, 2)


def test_decoding_is_extending_is_reading_each_row_alone(inputs, monkeypatch):
    """In float64, so that nothing but an exact rule passes."""
    _, prompts, ids = inputs
    config = dataclasses.replace(CONFIG, dtype=jnp.float64, param_dtype=jnp.float64)
    model = language_model(config)
    with jax.enable_x64(True):
        params = tiny.params(config)
        first, after = jax.jit(lambda *args: whole(config, *args))(params, prompts, ids)
        assert after.dtype == model.unembed(params, first).dtype == jnp.float64
        for platform in ("cpu", "tpu"):  # A cache for each layer, and one for all of them.
            monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
            for steps in jax.jit(lambda *args: stepwise(config, *args))(params, prompts, ids):
                np.testing.assert_allclose(steps, after, atol=1e-13)
        # Rows by themselves: one unpadded prompt of the whole row, read to each length.
        read = jax.jit(model.prefill)
        for b, k in [(0, 0), (1, 2)]:
            row = np.concatenate([prompts.ids[b, : LENGTHS[b]], ids[b, k]])
            row = jnp.asarray(np.pad(row, (0, P + C - len(row))))[None]
            for i in (0, 1, C):
                alone = read(params, Ragged(row, jnp.asarray([LENGTHS[b] + i], jnp.int32)))
                expected = first[b] if i == 0 else after[b, k, i - 1]
                np.testing.assert_allclose(alone.hidden[0], expected, atol=1e-13)


def test_remat_recomputes_what_its_policy_says(inputs):
    """That the gradient stays the same is in the parity tests, which run with ``"full"``."""

    def program(remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        return jax.grad(lambda *args: jnp.square(whole(config, *args)[1]).mean())

    named, policy = "dots_saveable", jax.checkpoint_policies.dots_saveable
    products = {
        remat: str(jax.make_jaxpr(program(remat))(*inputs)).count("dot_general")
        for remat in (None, "full", named, policy)
    }
    # Products that are not kept are computed again.
    assert products["full"] > products[None] == products[named] == products[policy]


def test_init():
    """Matrices of their stated spread and not alike in any two layers; norms at one."""
    params = jax.jit(language_model(CONFIG).init)(jax.random.key(0))
    layers = params["layers"]
    assert (layers["mlp_norm"]["scale"] == 1).all()
    kernel = np.asarray(layers["up"]["kernel"])
    # The sample deviation of n normals has standard error sigma / sqrt(2 n); 5 of them: 6e-7.
    error = CONFIG.init_scale / np.sqrt(2 * kernel.size)
    assert abs(kernel.std() - CONFIG.init_scale) < 5 * error
    assert np.abs(np.corrcoef(kernel.reshape(3, -1)) - np.eye(3)).max() < 5 / np.sqrt(16 * 24)


def test_the_program_holds_one_block_however_deep(inputs):
    """Depth changes the shapes, not the number of equations."""
    _, prompts, ids = inputs

    def equations(layers):
        config = dataclasses.replace(CONFIG, layers=layers, windows=None, ropes=(Rope(),))
        shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
        return str(jax.make_jaxpr(lambda p: whole(config, p, prompts, ids))(shapes)).count("\n")

    assert equations(2) == equations(20)


def test_a_step_of_unrolled_layers_is_traced_once(inputs, monkeypatch):
    """On CPU each layer reads a cache of its own; thirty of them must not cost thirty traces."""
    params, prompts, ids = inputs
    model, traces = language_model(CONFIG), []
    step = attention.step

    def counted(*args, **options):
        traces.append(1)
        return step(*args, **options)

    monkeypatch.setattr(attention, "step", counted)

    def decode(params):
        prefix = model.prefill(params, prompts)
        cache = model.start(params, prefix, K, C)
        assert isinstance(cache.own, list)
        return model.decode(params, prefix, cache, ids[..., 0], jnp.int32(0))[0]

    jax.eval_shape(decode, params)
    assert len(traces) == 1 < CONFIG.layers


def test_in_bfloat16_logits_are_float32_and_near(inputs):
    params = inputs[0]
    config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    model = language_model(config)
    first, after = jax.jit(lambda *args: whole(config, *args))(*inputs)
    assert first.dtype == after.dtype == jnp.bfloat16
    logits = model.unembed(params, after)
    assert logits.dtype == jnp.float32
    _, after = jax.jit(lambda *args: whole(CONFIG, *args))(*inputs)
    exact = language_model(CONFIG).unembed(params, after)
    # Three layers of products rounded to 8 bits: a few percent of the logits' spread.
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()
