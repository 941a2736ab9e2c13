"""Two processes on loopback take the same steps as one, checkpoint included."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from rich.console import Console

from jax_klrlhf.core import objectives
from jax_klrlhf.training import checkpoint, loop, state, step, tasks
from jax_klrlhf.training import mesh as meshes
from tests.training import toy

MODEL = toy.language_model()
LOSS = lambda s: objectives.sigmoid(s.chosen_log_ratio, s.rejected_log_ratio, kl_coef=0.3)  # noqa: E731
SPECS = {
    "embed": {"table": jax.P(None, "fsdp")},
    "block": {"mix": jax.P("fsdp"), "skip": jax.P("fsdp")},
    "head": {"out": jax.P("fsdp")},
}
STEPS = 4


class Part:
    """This process's rows of each batch in memory."""

    def __init__(self, index: int, count: int):
        self.whole = loop.Repeat([toy.batch(seed) for seed in range(3)])
        self.rows = slice(index * 16 // count, (index + 1) * 16 // count)
        self.state, self.restore = self.whole.state, self.whole.restore

    def __next__(self):
        return jax.tree.map(lambda x: x[self.rows], next(self.whole))


def run(folder: Path, steps: int, **shape):
    """`steps` steps from the last checkpoint on; the whole final parameters."""
    optimizer = optax.adam(1e-2, eps=1e-3)
    mesh = meshes.make(**shape)
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), SPECS)
    params = MODEL.init(jax.random.key(0))
    carried, laid = meshes.init(jax.random.key(1), params, optimizer, shardings=shardings)
    store = checkpoint.Checkpoints(folder)
    batches = Part(jax.process_index(), jax.process_count())
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


def main(index: int, address: str, folder: Path) -> None:
    """One of the two processes: half the run, a checkpoint, and the other half from it."""
    jax.distributed.initialize(address, 2, index)
    run(folder / "checkpoints", STEPS // 2, fsdp=8)
    outcome = run(folder / "checkpoints", STEPS, fsdp=8)
    params = multihost_utils.process_allgather(outcome.state.params, tiled=True)
    name = state.fingerprint_text(outcome.state.fingerprint)
    np.savez(
        folder / f"process-{index}.npz",
        *jax.tree.leaves(params),
        loss=outcome.metrics["loss"].value,
        name=name,
    )


def test_two_processes_give_the_same_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # The session's flags, and then ours: the last one counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.test_processes", str(k), address, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": ".", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in (0, 1)
    ]
    try:
        # Together: where one fails, the other waits for it.
        texts = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(texts)

    one = run(tmp_path / "one", STEPS, fsdp=8)
    for k in (0, 1):
        with np.load(tmp_path / f"process-{k}.npz") as found:
            leaves = [found[f"arr_{n}"] for n in range(4)]
            np.testing.assert_allclose(found["loss"], one.metrics["loss"].value, rtol=1e-5)
            assert str(found["name"]) == state.fingerprint_text(one.state.fingerprint)
        for ours, theirs in zip(jax.tree.leaves(one.state.params), leaves, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
