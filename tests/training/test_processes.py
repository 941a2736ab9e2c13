"""Several processes on loopback take the same steps as one, checkpoint included, on any mesh.

On a TPU slice the order of the mesh is not the order of the hosts, so host by host is but one of
the layouts that are run.
"""

import functools
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jax_klrlhf import placement
from jax_klrlhf.core import objectives
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import ModelConfig, lora, pretrained
from jax_klrlhf.training import checkpoint, loop, reference, state, step, tasks
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training.rounds.compute import mapped
from tests.training import together, toy

MODEL = toy.language_model()
LOSS = functools.partial(objectives.sigmoid, kl_coef=0.3)
SPECS = {
    "embed": {"table": jax.P(None, "fsdp")},
    "block": {"mix": jax.P("fsdp"), "skip": jax.P("fsdp")},
    "head": {"out": jax.P("fsdp")},
}
STEPS = 4


pytestmark = pytest.mark.slow

# Devices 0 to 3 are those of the first process, 4 to 7 those of the second; of four, each has two.
LAYOUTS = {
    "host by host": (range(8), {"fsdp": 8}),
    "permuted": ((0, 4, 5, 1, 2, 6, 3, 7), {"fsdp": 8}),
    "unequal": ((0, 1, 2, 4, 5, 6, 3, 7), {"fsdp": 4, "tensor": 2}),
    "tensor over hosts": ((0, 4, 1, 5, 2, 6, 3, 7), {"data": 2, "fsdp": 2, "tensor": 2}),
}
OF_FOUR = ("permuted", "tensor over hosts")


def mesh_of(name):
    order, shape = LAYOUTS[name]
    return meshes.make(**shape, devices=[jax.devices()[k] for k in order])


class Part:
    """This process's rows of each batch in memory."""

    def __init__(self, mesh):
        self.whole = loop.Repeat([toy.batch(seed) for seed in range(3)])
        self.mesh, self.state, self.restore = mesh, self.whole.state, self.whole.restore

    def __next__(self):
        own = placement.own_rows(self.mesh, 16)
        return jax.tree.map(lambda x: x[own], next(self.whole))


def run(folder: Path, steps: int, layout: str):
    """`steps` steps from the last checkpoint on; the whole final parameters."""
    optimizer = optax.adam(1e-2, eps=1e-3)
    mesh = mesh_of(layout)
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), SPECS)
    params = MODEL.init(jax.random.key(0))
    carried, laid = meshes.init(jax.random.key(1), params, optimizer, shardings=shardings)
    store = checkpoint.Checkpoints(folder)
    batches = Part(mesh)
    task = tasks.preference(MODEL, LOSS)
    carried, log = loop.resume(store, carried, batches)
    outcome = loop.train(
        step.make_step(task, optimizer, micro_batches=2, shardings=laid),
        carried,
        batches,
        steps=steps,
        names=task.names,
        log_every=2,
        checkpoints=store,
        log=log,
        console=Console(quiet=True),
    )
    store.close()
    return outcome


def rows_back(mesh) -> dict[str, list[float]]:
    """Rows through a program that is mapped over them, a batch laid out, and a parameter."""
    times = mapped(lambda params, x: params * x, rows=8, mesh=mesh)
    size = 4 * placement.parts(mesh)
    data = np.arange(size * 3, dtype=np.float32).reshape(size, 3)
    laid = placement.put(placement.take(data, mesh), mesh)
    for shard in laid.addressable_shards:  # replicas of one shard hold the same rows
        np.testing.assert_array_equal(np.asarray(shard.data), data[shard.index])
    cut = jax.device_put(data, jax.NamedSharding(mesh, jax.P("fsdp")))
    np.testing.assert_array_equal(placement.host(laid), data)
    np.testing.assert_array_equal(placement.host(cut), data)
    return {
        "eight": times(jnp.float32(10), np.arange(8, dtype=np.float32)).tolist(),
        "five": times(jnp.float32(10), np.arange(5, dtype=np.float32)).tolist(),
    }


def writes(folder: Path, index: int) -> None:
    """What the first process writes slowly is there for the second, and so is what went wrong."""

    def slowly():
        time.sleep(0.5)
        (folder / "written").write_text("all of it")

    placement.lead(slowly)
    assert (folder / "written").read_text() == "all of it"

    config = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, layers=1, heads=2, kv_heads=2,
        head_dim=4, max_length=8,
    )  # fmt: skip
    write, facts = pretrained.write_tensors, lora.Lora(rank=2)
    pretrained.write_tensors = lambda *given: (time.sleep(0.5), write(*given))
    lora.save(folder / "adapter", config, facts, lora.init(jax.random.key(0), config, facts))
    pretrained.write_tensors = write
    assert (folder / "adapter" / lora.WEIGHTS).is_file()

    # The file is on the first host's disk alone: the second gets it all the same.
    path, identity = folder / f"disk-{index}" / "table", reference.Identity("m", "d", "t", "l")
    table = np.arange(6, dtype=np.float32).reshape(3, 2) - 0.1
    placement.lead(lambda: reference.save_cache(path, table, identity))
    assert path.exists() == (index == 0)
    assert placement.agreed(path.exists())
    like = jax.ShapeDtypeStruct(table.shape, table.dtype)
    found = placement.shared(lambda: reference.load_cache(path, identity), like)
    np.testing.assert_array_equal(found, table)
    with pytest.raises(InputError, match="another model" if index == 0 else "first process"):
        placement.shared(lambda: reference.load_cache(path, identity._replace(model="x")), like)


def main(index: int, count: int, address: str, folder: Path) -> None:
    """One of the processes: on each mesh half the run, a checkpoint, and the other half."""
    jax.distributed.initialize(address, count, index)
    if count == 2:
        writes(folder, index)
    placement.agreed(True)  # a group that is no mesh's
    # Gloo says so of every group that it joins.
    joined = lambda: (folder / f"said-{index}.txt").read_text().count("[Gloo]")  # noqa: E731
    facts = {}
    for number, layout in enumerate(LAYOUTS):
        if count == 4 and layout not in OF_FOUR:
            continue
        mesh, begin = mesh_of(layout), joined()
        facts[layout] = rows_back(mesh)
        run(folder / f"checkpoints-{number}", STEPS // 2, layout)
        outcome = run(folder / f"checkpoints-{number}", STEPS, layout)
        np.savez(
            folder / f"process-{index}-{number}.npz",
            *jax.tree.leaves(placement.whole(outcome.state.params)),
            loss=outcome.metrics["loss"].value,
            name=state.fingerprint_text(outcome.state.fingerprint),
        )
        assert joined() == begin > 0, f"{layout}: a group was first joined in a program"
    (folder / f"facts-{index}.json").write_text(json.dumps(facts))


class End(NamedTuple):
    """Of a run: its final policy's name, and its loss and parameters in one vector."""

    name: str
    numbers: np.ndarray


def end_of(path: Path) -> End:
    """As a process left it."""
    with np.load(path) as found:
        leaves = [found[f"arr_{n}"] for n in range(len(found.files) - 2)]
        return End(str(found["name"]), np.hstack([found["loss"], *map(np.ravel, leaves)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left."""
    folder = tmp_path_factory.mktemp("processes")
    together.run("tests.training.test_processes", folder, count=2)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The end of one process's run."""
    outcome = run(tmp_path_factory.mktemp("one"), STEPS, "host by host")
    leaves = jax.tree.leaves(jax.device_get(outcome.state.params))
    return End(
        state.fingerprint_text(outcome.state.fingerprint),
        np.hstack([outcome.metrics["loss"].value, *map(np.ravel, leaves)]),
    )


IN_ORDER = {"eight": [10.0 * n for n in range(8)], "five": [10.0 * n for n in range(5)]}


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=list(LAYOUTS))
def test_two_processes_give_the_same_run_on_any_mesh(folder, one, number):
    for k in (0, 1):
        name, numbers = end_of(folder / f"process-{k}-{number}.npz")
        assert name == one.name
        np.testing.assert_allclose(numbers, one.numbers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_come_back_in_their_order_and_none_is_lost(folder, layout):
    for k in (0, 1):
        assert json.loads((folder / f"facts-{k}.json").read_text())[layout] == IN_ORDER


def test_four_processes_do_as_two(one, tmp_path):
    together.run("tests.training.test_processes", tmp_path, count=4)
    for k in range(4):
        facts = json.loads((tmp_path / f"facts-{k}.json").read_text())
        assert facts == dict.fromkeys(OF_FOUR, IN_ORDER)
        for number in map(list(LAYOUTS).index, OF_FOUR):
            name, numbers = end_of(tmp_path / f"process-{k}-{number}.npz")
            assert name == one.name
            np.testing.assert_allclose(numbers, one.numbers, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    together.take_part(main)
