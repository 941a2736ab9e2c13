"""Many seeds on each of several CPU devices: a size at which LAPACK's batches wait for ever.

In jaxlib 0.10 a batched LAPACK call waits for the threads of the pool that it runs on itself. With
64 seeds on each of four devices all of them wait, and nothing raises: so in a process of its own,
which is given up after a time that a sound run needs a small part of.
"""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
from jax.sharding import AxisType, PartitionSpec

from jax_klrlhf import bandit

problem = bandit.sphere(jax.random.key(0), contexts=16, actions=8, dim=16, kl_coef=0.5)
mesh = jax.make_mesh((4,), ("seeds",), axis_types=(AxisType.Auto,))
seeds = PartitionSpec("seeds")


def run(key):
    return [
        bandit.simulate(key, problem, learner, rounds=3, batch=4).gap
        for learner in (bandit.gshf(radius=1.0), bandit.kl_ucb(radius=1.0), bandit.thompson())
    ]


dealt = jax.shard_map(jax.vmap(run), mesh=mesh, in_specs=seeds, out_specs=seeds, check_vma=False)
jax.block_until_ready(jax.jit(dealt)(jax.random.split(jax.random.key(1), 256)))
print("done")
"""


@pytest.mark.slow
def test_sixty_four_seeds_a_device_do_not_wait_for_ever():
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "done\n"
