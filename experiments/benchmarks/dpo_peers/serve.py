"""A contender as a process that waits for its turn: commands in, one line of JSON out.

Commands are lines on standard input: ``check`` (losses of the first steps, from the weights given),
``warm`` (everything once, to compile and to fill caches), ``turn`` (the fixed set of pairs once,
timed). Whatever libraries print goes to standard error.
"""

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Contender(NamedTuple):
    """What a tool can be asked to do."""

    check: Callable[[], list[float]]
    """Take the check's steps from the weights given; the loss of each."""
    turn: Callable[[], None]
    """Train on the fixed set of pairs once."""
    slots: int
    """Token slots computed on in a turn, padding and repeated prompts included."""


def serve(make: Callable[[dict[str, Any]], Contender]) -> None:
    """Make the contender of the job named on the command line, and serve until input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    contender = make(json.loads(Path(sys.argv[1]).read_text()))
    answer(slots=contender.slots)
    for line in sys.stdin:
        command = line.strip()
        if command == "check":
            answer(losses=contender.check())
            continue
        if command == "warm":
            contender.turn()
            answer(peak=peak())
            _forget_peak()
            continue
        before = os.times()
        begin = time.perf_counter()
        contender.turn()
        seconds = time.perf_counter() - begin
        after = os.times()
        spent = after.user - before.user + after.system - before.system
        answer(seconds=seconds, cpu_seconds=spent, peak=peak())


def peak() -> float:
    """Largest resident set of this process so far, in MiB.

    Linux hands the parent's ``ru_maxrss`` on to a child, so the process's own high-water mark is
    read where there is one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) / 1024
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _forget_peak() -> None:
    """Start the high-water mark anew, so that it tells training from compiling (Linux only)."""
    mark = Path("/proc/self/clear_refs")
    if mark.is_file():
        mark.write_text("5")
