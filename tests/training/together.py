"""Several processes on this machine that are one JAX program, as the hosts of a slice are."""

import os
import socket
import subprocess
import sys
from pathlib import Path

DEVICES = 8
"""Of all processes together."""


def run(module: str, folder: Path, *, count: int) -> None:
    """``python -m module INDEX COUNT ADDRESS FOLDER`` in every process, each with its devices.

    Raises AssertionError with what all of them said where one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # The session's flags, and then ours: the last one counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // count}"
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(index), str(count), address, str(folder)],
            env=os.environ | {"PYTHONPATH": ".", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        # Together: where one fails, the others wait for it.
        texts = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count, "\n".join(texts)
