"""A labelling server in a process of its own, to be killed: ``python child.py FOLDER``.

Reads lines: ``serve`` forks one that serves the folder and says ``PID PORT``. Forks, so that the
imports are paid once.
"""

import os
import sys

from jax_klrlhf import folders, label
from jax_klrlhf.label.program import LOCK


def main() -> None:
    for line in sys.stdin:
        assert line == "serve\n"
        if (pid := os.fork()) == 0:
            with (
                folders.locked(sys.argv[1], name=LOCK, wait=True),
                label.serve(label.Session(sys.argv[1], repeats=0.2)) as served,
            ):
                print(os.getpid(), served.port, flush=True)
                served._thread.join()
        os.waitpid(pid, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
