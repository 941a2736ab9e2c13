"""An iterative run on several processes is the run on one device."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jax_klrlhf import placement
from jax_klrlhf.core import pairs
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle
from tests.training import together

HOST_BY_HOST, PERMUTED = tuple(range(8)), (0, 4, 5, 1, 2, 6, 3, 7)


def run(folder: Path, count: int, *, order: tuple[int, ...] | None):
    """`count` rounds; on several devices every phase shares its rows out over them."""
    # Not before jax.distributed.initialize: the module computes when it is imported.
    from tests.training import rounds_world as world

    mesh, on, whole, params = None, None, None, world.PARAMS
    if order is not None:
        mesh = meshes.make(data=4, fsdp=2, devices=[jax.devices()[k] for k in order])
        cut = lambda x: jax.P("fsdp") if x.ndim and x.shape[0] % 2 == 0 else jax.P()  # noqa: E731
        whole = jax.tree.map(lambda x: jax.NamedSharding(mesh, cut(x)), params)
        params = jax.device_put(params, whole)
        # Answered elsewhere: with weights cut over both hosts, where the order is permuted.
        on = meshes.for_sampling(mesh, params, tensor=2, memory=None)
    draw = rounds.Draw(
        model=world.MODEL, samples=4, max_new_tokens=world.LENGTH, stop=(world.STOP,), rows=8,
        mesh=on,
    )  # fmt: skip
    fitting = rounds.Fitting(
        optimizer=optax.sgd(0.1), steps=3, batch_size=8, mesh=mesh, shardings=whole
    )
    belief = rounds.linear(world.counts, dim=world.VOCAB, ridge=1.0, radius=0.5, mesh=mesh)
    return rounds.iterate(
        jax.random.key(0), params, prompts=world.PROMPTS, rounds=count,
        sampler=rounds.main_agent(draw), reward=belief,
        pair_rule=pairs.otherwise(pairs.best_worst, pairs.sampled),
        oracle=oracle.expected(world.gold), output=folder,
        improve=rounds.pessimistic_dpo(world.MODEL, kl_coef=0.5, fitting=fitting, rows=8),
    )  # fmt: skip


def main(index: int, count: int, address: str, folder: Path) -> None:
    """One of the processes: a round, and then both, on another mesh, from what is on disk."""
    jax.distributed.initialize(address, count, index)
    run(folder / "run", 1, order=HOST_BY_HOST)
    outcome = run(folder / "run", 2, order=PERMUTED)
    assert {name[0] for name in outcome.computed} == {"2"}
    leaves = jax.tree.leaves(placement.whole(outcome.policy))
    np.savez(folder / f"process-{index}.npz", *leaves)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_run_of_one(count, tmp_path):
    together.run("tests.training.test_rounds_processes", tmp_path, count=count)
    one = run(tmp_path / "one", 2, order=None)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for k in range(count):
        with np.load(tmp_path / f"process-{k}.npz") as found:
            for number, ours in enumerate(jax.tree.leaves(one.policy)):
                close(found[f"arr_{number}"], ours)


if __name__ == "__main__":
    together.take_part(main)
