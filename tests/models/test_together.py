"""Prompts and responses in one pass through the layers: the same numbers, half the gathers."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import ModelConfig, language_model, lora, partition, scoring
from jax_klrlhf.plan import hlo
from jax_klrlhf.plan.cost import cost
from jax_klrlhf.training import mesh as meshes

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=40, layers=3, heads=4, kv_heads=2, head_dim=4,
    max_length=32, remat="full",
)  # fmt: skip
ROWS, SAMPLES = 8, 2
PROMPTS = Ragged(jnp.arange(ROWS * 5).reshape(ROWS, 5) % 64, jnp.arange(ROWS) % 5 + 1)
RESPONSES = Ragged(
    jnp.arange(ROWS * SAMPLES * 3).reshape(ROWS, SAMPLES, 3) * 7 % 64,
    jnp.arange(ROWS * SAMPLES).reshape(ROWS, SAMPLES) % 4,
)
CONFIGS = {
    "llama": CONFIG,
    "windows": dataclasses.replace(
        CONFIG, windows=(2, None, 3), attention_softcap=5.0, qk_norm=True, remat=None
    ),
    "lora": CONFIG,
}


def total(model, params):
    """A loss that every response's log-probability enters with another weight."""
    found = scoring.log_prob(model, params, PROMPTS, RESPONSES)
    return jnp.sum(found * jnp.cos(jnp.arange(found.size, dtype=found.dtype)).reshape(found.shape))


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("windows", "lora"))]
)
def test_loss_and_gradient_are_those_of_two_passes(name):
    config = CONFIGS[name]
    model = language_model(config)
    params = model.init(jax.random.key(0))
    if name == "lora":
        facts = lora.Lora(rank=2)
        update = lora.init(jax.random.key(1), config, facts)
        # b begins at 0. A constant in its place would sum gradients that nearly cancel.
        update = jax.tree.map(
            lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), update
        )
        model, params = lora.language_model(config, facts), {"base": params, "lora": update}
    one, ours = jax.jit(jax.value_and_grad(lambda p: total(model, p)))(params)
    apart = dataclasses.replace(model, together=None)
    two, theirs = jax.jit(jax.value_and_grad(lambda p: total(apart, p)))(params)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_every_weight_is_gathered_once_in_each_pass():
    """Once forward and once backward, where each device has a part of it; on three axes, so that
    without the constraint on kernels the compiler would gather activations besides."""
    mesh, model = meshes.make(data=2, fsdp=2, tensor=2), language_model(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    placed = partition.shardings(shapes, mesh)
    given = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, placed
    )

    def gathers(model):
        slope = jax.jit(jax.grad(lambda p: total(model, p)), out_shardings=placed)
        with jax.set_mesh(mesh):
            text = slope.lower(given).compile().as_text()
        runs = collections.Counter()
        for one in cost(hlo.parse(text or "")).collectives:
            if one.kind == "all-gather":
                runs[one.elements] += one.runs
        return {size: count for size, count in runs.items() if size in kernels}

    kernels = collections.Counter()
    for kernel in (layer["kernel"] for layer in shapes["layers"].values() if "kernel" in layer):
        kernels[kernel.size // CONFIG.layers // mesh.shape["tensor"]] += 2 * CONFIG.layers
    assert gathers(model) == kernels
    apart = dataclasses.replace(model, together=None)
    assert gathers(apart) == {size: 2 * count for size, count in kernels.items()}


def test_activations_are_constrained_after_both_sums_of_a_layer():
    seen = lambda x: checkpoint_name(x, "cut")  # noqa: E731
    model = language_model(dataclasses.replace(CONFIG, remat=None), constrain=seen)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert model.together is not None
    text = str(jax.make_jaxpr(model.together)(params, PROMPTS, RESPONSES.ids))
    # Of the embedding, and in the one body of the scan after attention and after the feed-forward.
    assert text.count("name=cut") == 3
