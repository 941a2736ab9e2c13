"""The programs on several processes, on a mesh whose order is not the hosts', give what one device
gives: the same numbers, and the same files.
"""

import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

from jax_klrlhf import cli
from jax_klrlhf.programs import fit, iterate_parts
from jax_klrlhf.programs import run as runs
from jax_klrlhf.training import mesh as meshes
from tests import test_cli, test_iterate
from tests.test_cli import pairs, tiny  # noqa: F401 (fixtures)
from tests.test_iterate import place  # noqa: F401 (fixture)
from tests.training import together

pytestmark = pytest.mark.slow

PROGRAMS = ("dpo", "sft", "reward", "iterate")
# Neighbours along `tensor` are of two processes, be they two with four devices or four with two.
ORDER = (0, 4, 5, 1, 2, 6, 3, 7)
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
GIVEN = "given.json"
SPEEDS = re.compile("time|seconds|perf/")


def commands(output, *, model, data, world):
    """Arguments of every program, with a run's folder each."""
    few = {"steps": 3, "evaluate-every": 2, "max-shapes": 2}
    draws = {
        "belief.kind": "linear",
        "pairs.rule": "enhancer",
        "improve.method": "pessimistic",
        "prompts-per-round": 8,
        "rounds": 1,
    }
    found = {
        name: [name, *test_cli.options(model, data, output / name, **few, **MESH)]
        for name in ("sft", "reward")
    }
    found["dpo"] = [
        "dpo", *test_cli.options(model, data, output / "dpo", **few, **MESH, **{"kl-prompts": 4})
    ]  # fmt: skip
    found["iterate"] = test_iterate.options(world, output / "iterate", **draws, **MESH)
    return found


def prepared(patch):
    """Programs compile fast, and their optimizer divides no gradient by its own rounding."""
    made = optax.adam(1e-2, eps=1e-3)
    patch(fit, "make_optimizer", lambda config, steps: (made, None))
    patch(iterate_parts, "_optimizer", lambda fit: made)
    jax.config.update("jax_disable_most_optimizations", True)


def main(index: int, count: int, address: str, folder: Path) -> None:
    """One of the processes."""
    jax.distributed.initialize(address, count, index)
    arrange = meshes.arrange
    prepared(setattr)
    meshes.arrange = lambda sizes, devices: (
        arrange(sizes, devices).flatten()[np.array(ORDER)].reshape(sizes)
    )
    for name, given in json.loads((folder / GIVEN).read_text()).items():
        code = cli.main(given)
        assert code == 0, name


@pytest.fixture(scope="module")
def one(tiny, pairs, place, tmp_path_factory):  # noqa: F811
    """Every program on one device."""
    output = tmp_path_factory.mktemp("one")
    given = commands(output, model=tiny, data=pairs, world=place)
    with pytest.MonkeyPatch.context() as patch:
        prepared(patch.setattr)
        patch.setattr(runs, "mesh_of", lambda sizes: None)
        try:
            for name in PROGRAMS:
                assert cli.main(given[name]) == 0
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
    return output


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tiny, pairs, place, tmp_path_factory):  # noqa: F811
    """Every program on several processes."""
    output = tmp_path_factory.mktemp("several")
    given = commands(output, model=tiny, data=pairs, world=place)
    (output / GIVEN).write_text(json.dumps(given))
    together.run("tests.training.test_programs_processes", output, count=request.param)
    return output


def test_neighbours_along_tensor_are_of_two_processes():
    for count in (2, 4):
        owner = np.array(ORDER).reshape(2, 2, 2) // (together.DEVICES // count)
        assert (owner[..., 0] != owner[..., 1]).all()


def lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def close(ours, theirs, name="", *, atol=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol, err_msg=name)


def same_line(here, there):
    """But for speeds. A variance is a mean of squares less the square of the mean, in float32."""
    assert here.keys() == there.keys()
    for name in here:
        if SPEEDS.search(name):
            continue
        if name.endswith("/stderr"):
            mean = here[name.removesuffix("/stderr")]
            close(here[name] ** 2, there[name] ** 2, name, atol=1e-9 + 1e-6 * mean**2)
        else:
            close(here[name], there[name], name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_give_what_one_device_gives(one, several, name):
    ours, theirs = several / name, one / name
    # Where the arrays of checkpoints and phases lie, each process has files of its own.
    whole = [
        {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and "checkpoints" not in path.parts and "rounds" not in path.parts
        }
        for folder in (ours, theirs)
    ]
    assert whole[0] == whole[1]
    for here, there in itertools.zip_longest(lines(ours), lines(theirs), fillvalue={}):
        same_line(here, there)
    tensors = [safetensors.numpy.load_file(f / "model/model.safetensors") for f in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for key in tensors[0]:
        close(tensors[0][key], tensors[1][key], key)


if __name__ == "__main__":
    together.take_part(main)
