"""Phases whose arrays lie over several devices: named and written where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_klrlhf import placement
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import state as states
from jax_klrlhf.training.rounds import journal


def policy(mesh=None):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "layers": {"kernel": jax.random.normal(keys[0], (2, 16, 8))},
        "norm": jnp.arange(5, dtype=jnp.bfloat16),
        "flags": jnp.array([True, False, True]),
    }
    if mesh is None:
        return params
    cut = {"layers": {"kernel": P(None, "fsdp", "tensor")}, "norm": P(), "flags": P()}
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, cut)


def test_a_policys_name_is_that_of_its_bits_wherever_they_lie():
    params = policy()
    name = journal.digest(params)
    assert name == states.fingerprint(params)  # NumPy and the compiled program
    for shape in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        assert journal.digest(policy(meshes.make(**shape))) == name
    kernel = np.array(params["layers"]["kernel"])
    kernel[1, 3, 4] = np.nextafter(kernel[1, 3, 4], np.float32(9))
    assert journal.digest({**params, "layers": {"kernel": kernel}}) != name
    moved = {**params, "layers": {"kernels": params["layers"]["kernel"]}}
    assert journal.digest(moved) != name


def test_naming_parameters_gathers_none_of_them():
    params = policy(meshes.make(fsdp=4, tensor=2))
    text = states.digest.lower(params).compile().as_text()
    assert "all-reduce" in text  # of the sums
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert kind not in text


def test_a_phase_over_devices_is_written_by_its_parts_and_read_to_its_places(tmp_path, monkeypatch):
    mesh = meshes.make(fsdp=4, tensor=2)
    params, facts = policy(mesh), {"pi0": "it"}

    def fitted():
        return params, {"loss": Metric(1.5, None, 3)}

    # Nothing of it is ever whole on a host.
    monkeypatch.setattr(placement, "host", lambda x: pytest.fail("gathered"))
    first = journal.Journal(tmp_path, facts)
    first.phase(1, "fit", fitted, like=jax.tree.map(jnp.copy, params))
    assert not list(tmp_path.rglob("*.safetensors"))

    again = journal.Journal(tmp_path, facts)
    found, metrics = again.phase(1, "fit", lambda: pytest.fail("computed"), like=params)
    assert metrics["loss"] == Metric(1.5, None, 3)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding == theirs.sharding
    # On other devices: the place is the template's.
    other = policy(meshes.make(data=8, fsdp=1))
    elsewhere, _ = journal.Journal(tmp_path, facts).phase(1, "fit", fitted, like=other)
    kernel = elsewhere["layers"]["kernel"]
    assert kernel.sharding == other["layers"]["kernel"].sharding
    np.testing.assert_array_equal(kernel, params["layers"]["kernel"])

    wider = {**params, "norm": jnp.zeros(6, jnp.bfloat16)}
    with pytest.raises(InputError, match=r"norm is bfloat16\[5\], this run's is bfloat16\[6\]"):
        journal.Journal(tmp_path, facts).phase(1, "fit", fitted, like=wider)
    manifest = tmp_path / "round-001" / "fit.json"
    manifest.write_text(manifest.read_text().replace('"content": "', '"content": "0'))
    with pytest.raises(InputError, match="not what was written"):
        journal.Journal(tmp_path, facts).phase(1, "fit", fitted, like=params)
