"""What a program holds: its folder, and no more parameters than it needs."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_klrlhf import cli, folders, models
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import reference, state, step
from tests.test_cli import options, pairs, tiny  # noqa: F401 (fixtures)
from tests.training import toy

MODEL = toy.language_model(dim=128)
NAMES = [("embed", "table"), ("block", "mix"), ("block", "skip"), ("head", "out")]


def alive(shape):
    gc.collect()
    return sum(x.shape == shape and x.dtype == jnp.float32 for x in jax.live_arrays())


@pytest.mark.parametrize("sharded", [False, True])
def test_given_away_parameters_are_not_held_beside_the_state(sharded):
    """The caller still has a name for them: with their two moments they lie there three times."""
    adam = optax.adam(1e-3)
    loss = lambda s: -s.chosen_log_prob  # noqa: E731
    before = alive((128, 128))
    params = MODEL.init(jax.random.key(0))
    laid = None
    if sharded:
        mesh = meshes.make(fsdp=8)
        everywhere = jax.NamedSharding(mesh, jax.P("fsdp"))
        params = jax.device_put(params, jax.tree.map(lambda _: everywhere, params))
        carried, laid = meshes.init(
            jax.random.key(1), params, adam, donate=True,
            shardings=jax.tree.map(lambda leaf: leaf.sharding, params),
        )  # fmt: skip
    else:
        carried = state.init(jax.random.key(1), params, adam, donate=True)
    take = step.make_train_step(MODEL, adam, loss, reference=reference.free, shardings=laid)
    carried, info = take(carried, toy.batch(0))
    assert bool(info.finite)
    assert alive((128, 128)) - before == 2 * 3  # two matrices of that shape
    assert params is not None


def test_a_live_reference_is_held_once():
    adam = optax.adam(1e-3)
    params = MODEL.init(jax.random.key(0))
    with pytest.raises(ValueError, match="not to be given away"):
        state.init(jax.random.key(1), params, adam, ref_params=params, donate=True)
    mesh = meshes.make(fsdp=8)
    laid = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P("fsdp")), params)
    params = jax.device_put(params, laid)
    before = alive((128, 128))
    carried, shardings = meshes.init(
        jax.random.key(1), params, adam, ref_params=params, shardings=laid
    )
    assert alive((128, 128)) - before == 2 * 3
    assert carried.ref_params["block"]["mix"] is params["block"]["mix"]
    assert state.fingerprint_text(carried.fingerprint) == state.fingerprint(params)
    assert jax.tree.structure(shardings) == jax.tree.structure(carried)


def test_parameters_on_the_host_come_back_where_they_lay():
    mesh = meshes.make(data=2, fsdp=4)
    params = MODEL.init(jax.random.key(0))
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    laid = jax.device_put(params, jax.tree.map(lambda _: rows, params))
    before = alive((128, 128))
    back = reference.on_host(laid)
    half = reference.on_host(laid, jnp.bfloat16)
    assert alive((128, 128)) == before
    jax.tree.map(np.testing.assert_array_equal, back(), params)
    assert all(leaf.sharding == rows for leaf in jax.tree.leaves(back()))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half()))
    kept = jax.tree.map(np.array, params)
    jax.tree.map(lambda leaf: leaf.delete(), laid)  # the device's copy may go
    jax.tree.map(np.testing.assert_array_equal, back(), kept)


@pytest.mark.slow
def test_dpo_holds_three_copies_and_reads_the_model_once(tiny, pairs, tmp_path, monkeypatch):  # noqa: F811
    shape = models.load(tiny).params["embedding"].shape
    before, seen, read = alive(shape), [], []
    take, load = step.TrainStep.__call__, models.load

    def counted(self, carried, batch):
        seen.append(alive(shape) - before)
        return take(self, carried, batch)

    monkeypatch.setattr(step.TrainStep, "__call__", counted)
    monkeypatch.setattr(models, "load", lambda *a, **k: read.append(a) or load(*a, **k))
    given = options(
        tiny, pairs, tmp_path, **{"kl-prompts": 4, "evaluate-every": 2, "save-every": 9}
    )
    assert cli.main(["dpo", *given]) == 0
    assert len(seen) == 4
    assert seen[1:] == [3, 3, 3]
    assert len(read) == 1


def test_a_second_program_in_a_folder_is_refused_in_one_line(tiny, pairs, tmp_path, capsys):  # noqa: F811
    with folders.locked(tmp_path):
        assert cli.main(["dpo", *options(tiny, pairs, tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}: in use by process" in error
    assert not (tmp_path / "config.json").exists()
