"""A training run's folder, damaged on purpose: what was written comes back, or is missed aloud.

The default part breaks a few things by seed; with ``KLRLHF_FAULTS=1`` the slow part breaks many.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_klrlhf import results
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric
from jax_klrlhf.training import checkpoint, processes, state
from jax_klrlhf.training.rounds import journal
from jax_klrlhf.training.rounds.journal import ANY
from tests.training import test_loop

slow = pytest.mark.skipif(
    not os.environ.get("KLRLHF_FAULTS"), reason="slow: set KLRLHF_FAULTS=1 to run it"
)
ROOT = Path(__file__).resolve().parents[2]
ADAM = optax.adamw(1e-2)


def carried(step):
    """A state that no other step has."""
    rng = np.random.default_rng(step)
    params = {
        "layers": {"kernel": rng.normal(size=(64, 64)).astype(np.float32)},
        "head": rng.normal(size=8).astype(np.float32),
    }
    fresh = state.init(
        jax.random.key(0), {k: jax.tree.map(jnp.zeros_like, v) for k, v in params.items()}, ADAM
    )
    moved = jax.tree.map(lambda x: x + step if x.dtype == jnp.float32 else x, fresh.opt_state)
    return fresh._replace(
        step=jnp.int32(step), params=jax.tree.map(jnp.asarray, params), opt_state=moved
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    store = checkpoint.Checkpoints(folder)
    for step in (1, 2):
        store.save(carried(step), data={"step": step, "seed": 3}, config={}, log={"last": [1.5]})
    store.close()
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def empty(path, rng):
    path.write_bytes(b"")


def remove(path, rng):
    path.unlink()


def scribble(path, rng):
    content = bytearray(path.read_bytes())
    place = rng.integers(len(content))
    content[place : place + 64] = rng.bytes(len(content[place : place + 64]))
    path.write_bytes(content)


DAMAGES = [flip, cut, empty, remove, scribble]


def survives(folder):
    """Step 2 to the bit, or step 1 to the bit with a word of it; what happened."""
    store = checkpoint.Checkpoints(folder)
    try:
        found = store.restore(carried(0))
        step = int(found.state.step)
        assert checkpoint.equal(found.state, carried(step))
        assert found.data == {"step": step, "seed": 3}
        assert found.log == {"last": [1.5]}
        if step == 2:
            assert found.damaged == ()
            return "as if nothing had happened"
        (told,) = found.damaged
        assert told.startswith("the checkpoint of step 2 is damaged (")
        assert "\n" not in told
        assert store.latest == 1
        return "fell back"
    finally:
        store.close()


def broken(saved, folder, seed):
    """One file of the newest step, damaged as the seed has it; what came of it."""
    rng = np.random.default_rng(seed)
    shutil.copytree(saved, folder)
    paths = [path for path in files(folder / "2") if path.stat().st_size]
    DAMAGES[seed % len(DAMAGES)](paths[rng.integers(len(paths))], rng)
    return survives(folder)


def test_an_undamaged_checkpoint_is_taken(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    assert survives(tmp_path / "run") == "as if nothing had happened"


@pytest.mark.parametrize("seed", range(15))
def test_a_damaged_newest_checkpoint_is_as_written_or_left_for_the_one_before(
    seed, saved, tmp_path
):
    assert broken(saved, tmp_path / "run", seed) in ("as if nothing had happened", "fell back")


@slow
def test_two_hundred_and_fifty_damages(saved, tmp_path):
    seen = [broken(saved, tmp_path / str(seed), 1000 + seed) for seed in range(250)]
    assert seen.count("fell back") > 50  # of damages, many hit what is not read


@pytest.mark.parametrize("damage", [flip, cut, empty, remove, scribble])
def test_the_arrays_and_the_position_are_covered(damage, saved, tmp_path):
    """Whatever happens to the file of the arrays, or to the one of the position, is noticed."""
    rng = np.random.default_rng(1)
    sizes = [path.relative_to(saved) for path in files(saved / "2" / "state")]
    data = max(sizes, key=lambda path: (saved / path).stat().st_size)
    for number, path in enumerate((data, next((saved / "2" / "extra").glob("metadata")))):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        damage(folder / path.relative_to(saved) if path.is_absolute() else folder / path, rng)
        assert survives(folder) == "fell back"


def test_an_empty_newest_step_falls_back_and_is_written_again(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()
    assert survives(folder) == "fell back"
    store = checkpoint.Checkpoints(folder)
    store.save(carried(2), data={"step": 2, "seed": 3}, config={}, log={"last": [1.5]})
    store.close()
    assert survives(folder) == "as if nothing had happened"


def test_where_all_are_damaged_it_is_said_in_one_line_and_nothing_is_removed(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for step in "12":
        for path in files(folder / step):
            empty(path, None)
    before = files(folder)
    store = checkpoint.Checkpoints(folder)
    with pytest.raises(InputError) as caught:
        store.restore(carried(0))
    store.close()
    text = str(caught.value)
    assert "step 2 is damaged" in text
    assert "step 1 is damaged" in text
    assert "delete this folder to begin again" in text
    assert "\n" not in text
    assert files(folder) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", "\xff", "[" * 100_000])
def test_json_that_is_cut_or_something_else_is_one_line(content, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=r"run\.json: damaged.*; begin again") as caught:
        results.read_json(path, remedy="begin again")
    assert "\n" not in str(caught.value)


def test_json_that_is_absent_or_a_folder_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        results.read_json(tmp_path, remedy="begin again")
    with pytest.raises(InputError, match="cannot be written"):
        results.write_json(tmp_path, {})
    with pytest.raises(InputError, match="cannot be written"):
        results.write_json(tmp_path / "absent" / "run.json", {})


LIKE = (ANY, ANY)


def phases(folder, *, first=1.0):
    """Two phases of a round, computed or read: their values and metrics."""
    written = journal.Journal(folder, {"pi0": "a", "data": "b"})
    found = []
    for name, value in (("sample", first), ("fit", 2.0)):

        def compute(value=value):
            rows = np.arange(6, dtype=np.float32).reshape(2, 3) * np.float32(value)
            return (rows, rows.astype(np.int32)), {"loss": Metric(value, 0.5, 3)}

        found.append(written.phase(1, name, compute, like=LIKE))
    return found, written.computed


@pytest.fixture(scope="module")
def journaled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    whole, computed = phases(folder)
    assert computed == ["1/sample", "1/fit"]
    return folder, whole


def unharmed(folder, whole):
    """The phases as they were, or one line."""
    try:
        found, computed = phases(folder)
    except InputError as error:
        return "refused" if str(folder) in str(error) and "\n" not in str(error) else str(error)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    return "computed again" if computed else "as if nothing had happened"


@pytest.mark.parametrize("damage", [flip, cut, empty, remove, scribble])
def test_a_damaged_journal_is_one_line_or_computed_again(damage, journaled, tmp_path):
    folder, whole = journaled
    rng = np.random.default_rng(7)
    for number in range(40):
        place = tmp_path / str(number)
        shutil.copytree(folder, place)
        paths = files(place)
        path = paths[number % len(paths)]
        damage(path, rng)
        seen = unharmed(place, whole)
        assert seen in ("refused", "computed again", "as if nothing had happened")
        if damage is empty:  # a cut may take the last line break alone
            assert seen == "refused", path
        if damage is remove:
            assert seen == {".json": "computed again"}.get(path.suffix, "refused") or (
                path.name == "run.json"
            )


def test_edited_metrics_and_other_inputs_are_refused(journaled, tmp_path):
    folder, whole = journaled
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "round-001" / "fit.json"
    path.write_text(path.read_text().replace('"value": 2.0', '"value": 3.0'))
    with pytest.raises(InputError, match=r"fit\.json: damaged or edited.*to compute them again"):
        phases(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    for left in (tmp_path / "b" / "round-001").glob("sample.*"):
        left.unlink()
    assert unharmed(tmp_path / "b", whole) == "computed again"
    for left in (tmp_path / "b" / "round-001").glob("sample.*"):
        left.unlink()
    with pytest.raises(InputError, match="made of other inputs"):
        phases(tmp_path / "b", first=5.0)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_cut_run_json_is_one_line(content, journaled, tmp_path):
    shutil.copytree(journaled[0], tmp_path / "a")
    (tmp_path / "a" / "run.json").write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=r"run\.json: damaged.*name another folder"):
        phases(tmp_path / "a")


FULL = """
import resource, sys
from jax_klrlhf.errors import reported
from jax_klrlhf.training import checkpoint
from tests.faults.test_training import carried

with reported():
    store = checkpoint.Checkpoints(sys.argv[1])
    store.save(carried(1), data=1, config=None)
    store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        store.save(carried(2), data=2, config=None)
        store.wait()
    finally:
        store.close()
"""


def test_a_full_disk_is_one_line_and_nothing_around_it(tmp_path):
    """The whole of what a program prints, from its own process: at its end too."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "step 2 could not be written" in line
    assert "step 1 is whole and kept" in line


TWO = """
import sys, time
import jax, numpy as np
from jax_klrlhf.training import processes

index, address, waits = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "waits"
processes.join(auto=False, coordinator=address, count=2, index=index)
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
whole = jax.NamedSharding(mesh, jax.P())
ones = jax.make_array_from_callback(
    (2,), jax.NamedSharding(mesh, jax.P("x")), lambda at: np.ones(2, np.float32)[at]
)
total = jax.jit(lambda x: x.sum(), out_shardings=whole)
print("a word of its own", file=sys.stderr)
while True:
    try:
        float(total(ones))
    except Exception as error:
        if waits:
            time.sleep(600)  # as a collective on a TPU would
        assert processes.lost(error), error
        processes.leave(error)
    print("ready", flush=True)
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("victim", "waits"),
    [(1, "raises"), (0, "waits"), pytest.param(1, "waits", marks=slow)],
    ids=["another", "the coordinator, in a collective without end", "another, likewise"],
)
def test_the_survivor_of_two_processes_ends_in_one_line(victim, waits):
    assert processes.HEARTBEAT < 20  # seconds: by then the runtime has ended the process
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(index), address, waits],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        for process in both:
            while "ready" not in process.stdout.readline():
                assert process.poll() is None, process.stderr.read()
        both[victim].kill()
        _, told = both[1 - victim].communicate(timeout=120)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1 - victim].returncode != 0
    word, line = told.splitlines()
    assert word == "a word of its own"
    # Where a collective failed, the line says how.
    assert re.fullmatch(re.escape(processes.LOST) + r"( \(.*Gloo.*\))?", line), line
    assert line.endswith(")") == (waits == "raises")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of the loop's tests, from beginning to end."""
    folder = tmp_path_factory.mktemp("unbroken")
    return test_loop.run(folder), folder


@slow
def test_killed_at_every_moment_the_history_is_the_same(unbroken, tmp_path):
    whole, folder = unbroken
    for moment in range(test_loop.MOMENTS):
        place = tmp_path / str(moment)
        assert test_loop.killed_at(moment, place)
        outcome = test_loop.run(place)
        assert test_loop.lines(place) == test_loop.lines(folder), moment
        assert test_loop.last(outcome) == test_loop.last(whole), moment
        assert checkpoint.equal(outcome.state, whole.state), moment


@slow
def test_killed_by_the_system_at_moments_of_its_own_choice(unbroken, tmp_path):
    """SIGKILL from outside, a random time after the process began to write."""
    rng = np.random.default_rng(3)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.test_loop", str(tmp_path), "never"],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        history = tmp_path / "metrics.jsonl"
        before = history.stat().st_mtime_ns if history.exists() else 0
        while process.poll() is None and not (
            history.exists() and history.stat().st_mtime_ns != before
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
    outcome = test_loop.run(tmp_path)
    whole, folder = unbroken
    assert test_loop.lines(tmp_path) == test_loop.lines(folder)
    assert checkpoint.equal(outcome.state, whole.state)
