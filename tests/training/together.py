"""Several processes on this machine that are one JAX program, as the hosts of a slice are."""

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

DEVICES = 8
"""Of all processes together."""


def run(module: str, folder: Path, *, count: int, limit: float = 900) -> None:
    """``python -m module INDEX COUNT ADDRESS FOLDER`` in every process, each with its devices.

    Raises AssertionError with what all of them said where one fails, or ``limit`` seconds are over.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # The session's flags, and then ours: the last one counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // count}"
    texts = [folder / f"said-{index}.txt" for index in range(count)]
    children = []
    for index, path in enumerate(texts):
        with path.open("w") as said:
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(index), str(count), address, str(folder)],
                    env=os.environ | {"PYTHONPATH": ".", "XLA_FLAGS": flags},
                    cwd=Path(__file__).parents[2],
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + limit
    try:
        # Together: where one fails, the others would wait for it.
        while any(child.poll() is None for child in children) and time.monotonic() < end:
            if any(child.poll() for child in children):
                break
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    said = "\n".join(path.read_text() for path in texts)
    assert [child.returncode for child in children] == [0] * count, said


def take_part(main: Callable[[int, int, str, Path], None]) -> None:
    """What a module that is run so does: ``main(index, count, address, folder)``.

    A process that fails ends at once: JAX's own end of it would wait for the others for minutes.
    """
    index, count, address, folder = sys.argv[1:]
    try:
        main(int(index), int(count), address, Path(folder))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
