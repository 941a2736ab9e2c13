"""A sampler on a mesh of its own: the same responses, from weights that moved there."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.models import partition, sampling
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import samplers
from jax_klrlhf.training.rounds.parts import ragged
from tests.models import tiny

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, layers=2, heads=4, kv_heads=4, head_dim=4,
    max_length=32,
)  # fmt: skip
MODEL = language_model(CONFIG)
RNG = np.random.default_rng(0)
PROMPTS = ragged(RNG.integers(1, 32, (11, 6)), RNG.integers(1, 7, 11))
TRAINING = {"data": 2, "fsdp": 4}


def draw(mesh, params, **options):
    drawn = rounds.Draw(
        model=MODEL, samples=2, max_new_tokens=5, stop=(0,), rows=8, mesh=mesh, **options
    )
    return drawn.with_log_prob(jax.random.key(3), params, PROMPTS)


@pytest.fixture(scope="module")
def laid():
    """Parameters as training has them."""
    params = tiny.params(CONFIG)
    return jax.device_put(params, partition.shardings(params, meshes.make(**TRAINING)))


@pytest.fixture(scope="module")
def alone():
    return draw(None, tiny.params(CONFIG))


@pytest.fixture(scope="module")
def gathered(laid):
    """Where training lies: as it was before there was another mesh."""
    return draw(meshes.make(**TRAINING), laid)


@pytest.mark.parametrize("tensor", [1, 4])
def test_the_weights_move_and_nothing_else_changes(tensor, laid, alone, gathered):
    training = meshes.make(**TRAINING)
    mesh = meshes.for_sampling(training, laid, tensor=tensor, memory=None)
    found, log_prob = draw(mesh, laid)
    # To the bit what weights give that lay there from the beginning.
    there = jax.device_put(tiny.params(CONFIG), partition.shardings(laid, mesh))
    same, same_log_prob = draw(mesh, there)
    np.testing.assert_array_equal(log_prob, same_log_prob)
    # One device, and the mesh of training, sum in another order.
    for other, other_log_prob in ((same, same_log_prob), alone, gathered):
        np.testing.assert_array_equal(found.ids, other.ids)
        np.testing.assert_array_equal(found.lengths, other.lengths)
        np.testing.assert_allclose(log_prob, other_log_prob, rtol=1e-6)


@pytest.mark.parametrize("continuous", [False, True])
def test_temperature_0_is_the_likeliest_token_each_time(continuous):
    params = tiny.params(CONFIG)
    draw = rounds.Draw(
        model=MODEL, samples=1, max_new_tokens=7, stop=(0,), rows=4, temperature=0.0,
        continuous=continuous,
    )  # fmt: skip
    expected = sampling.generate(
        jax.random.key(0), MODEL, params, jax.tree.map(jnp.asarray, PROMPTS), samples=1,
        max_new_tokens=7, stop=(0,), temperature=0.0,
    ).responses  # fmt: skip
    for key in (1, 2):
        found = draw(jax.random.key(key), params, PROMPTS)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.lengths, expected.lengths)


def test_what_is_sampled_with_is_cast_and_cut_over_tensor_alone(laid, monkeypatch):
    seen = []
    mesh = meshes.for_sampling(meshes.make(**TRAINING), laid, tensor=2, memory=None)
    sampler = rounds.Draw(
        model=MODEL, samples=2, max_new_tokens=2, rows=8, mesh=mesh, compute_dtype=jnp.bfloat16
    )

    def program(params, *arrays):
        seen.append(params)
        return ragged(np.zeros((11, 2, 2)), np.ones((11, 2))), np.zeros((11, 2))

    object.__setattr__(sampler, "_program", program)
    sampler(jax.random.key(0), laid, PROMPTS)
    for path, leaf in jax.tree_util.tree_leaves_with_path(seen[0]):
        assert leaf.dtype == jnp.bfloat16
        axes = {axis for axis in leaf.sharding.spec if axis and mesh.shape[axis] > 1}
        assert axes <= {"tensor"}, partition.path_name(path)
    gate = seen[0]["layers"]["gate"]["kernel"]
    assert gate.sharding.shard_shape(gate.shape) == (2, 16, 12)
    # It travels in 16 bits, and what lies there already does not travel.
    monkeypatch.setattr(samplers.placement, "reshard", lambda *_: pytest.fail("moved again"))
    sampler(jax.random.key(0), seen[0], PROMPTS)


def test_a_copy_is_cut_over_as_few_devices_as_hold_it():
    training = meshes.make(data=1, fsdp=8)
    params = [jax.ShapeDtypeStruct((1000,), jnp.bfloat16)]
    shape = lambda **options: tuple(  # noqa: E731
        meshes.for_sampling(training, params, **options).shape.values()
    )
    # 2000 bytes in a quarter of 8000, 4000, 3999 and 10.
    assert shape(tensor=None, memory=8000.0) == (8, 1, 1)
    assert shape(tensor=None, memory=4000.0) == (4, 1, 2)
    assert shape(tensor=None, memory=3999.0) == (2, 1, 4)
    assert shape(tensor=None, memory=10.0) == (1, 1, 8)
    assert shape(tensor=None, memory=None) == (8, 1, 1)
    assert shape(tensor=2, memory=10.0) == (4, 1, 2)
    # 16 GB are read 4 GB at a time, however much there is room for.
    large = [jax.ShapeDtypeStruct((8 * 10**9,), jnp.bfloat16)]
    for memory in (None, 95.0 * 2**30):
        found = meshes.for_sampling(training, large, tensor=None, memory=memory)
        assert tuple(found.shape.values()) == (2, 1, 4)
    assert meshes.for_sampling(training, params, tensor=0, memory=10.0) is training
    with pytest.raises(ValueError, match="tensor=3 for sampling does not divide the 8 devices"):
        shape(tensor=3, memory=None)
    # Neighbours share a copy, in the order that training has them.
    mixed = meshes.make(fsdp=8, devices=[jax.devices()[k] for k in (3, 1, 0, 2, 7, 5, 4, 6)])
    found = meshes.for_sampling(mixed, params, tensor=2, memory=None)
    assert [d.id for d in found.devices.ravel()] == [3, 1, 0, 2, 7, 5, 4, 6]
    # Where training cuts nothing over fsdp there is nothing to gather.
    assert meshes.for_sampling(
        meshes.make(data=4, fsdp=1, tensor=2), params, tensor=None, memory=1.0
    ) == (meshes.make(data=4, fsdp=1, tensor=2))


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("slices", [1, 2])
def test_any_slice_is_cut_as_it_is_asked_for(kind, slices):
    """4 x 16 on a torus of 8 x 8: an axis is split, on every generation; slices have their part."""
    devices = [
        SimpleNamespace(
            id=number, platform="tpu", device_kind=kind, coords=[number % 8, number // 8 % 8, 0],
            core_on_chip=0, process_index=number // 4, slice_index=number // 64,
        )
        for number in range(64 * slices)
    ]  # fmt: skip
    found = meshes.arrange((4 * slices, 16, 1), devices)
    assert found.shape == (4 * slices, 16, 1)
    assert {d.id for d in found.flat} == set(range(64 * slices))
    for group in found:
        assert len({d.slice_index for d in group.flat}) == 1
        # Two rows of the torus, or two columns.
        assert min(len({d.coords[axis] for d in group.flat}) for axis in (0, 1)) == 2
    if slices == 2:
        with pytest.raises(ValueError, match="data=1: the devices are 2 slices"):
            meshes.arrange((1, 128, 1), devices)
