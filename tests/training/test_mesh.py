"""Eight devices compute what one computes, and every device holds its part alone."""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_klrlhf import placement
from jax_klrlhf.core import fdivergence, objectives, onesided
from jax_klrlhf.models import ModelConfig, language_model, partition
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import reference, state, step, tasks
from tests.training import toy

MODEL = toy.language_model(dim=16)
SPECS = {
    "embed": {"table": P("tensor", "fsdp")},
    "block": {"mix": P("fsdp", "tensor"), "skip": P("tensor", "fsdp")},
    "head": {"out": P("fsdp", "tensor")},
}
MESHES = [
    {"data": 8, "fsdp": 1, "tensor": 1},
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 1, "fsdp": 1, "tensor": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
]

OBJECTIVES = {
    "sigmoid": functools.partial(objectives.sigmoid, kl_coef=0.3, label_smoothing=0.1),
    "ipo": functools.partial(objectives.ipo, kl_coef=0.3),
    "hinge": functools.partial(objectives.hinge, kl_coef=0.3),
    "robust": functools.partial(objectives.robust, kl_coef=0.3, flip_rate=0.1),
    "rpo": functools.partial(objectives.rpo, kl_coef=0.3, sft_coef=0.5),
    "simpo": functools.partial(objectives.simpo, kl_coef=2.0, margin=0.5),
    "length_normalized": functools.partial(objectives.length_normalized, kl_coef=0.3),
    "jensen_shannon": functools.partial(
        objectives.f_divergence, kl_coef=0.3, divergence=fdivergence.jensen_shannon
    ),
    "chi_po": functools.partial(objectives.chi_po, kl_coef=0.3, clip=2.0),
    "pessimistic": lambda s: objectives.pessimistic(
        s._replace(bonus=jnp.full_like(s.log_prob, 0.1).at[:, 0].set(0.3)), kl_coef=0.3
    ),
    "exploratory": lambda s: objectives.exploratory(
        s._replace(exploration_log_prob=s.rejected_log_prob), kl_coef=0.3, optimism=0.1
    ),
    "nca": functools.partial(onesided.nca, kl_coef=0.3),
    "aot": functools.partial(objectives.aot, kl_coef=0.3),
}


def layout(shape):
    mesh = meshes.make(**shape)
    return mesh, jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def every_objective(params, batch):
    """Losses ``[objectives, B]`` and mean-loss gradients (a leading axis), in one program."""
    score = tasks.preference(MODEL, OBJECTIVES["sigmoid"]).score
    scores, pull = jax.vjp(lambda p: score(p, None, batch).scores, params)
    losses, slopes = [], []
    for loss in OBJECTIVES.values():
        of_log_prob = lambda x, loss=loss: loss(scores._replace(log_prob=x))  # noqa: E731
        value, back = jax.vjp(of_log_prob, scores.log_prob)
        losses.append(value)
        slopes.append(back(jnp.full_like(value, 1 / value.shape[0]))[0])
    zeros = np.zeros(scores.length.shape, jax.dtypes.float0)

    def gradient(slope):
        return pull(objectives.Scores(slope, jnp.zeros_like(slope), zeros))[0]

    return jnp.stack(losses), jax.vmap(gradient)(jnp.stack(slopes))


@pytest.fixture(scope="module")
def one_device():
    params = MODEL.init(jax.random.key(0))
    batch = full(toy.batch(0))
    return params, batch, jax.jit(every_objective)(params, batch)


def full(batch):
    """No empty row: the losses are looked at one by one here."""
    lengths = np.maximum(batch.responses.lengths, 1)
    return batch._replace(responses=batch.responses._replace(lengths=lengths))


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s.values())))
def test_every_objective_on_eight_devices_equals_one(shape, one_device):
    params, batch, (losses, gradients) = one_device
    mesh, shardings = layout(shape)
    laid = placement.put(batch, mesh)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings)
        many, slopes = jax.jit(every_objective, in_shardings=(shardings, None))(spread, laid)
    assert len(spread["block"]["mix"].sharding.device_set) == 8
    np.testing.assert_allclose(many, losses, rtol=1e-5, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), slopes, gradients)


def loss(scores):
    return OBJECTIVES["sigmoid"](scores)


@pytest.mark.parametrize("shape", [MESHES[1], MESHES[3]], ids=["fsdp", "mix"])
def test_steps_on_a_mesh_equal_one_device_and_everything_is_sharded_alike(shape):
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-3))
    params = MODEL.init(jax.random.key(0))
    mesh, shardings = layout(shape)
    options = {"reference": reference.live, "micro_batches": 2}
    plain = state.init(jax.random.key(1), params, optimizer, ref_params=params)
    spread, laid = meshes.init(
        jax.random.key(1), params, optimizer, shardings=shardings, ref_params=params
    )
    traces = []

    def counted(scores):
        traces.append(1)
        return loss(scores)

    one = step.make_train_step(MODEL, optimizer, loss, **options)
    many = step.make_train_step(MODEL, optimizer, counted, shardings=laid, **options)
    np.testing.assert_array_equal(spread.fingerprint, plain.fingerprint)

    first = placement.put(toy.batch(0), mesh)
    compiled = many.lower(spread, first).compile()
    before = len(traces)
    moved, _ = compiled.output_shardings
    given, _, rows = compiled.input_shardings[0]
    for tree in (moved, given):
        moments = tree.opt_state[1][0]
        for part in (tree.params, moments.mu, moments.nu):
            for name, spec in [("mix", P("fsdp", "tensor")), ("skip", P("tensor", "fsdp"))]:
                assert part["block"][name].is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert rows.prompts.ids.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 2)
    # A moment's bytes on a device are its share: nothing is replicated over fsdp or tensor.
    nu = spread.opt_state[1][0].nu["block"]["mix"]
    assert nu.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"] == nu.size

    for seed in range(3):
        plain, info = one(plain, toy.batch(seed))
        spread, told = many(spread, placement.put(toy.batch(seed), mesh))
        np.testing.assert_allclose(told.loss.total, info.loss.total, rtol=1e-5)
        np.testing.assert_allclose(told.grad_norm, info.grad_norm, rtol=1e-5)
    assert len(traces) == before  # the states that come back fit the program that made them
    chex.assert_trees_all_close(spread.params, plain.params, rtol=1e-5, atol=1e-5)


def test_gradients_are_reduced_into_their_shards():
    """By the step itself: this optimizer's updates do not depend on the gradient, so no layout
    flows back to it from the parameters.
    """
    mesh, shardings = layout(MESHES[1])
    params = MODEL.init(jax.random.key(0))
    kept = {}

    def spy(grads, opt_state, params):
        jax.debug.inspect_array_sharding(
            grads["block"]["mix"], callback=lambda s: kept.update(mix=s)
        )
        return jax.tree.map(jnp.zeros_like, params), opt_state

    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), spy)
    spread, laid = meshes.init(jax.random.key(1), params, optimizer, shardings=shardings)
    many = step.make_train_step(MODEL, optimizer, loss, shardings=laid)
    many.lower(spread, placement.put(toy.batch(0), mesh)).compile()
    assert kept["mix"].is_equivalent_to(NamedSharding(mesh, P("fsdp", "tensor")), 2)


@pytest.mark.slow
def test_adafactor_of_the_librarys_decoder():
    """Its row and column means have no parameter's shape: whole on every device, and the same."""
    config = ModelConfig(
        vocab_size=toy.VOCAB, hidden_size=16, intermediate_size=32, layers=1, heads=4, kv_heads=2,
        head_dim=8, max_length=32, tied=False,
    )  # fmt: skip
    model = language_model(config, constrain=partition.constrain)
    params = model.init(jax.random.key(0))
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=8)
    mesh = meshes.make(**MESHES[3])
    plain = state.init(jax.random.key(1), params, optimizer)
    shardings = partition.shardings(params, mesh)
    spread, laid = meshes.init(jax.random.key(1), params, optimizer, shardings=shardings)
    for at in jax.tree.leaves(laid.opt_state[0].v_row):
        assert at.spec == P()
    assert spread.opt_state[0].v_row["embedding"].shape == (16,)  # It is factored.
    one = step.make_train_step(model, optimizer, loss)
    many = step.make_train_step(model, optimizer, loss, shardings=laid)
    plain, info = one(plain, toy.batch(0))
    spread, told = many(spread, placement.put(toy.batch(0), mesh))
    np.testing.assert_allclose(told.grad_norm, info.grad_norm, rtol=1e-5)
    # The means, not the parameters: an update divides by them, so that a row of a gradient that is
    # rounding alone moves as far as any other.
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-12)
    jax.tree.map(close, spread.opt_state[0], plain.opt_state[0])
    kernel = spread.params["layers"]["up"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")


@pytest.mark.slow
def test_the_librarys_decoder_by_its_own_partition_rules():
    config = ModelConfig(
        vocab_size=toy.VOCAB,
        hidden_size=16,
        intermediate_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        max_length=32,
        tied=False,
    )
    model = language_model(config, constrain=partition.constrain)
    params = model.init(jax.random.key(0))
    optimizer = optax.adam(1e-2, eps=1e-3)
    mesh = meshes.make(**MESHES[3])
    plain = state.init(jax.random.key(1), params, optimizer, ref_params=params)
    spread, laid = meshes.init(
        jax.random.key(1),
        params,
        optimizer,
        shardings=partition.shardings(params, mesh),
        ref_params=params,
    )
    kernel = spread.opt_state[0].mu["layers"]["up"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    one = step.make_train_step(model, optimizer, loss, reference=reference.live)
    many = step.make_train_step(
        model, optimizer, loss, reference=reference.live, shardings=laid, micro_batches=2
    )
    for seed in range(2):
        plain, info = one(plain, toy.batch(seed))
        spread, told = many(spread, placement.put(toy.batch(seed), mesh))
        np.testing.assert_allclose(told.loss.total, info.loss.total, rtol=1e-5)
        np.testing.assert_allclose(told.grad_norm, info.grad_norm, rtol=1e-5)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, spread.params, plain.params)


def test_mesh_sizes():
    assert dict(meshes.make(data=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(meshes.make().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert meshes.make().axis_types == (jax.sharding.AxisType.Auto,) * 3
    # By default no axis of fsdp is wider than a ring of 16.
    for count, tensor, expected in (
        (64, 1, (4, 16)), (256, 1, (16, 16)), (64, 4, (1, 16)), (256, 8, (2, 16)), (8, 1, (1, 8)),
        (24, 1, (2, 12)), (8, 8, (1, 1)),
    ):  # fmt: skip
        assert meshes._rows(count, None, None, tensor) == expected
    assert meshes._rows(64, None, -1, 1) == (1, -1)
    assert meshes._rows(64, 2, None, 1) == (2, -1)
    for wrong in ({"data": 3}, {"data": -1}, {"data": 0}, {"data": 4, "fsdp": 4}):
        with pytest.raises(ValueError, match=r"mesh data="):
            meshes.make(**wrong)
    with pytest.raises(ValueError, match="no sharding for the parameter"):
        meshes.init(
            jax.random.key(0),
            {"a": jnp.ones(2), "b": jnp.ones(2)},
            optax.sgd(1.0),
            shardings={"a": NamedSharding(meshes.make(), P())},
        )
