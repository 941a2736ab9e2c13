"""Where parameters lie: 8 devices compute what one does, and a shard reads its own slice only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import partition, pretrained
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model
from tests.models import tiny

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    max_length=32,
    family="qwen2",
    qkv_bias=True,
)
MODEL = language_model(CONFIG)


def mesh(**axes):
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def test_every_parameter_of_every_kind_of_layer_is_cut():
    """No matrix is left whole where its axes divide."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    placed = partition.shardings(shapes, jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor")))
    for path, sharding in jax.tree_util.tree_flatten_with_path(placed)[0]:
        name = partition.path_name(path)
        expected = set() if "norm" in name else {"tensor"} if "bias" in name else {"fsdp", "tensor"}
        assert {a for a in sharding.spec if a} == expected, name


def test_what_does_not_divide_is_left_whole():
    wide = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    shape = (2, 16, 2, 4)
    assert partition.spec("layers/key/kernel", shape, wide) == P(None, "fsdp")
    assert partition.spec("layers/query/kernel", (2, 16, 4, 4), wide) == P(None, "fsdp", "tensor")
    assert partition.spec("layers/key/kernel", (5, *shape), wide) == P(None, None, "fsdp")
    data = jax.sharding.AbstractMesh((8,), ("data",))
    assert partition.spec("embedding", (32, 16), data) == P()
    with pytest.raises(ValueError, match="fewer axes than its rule"):
        partition.spec("layers/key/kernel", (16, 4), wide)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """In float64, where the order of a sum across devices does not show."""
    config = dataclasses.replace(CONFIG, dtype=jnp.float64, param_dtype=jnp.float64)
    model, devices = language_model(config), mesh(data=2, fsdp=2, tensor=2)
    prompts = Ragged(jnp.arange(40, dtype=jnp.int32).reshape(8, 5) % 32, jnp.arange(8) % 5 + 1)
    ids = jnp.arange(8 * 2 * 3, dtype=jnp.int32).reshape(8, 2, 3) % 32

    def loss(params):
        prefix = model.prefill(params, prompts)
        logits = model.unembed(params, model.extend(params, prefix, ids))
        return jnp.square(jax.nn.log_softmax(logits)).mean()

    with jax.enable_x64(True):
        params = tiny.params(config)
        expected, expected_grads = jax.jit(jax.value_and_grad(loss))(params)
        placed = partition.shardings(params, devices)
        with jax.set_mesh(devices):
            run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, placed))
            found, grads = run(jax.device_put(params, placed))
        np.testing.assert_allclose(found, expected, rtol=1e-13)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-13)


def test_activations_are_cut_along_prompts():
    devices = mesh(data=2, fsdp=4)
    constrained = jax.jit(partition.constrain)
    with jax.set_mesh(devices):
        cut = constrained(jnp.zeros((8, 3, 5)))
        odd = constrained(jnp.zeros((3, 3, 5)))
    assert cut.sharding.shard_shape(cut.shape) == (1, 3, 5)
    assert odd.sharding.shard_shape(odd.shape) == (3, 3, 5)
    assert constrained(jnp.zeros((8, 3))).shape == (8, 3)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_shard_reads_its_own_slice_only(tmp_path, monkeypatch, family):
    config = CONFIG
    if family == "gpt2":
        config = ModelConfig(
            **(vars(CONFIG) | {"family": "gpt2", "kv_heads": 4, "ropes": None, "norm": "layer"}),
        )
        gpt2 = {"gated": False, "out_bias": True, "mlp_bias": True, "learned_positions": True}
        config = ModelConfig(**(vars(config) | gpt2 | {"activation": "gelu_tanh"}))
    params = tiny.params(config)
    pretrained.save(tmp_path / "model", config, params)
    devices = mesh(fsdp=4, tensor=2)
    read = []

    class Spy:
        def __init__(self, inner):
            self.inner, self.get_shape = inner, inner.get_shape

        def __getitem__(self, index):
            found = self.inner[index]
            read.append(found.nbytes)
            return found

    tensor = pretrained.Files.tensor
    monkeypatch.setattr(pretrained.Files, "tensor", lambda self, name: Spy(tensor(self, name)))
    loaded = pretrained.load(tmp_path / "model", mesh=devices)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    expected = partition.shardings(params, devices)
    assert jax.tree.map(lambda x: x.sharding, loaded.params) == expected
    # Every device reads exactly what it holds (and one element tells the dtype).
    held = sum(s.data.nbytes for x in jax.tree.leaves(loaded.params) for s in x.addressable_shards)
    unique = sum(
        len({str(s.index) for s in x.addressable_shards}) * x.addressable_shards[0].data.nbytes
        for x in jax.tree.leaves(loaded.params)
    )
    assert unique <= sum(read) - 4 <= held
