"""Joining the processes of a run, and ending in one line when one of them dies.

A process that is killed takes its run with it: the others can't go on, and start again together
from the last checkpoint. They learn of it within :data:`HEARTBEAT` seconds (100 by JAX's default).
Where a collective fails, that is an exception (:func:`lost`). Where it would wait for ever, as on a
TPU, or the dead one was the coordinator, JAX's runtime ends the process itself, in C++, behind a
page of its log and its stack: standard error then passes through a small program that lets
everything by, but for that page, in whose place it writes one line.
"""

import os
import subprocess
import sys

import jax

from jax_klrlhf import placement
from jax_klrlhf.errors import InputError

HEARTBEAT = 10
"""Seconds without a sign of life after which a process counts as dead."""
LOST = (
    "klrlhf: stopped: another process of this run has died or cannot be reached; start all of them "
    "again to go on from what was saved."
)
# In what a collective raises when its other end is gone.
_GONE = ("closed by peer", "reset by peer", "Read error", "heartbeat", "Gloo", "UNAVAILABLE")
_RELAY = """
import os, re, select, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
page = re.compile(rb"[^\\n]*(coordination.service|JAX distributed service detected)")
held, lost = b"", False
while True:
    if not select.select([0], [], [], 5 if held else None)[0]:
        os.write(2, held)  # Said, and survived.
        held = b""
        continue
    chunk = os.read(0, 2**16)
    if not chunk:
        break
    if lost:
        continue
    text = held + chunk
    begin = page.search(text)
    at = len(text) if begin is None else begin.start()
    os.write(2, text[:at])
    held = text[at:]
    if b"JAX distributed service detected fatal errors" in held:
        held, lost = b"", True
os.write(2, sys.argv[1].encode() + b"\\n" if lost else held)
"""


def join(*, auto: bool, coordinator: str | None, count: int, index: int) -> None:
    """Join the run's processes, where there are several.

    Args:
        auto: ask the cluster's environment for all that follows.
        coordinator: address and port of process 0; None where there is one process.
        count: number of processes.
        index: of this one.

    Raises:
        InputError: where a count has no coordinator, or the others cannot be joined.
    """
    if not auto and coordinator is None:
        if count != 1:
            raise InputError("--processes.count needs --processes.coordinator, such as host0:1234.")
        return
    _relay()
    try:
        if auto:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        else:
            jax.distributed.initialize(
                coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT
            )
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"--processes: they could not be joined ({text}).") from None


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return not placement.alone() and any(word in str(error) for word in _GONE)


def leave(error: BaseException) -> None:
    """End this process with the one line and its cause, at once: JAX would wait for the dead one,
    and then tell of it at length."""
    sys.stdout.flush()
    cause = " ".join(str(error).split())[:200]
    print(f"{LOST} ({cause})", file=sys.stderr, flush=True)
    os._exit(3)


def _relay() -> None:
    """Let standard error pass through another program, which outlives this one by a moment."""
    relay = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _RELAY, LOST],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=2,
    )
    assert relay.stdin is not None
    sys.stderr.flush()
    os.dup2(relay.stdin.fileno(), 2)
    # Kept open by nothing but the descriptor 2, so that it ends when this process does.
    relay.stdin.close()
    relay.returncode = 0  # Nobody waits for it.
