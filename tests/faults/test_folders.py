"""Two programs in one folder, killed ones, and what they leave behind."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jax_klrlhf import folders
from jax_klrlhf.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def other(code: str) -> subprocess.Popen:
    """Another program, up to its first line of output."""
    program = subprocess.Popen(
        [sys.executable, "-c", "import time\nfrom jax_klrlhf import folders\n" + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    return program


def kill(program: subprocess.Popen) -> None:
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert program.stdout is not None
    program.stdout.close()


HOLD = """
with folders.locked({!r}):
    print("ready", flush=True)
    time.sleep(60)
"""
WRITE = """
with folders.appearing({!r}) as partial:
    (partial / "half").write_text("half of it")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_second_program_is_refused_by_the_name_of_the_first_and_killing_it_frees_the_folder(
    tmp_path,
):
    first = other(HOLD.format(str(tmp_path)))
    with (
        pytest.raises(InputError, match=rf"in use by process {first.pid} on .* since"),
        folders.locked(tmp_path),
    ):
        pytest.fail("held twice")
    kill(first)
    assert (tmp_path / ".lock").exists()  # what the dead one wrote does not block
    with folders.locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_stale_lock_with_our_own_process_number_does_not_block(tmp_path):
    # In a container every start has the same number.
    (tmp_path / ".lock").write_text(f'{{"process": {os.getpid()}}}')
    with folders.locked(tmp_path):
        assert '"since"' in (tmp_path / ".lock").read_text()  # held anew
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_is_refused_too_and_other_names_are_other_locks(tmp_path):
    with (
        folders.locked(tmp_path),
        folders.locked(tmp_path, name=".other"),
        pytest.raises(InputError, match="in use by process"),
        folders.locked(tmp_path),
    ):
        pytest.fail("held twice")
    with folders.locked(tmp_path):  # let go of after the block, and after a refusal
        pass


def test_a_waiting_program_comes_after(tmp_path):
    first = other(
        textwrap.dedent(f"""
            with folders.locked({str(tmp_path)!r}):
                print("ready", flush=True)
                time.sleep(0.5)
                open({str(tmp_path / "first")!r}, "w").close()
        """)
    )
    with folders.locked(tmp_path, wait=True):
        assert (tmp_path / "first").exists()
    first.wait()
    assert first.stdout is not None
    first.stdout.close()


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path):
    code = f"""
import os
context = folders.locked({str(tmp_path)!r})
context.__enter__()
if os.fork() == 0:
    print("ready", flush=True)  # the child says so: it has let go by then
    os.close(1)
    time.sleep(20)
    os._exit(0)
time.sleep(60)
"""
    parent = other(code)
    kill(parent)
    with folders.locked(tmp_path):
        assert f'"process": {os.getpid()}' in (tmp_path / ".lock").read_text()
    assert parent.returncode == -signal.SIGKILL


def test_place_that_cannot_be_held_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=r"\.lock: cannot be written"), folders.locked(tmp_path):
        pass


def test_what_a_killed_program_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "data"
    living, dead = other(WRITE.format(str(path))), other(WRITE.format(str(path)))
    (tmp_path / ".data.new-mine").mkdir()  # a user's own folders are nobody's left-overs
    (tmp_path / ".data2.new-0123456789abcdef").mkdir()
    assert folders.sweep(path) == []
    kill(dead)
    (gone,) = folders.sweep(path)
    assert not gone.exists()
    left = [entry for entry in tmp_path.iterdir() if (entry / "half").exists()]
    assert len(left) == 1
    kill(living)
    assert folders.sweep(path, alone=True) == left
    assert {p.name for p in tmp_path.iterdir()} == {".data.new-mine", ".data2.new-0123456789abcdef"}


def test_old_folder_comes_back_where_its_successor_did_not_arrive(tmp_path):
    path = tmp_path / "model"
    aside = folders.fresh_name(path, kind="old")
    aside.mkdir()
    (aside / "weights").write_text("old")
    assert folders.sweep(path) == []
    assert (path / "weights").read_text() == "old"
    assert not aside.exists()


def test_folder_appears_whole_replaces_and_is_dropped_on_failure(tmp_path):
    path = tmp_path / "model"

    def write(text, **options):
        with folders.appearing(path, **options) as partial:
            (partial / "weights").write_text(text)
            if text == "bad":
                raise KeyError(text)

    with pytest.raises(KeyError):
        write("bad")
    assert list(tmp_path.iterdir()) == []
    write("one")
    write("two")
    assert (path / "weights").read_text() == "two"
    write("three", replace=False)  # the first stays
    assert (path / "weights").read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_names_are_not_repeated(tmp_path):
    names = {folders.fresh_name(tmp_path / "model") for _ in range(100)}
    assert len(names) == 100
    assert all(name.parent == tmp_path for name in names)
