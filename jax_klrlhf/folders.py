"""One program in a folder at a time, and results that appear whole or not at all.

A program that writes in a folder holds it; a second one is refused in one line that names the
first. What a killed program left half-written is removed by the next one that comes::

    with folders.locked(run):                      # of a run with several processes: the first
        folders.sweep(run / "model", alone=True)   # left-overs of killed programs
        ...
        with folders.appearing(run / "model") as partial:
            write(partial)                         # takes the place of run / "model" at the end

Locks are the kernel's (``flock``), which lets go of them when their process dies, however it dies:
a dead holder never blocks, and no process number is compared, which in a container is the same at
every start. (Libraries for this fall back on a file's existence, which outlives its maker.) Where
the file system has no locks, there are none.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_klrlhf.errors import InputError

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}
_held: set[int] = set()  # descriptors of this process's locks


def _forget() -> None:
    """A forked child would keep its parent's locks after the parent's death."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def locked(folder: str | Path, *, name: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Hold a folder, which must exist, by the file `name` in it.

    Another `name` is another lock: a folder that does not exist yet is held by a file beside it.
    A lock is not re-entrant: a process that holds one and asks again is refused too.

    Args:
        folder: to be held, to the end of the block or of the process.
        name: of the file, which is there while it is held.
        wait: for the other to finish, instead of refusing.

    Raises:
        InputError: naming the program that holds it, or where no file can be made in the folder.
    """
    folder = Path(folder)
    path = folder / name
    looks = 2  # another may only be looking who holds it
    while (descriptor := _take(path)) is None:
        looks -= 1
        if not wait and looks < 0:
            raise InputError(
                f"{folder}: in use by {_holder(path)}: wait for it or stop it, or give another "
                "folder."
            )
        time.sleep(0.1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # Still held: who waits for it finds another file in its place.
        _release(descriptor)


def holder(folder: str | Path, *, name: str = ".lock") -> str | None:
    """Who holds a folder at this moment, in words; None where nobody does, or it cannot be seen."""
    path = Path(folder) / name
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        # Shared, and let go of at once: :func:`locked` looks again before it refuses.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(path)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def fresh_name(path: str | Path, *, kind: str = "new") -> Path:
    """A name beside `path` that nobody has had, for what will take its place; see :func:`sweep`."""
    path = Path(path)
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(8)}")


@contextlib.contextmanager
def appearing(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """A new folder to write in, which becomes `path` at the end of the block, if that succeeds.

    What was there is replaced; without `replace` it stays, and the new one is dropped. Raises the
    operating system's own ``OSError``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, descriptor = _fresh_folder(path)
    try:
        yield partial
        if replace and path.exists():
            old, held = fresh_name(path, kind="old"), _take(path, make=False)
            try:
                os.rename(path, old)
                os.rename(partial, path)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                _release(held)
        else:
            try:
                os.rename(partial, path)
            except OSError:
                if replace or not path.exists():
                    raise
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
        _release(descriptor)


def sweep(path: str | Path, *, alone: bool = False) -> list[Path]:
    """Remove what killed programs left under a :func:`fresh_name` of `path`; returns the names.

    What a living one is writing by :func:`appearing` stays. `alone`: the caller holds the folder in
    which `path` lies, so nothing of it is alive. Where a program was killed between setting an old
    `path` aside and putting the new one in its place, the old one comes back.
    """
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\w+)-[0-9a-f]{{16}}")
    removed = []
    for left in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        match = pattern.fullmatch(left.name)
        if match is None:
            continue
        descriptor = None if alone else _take(left, make=False)
        if not alone and descriptor is None:
            continue
        try:
            if match[1] == "old" and not path.exists():
                os.rename(left, path)
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
            removed.append(left)
        finally:
            _release(descriptor)
    return removed


def _fresh_folder(path: Path) -> tuple[Path, int | None]:
    """A new folder, and the lock by which :func:`sweep` sees that it is alive."""
    while True:
        partial = fresh_name(path)
        partial.mkdir()
        descriptor = _take(partial, make=False)
        if descriptor is not None or partial.exists():  # No locks here: no sweep removes it either.
            return partial, descriptor
        # Someone's sweep came before the lock, and has removed it.


def _take(path: Path, *, make: bool = True) -> int | None:
    """The lock of a file, made where asked, or of a folder: a descriptor; None: another has it.

    Where the file system has no locks, a file's is -1 and a folder's is None.
    """
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT if make else os.O_RDONLY
            descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            if not make:
                return None
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); change its permissions or give "
                "another folder."
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino != os.stat(path).st_ino:
                raise FileNotFoundError  # Its holder removed it on leaving: take the next one.
        except FileNotFoundError:
            os.close(descriptor)
            if not make:
                return None
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED or not make:
                return None
            return -1
        _held.add(descriptor)
        if make:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_self()).encode(), 0)
        return descriptor


def _release(descriptor: int | None) -> None:
    if descriptor is not None and descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def _self() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": " ".join(sys.argv)[:200],
    }


def _holder(path: Path) -> str:
    """Who holds a lock, by what it wrote there."""
    try:
        found = json.loads(path.read_text())
        return "process {process} on {host} since {since} ({command})".format(**found)
    except (OSError, ValueError, LookupError, TypeError):
        return "another program"
