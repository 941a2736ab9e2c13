"""SIGKILL at any point: nothing that was confirmed is lost, no label is there twice."""

import http.client
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from jax_klrlhf import labelling
from jax_klrlhf.labelling import pair_of
from tests.label.asking import post

ROOT = Path(__file__).resolve().parents[2]
PAIRS, KILLS = 60, 6


@pytest.fixture
def server(tmp_path):
    asked = [pair_of(f"prompt {n}", f"a {n}", f"b {n}")[0] for n in range(PAIRS)]
    labelling.write_pairs(tmp_path, asked)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("child.py")), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


def test_killed_between_labels_nothing_is_lost_and_nothing_is_there_twice(server, tmp_path):
    rng = random.Random(0)
    confirmed, unsure, kills = {}, None, 0
    while True:
        server.stdin.write("serve\n")
        server.stdin.flush()
        pid, port = map(int, server.stdout.readline().split())
        # Some time in the middle of asking and answering; the last one lives until all is done.
        killer = threading.Timer(rng.uniform(0.01, 0.08), os.kill, (pid, signal.SIGKILL))
        if kills < KILLS:
            killer.start()
        try:
            if unsure is not None:
                # What was on its way: the page sends it again.
                post(port, "/api/answer", unsure)
                confirmed[unsure["ask"]] = unsure["answer"]
                unsure = None
            while (ask := post(port, "/api/next", {"annotator": "Ana"}))["ask"] is not None:
                unsure = {"annotator": "Ana", "ask": ask["ask"], "answer": rng.choice(ANSWERS)}
                post(port, "/api/answer", unsure)
                confirmed[unsure["ask"]] = unsure["answer"]
                unsure = None
                time.sleep(0.001)
        except (OSError, http.client.HTTPException):
            pass
        else:
            killer.cancel()
            os.kill(pid, signal.SIGKILL)
            assert server.stdout.readline() == "dead\n"
            break
        killer.join()
        kills += 1
        assert server.stdout.readline() == "dead\n"
        there = {f"{x.pair.name}.{x.repeat}" for x in labelling.read_labels(tmp_path)}
        assert confirmed.keys() <= there
    assert kills >= 1
    labels = labelling.read_labels(tmp_path)
    counts = Counter((x.pair.name, x.repeat) for x in labels)
    assert set(counts.values()) == {1}
    assert sum(repeat == 0 for _, repeat in counts) == PAIRS
    for x in labels:
        right = "second" if x.left == "first" else "first"
        said = {x.left: "left", right: "right"}.get(x.answer, x.answer)
        assert confirmed[f"{x.pair.name}.{x.repeat}"] == said


ANSWERS = ("left", "right", "tie", "skip")
