"""The experiment on objectives: whole at its smallest, and its laws known to the library."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.objectives import methods, run
from experiments.ridge import run as ridge
from jax_klrlhf.core import group_losses


@pytest.mark.slow
def test_it_runs_and_the_frontier_is_never_beaten(tmp_path):
    config = run.Config(smoke=True, output=tmp_path, only="RLOO")
    path = run.main(config, console=Console(quiet=True))
    metrics = json.loads(path.read_text())["metrics"]
    assert (tmp_path / "objectives.png").stat().st_size > 10_000
    below = [m["value"] for name, m in metrics.items() if name.endswith("/below the frontier")]
    assert len(below) == 2
    assert min(below) > -1e-5
    gap = {name.split("/")[1]: m["value"] for name, m in metrics.items() if name.endswith("/gap")}
    assert set(gap) == {"RLOO", run.BEST_OF}
    assert np.isfinite(list(gap.values())).all()


def test_every_family_has_a_loss_that_reads_the_same_group():
    """Each by its gradient at pi0: finite, and (but for copies of one response) not 0."""
    rng = np.random.default_rng(0)
    ref = -rng.exponential(size=(3, 8)).astype(np.float32)
    reward = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)

    def total(log_prob, make, reward):
        group = group_losses.from_actions(
            log_prob, reward, ref_log_prob=jnp.asarray(ref), old_log_prob=jnp.asarray(ref)
        )
        return jnp.sum(make(jnp.float32(0.5))(group))

    families = {method.family for method in methods.METHODS.values()}
    assert families == {"F", "P", "R", "G", "S", "N", "W"}
    for name, method in methods.METHODS.items():
        gradient = jax.jit(jax.grad(total), static_argnums=1)(jnp.asarray(ref), method.make, reward)
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 1e-3, name


@pytest.mark.slow
def test_the_ridge_is_an_axis(tmp_path):
    path = ridge.main(ridge.Config(smoke=True, output=tmp_path), console=Console(quiet=True))
    metrics = json.loads(path.read_text())["metrics"]
    gaps = {name: m["value"] for name, m in metrics.items() if name.endswith("/gap")}
    # Of nobody's ridge: the posterior mean.
    best = gaps.pop("any ridge/offline, posterior mean/gap")
    assert len(gaps) == 2 * 7
    assert min(best, *gaps.values()) > 0
    # The ridge reaches the estimate: no method has one gap at both.
    for name in (name.split("/")[1] for name in gaps):
        assert gaps[f"ridge=0.1/{name}/gap"] != gaps[f"ridge=1/{name}/gap"]
