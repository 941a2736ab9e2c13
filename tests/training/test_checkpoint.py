"""What is saved comes back to the bit, on any mesh, and a failure leaves the last good step."""

import _thread
import resource
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_klrlhf.errors import InputError
from jax_klrlhf.training import checkpoint, state
from jax_klrlhf.training import mesh as meshes
from tests.training import toy

MODEL = toy.language_model(dim=16)
ADAM = optax.adamw(1e-2)


def fresh(seed=0, optimizer=ADAM, dim=16):
    params = toy.language_model(dim=dim).init(jax.random.key(seed))
    return state.init(jax.random.key(1), params, optimizer)


def moved(carried, step):
    """Some other state, as after training."""
    noise = lambda x: x + 0.5 if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return carried._replace(
        step=jnp.int32(step),
        params=jax.tree.map(noise, carried.params),
        opt_state=jax.tree.map(noise, carried.opt_state),
        key=jax.random.key(7),
    )


def test_round_trip_is_exact_with_data_position_and_config(tmp_path):
    saved = moved(fresh(), 3)
    store = checkpoint.Checkpoints(tmp_path / "run")
    assert store.latest is None
    store.save(saved, data={"step": 12, "stream": "abc"}, config={"kl_coef": 0.1})
    store.save(saved, data=None, config=None)  # the same step again: left as it is
    store.close()
    again = checkpoint.Checkpoints(tmp_path / "run")
    restored, data, *_ = again.restore(fresh())
    assert checkpoint.equal(restored, saved)
    assert not checkpoint.equal(restored, fresh())
    assert jax.random.key_data(restored.key).tolist() == jax.random.key_data(saved.key).tolist()
    assert data == {"step": 12, "stream": "abc"}
    assert again.config() == {"kl_coef": 0.1}
    again.close()


def test_restores_on_another_mesh(tmp_path):
    specs = {
        "embed": {"table": P("tensor", "fsdp")},
        "block": {"mix": P("fsdp", "tensor"), "skip": P("tensor", "fsdp")},
        "head": {"out": P("fsdp", "tensor")},
    }
    params = MODEL.init(jax.random.key(0))

    def on(**shape):
        mesh = meshes.make(**shape)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return meshes.init(jax.random.key(1), params, ADAM, shardings=shardings)[0]

    saved = on(fsdp=8)._replace(step=jnp.int32(5))
    store = checkpoint.Checkpoints(tmp_path)
    store.save(saved, data=None, config=None)
    store.wait()
    for like in (on(data=2, fsdp=2, tensor=2), fresh()):
        restored, *_ = store.restore(like)
        assert checkpoint.equal(restored, saved)
        same = partial(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim))
        assert all(jax.tree.leaves(jax.tree.map(same, restored.opt_state, like.opt_state)))
    store.close()


def test_another_run_is_refused_by_name(tmp_path):
    store = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(InputError, match="no checkpoint"):
        store.restore(fresh())
    store.save(moved(fresh(), 1), data=None, config=None)
    store.wait()
    with pytest.raises(InputError, match="trained against the reference"):
        store.restore(fresh(seed=1))
    with pytest.raises(InputError, match=r"block/mix of shape \(16, 16\).*\(8, 8\)"):
        store.restore(fresh(dim=8))
    with pytest.raises(InputError, match=r"opt_state.*optimizer of the saved run"):
        store.restore(fresh(optimizer=optax.sgd(0.1)))
    with pytest.raises(InputError, match="no checkpoint of step 9"):
        store.restore(fresh(), step=9)
    store.close()


# Orbax's own writer threads die of the error that is injected, and say so when collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_named_and_the_last_good_step_kept(tmp_path):
    store = checkpoint.Checkpoints(tmp_path)
    good = moved(fresh(), 1)
    store.save(good, data={"step": 1}, config=None)
    store.wait()

    def save():
        store.save(moved(good, 2), data={"step": 2}, config=None)
        store.wait()

    # Whichever writer is first, the system's own words (EFBIG; on a full disk, ENOSPC).
    full = r"step 2 could not be written \(.*File too large\); step 1 is whole and kept"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # every longer file fails to be written
    try:
        with pytest.raises(InputError, match=full):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # No writer is left behind, and the half that was written is gone: it would only take room.
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["1"]
    again = checkpoint.Checkpoints(tmp_path)
    assert again.latest == 1
    restored, data, *_ = again.restore(fresh())
    assert checkpoint.equal(restored, good)
    assert data == {"step": 1}
    # Room again is enough to go on.
    again.save(moved(good, 2), data={"step": 2}, config=None)
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["1", "2"]


def test_a_writer_that_is_only_being_started_is_waited_for(tmp_path, monkeypatch):
    """As a busy machine has it: the error is there before all of Orbax's threads are."""
    store = checkpoint.Checkpoints(tmp_path)
    ended = []
    late = threading.Thread(target=lambda: (time.sleep(0.2), ended.append(True)))

    def save(*_, **__):
        alive = [*threading.enumerate(), late]
        monkeypatch.setattr(threading, "enumerate", lambda: alive)
        threading.Timer(0.2, late.start).start()
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", save)
    with pytest.raises(InputError, match=r"step 0 could not .*No space left.*no whole step"):
        store.save(fresh(), data={}, config=None)
    assert ended


def test_a_thread_that_python_did_not_start_takes_no_message_away(tmp_path, monkeypatch):
    store = checkpoint.Checkpoints(tmp_path)
    known, over = threading.Event(), threading.Event()

    def foreign():
        threading.current_thread()  # From now on Python lists it.
        known.set()
        over.wait()

    def save(*_, **__):
        _thread.start_new_thread(foreign, ())
        known.wait()
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "_SETTLE", 0.1)
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", save)
    try:
        with pytest.raises(InputError, match=r"could not be written .*No space left"):
            store.save(fresh(), data={}, config=None)
    finally:
        over.set()


def test_an_unwritable_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="a file is in the way"):
        checkpoint.Checkpoints(tmp_path / "file")


def test_only_the_latest_are_kept(tmp_path):
    store = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(moved(fresh(), step), data=None, config=None)
    store.wait()
    assert store.latest == 3
    assert np.array_equal(sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir()), [2, 3])
    store.close()
