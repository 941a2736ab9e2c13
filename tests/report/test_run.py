"""The page of a run that goes on, of one that was stopped, and what it says of health."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from jax_klrlhf import cli, folders
from jax_klrlhf.errors import InputError
from jax_klrlhf.report import program
from jax_klrlhf.report import run as runs
from tests.label.asking import post, request
from tests.report.test_side_by_side import EVIL, Page, data_of


def dpo(folder, *, lines=3, kl=1.0):
    """A folder as a training run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"command": "dpo", "model": EVIL, "lora": {"rank": 0, "targets": ["query"]}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(1, lines + 1):
        rows.append({"step": 10 * step, "time": 5.0, "loss": 0.7 / step, "loss/stderr": 0.01})
        rows.append(
            {"step": 10 * step, "time": 6.0, "eval/loss": 0.7, "eval/kl/ref": kl * step,
             "eval/kl/ref/stderr": 0.1, "eval/rewards/margins": 0.2 * step, "odd": None}
        )  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')
    return folder


def iterated(folder):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"command": "iterate", "model": str(folder / "absent"), "reward": "human"}
    (folder / "config.json").write_text(json.dumps(config))
    before = folder / "before" / "round-000"
    before.mkdir(parents=True)
    pi0 = {"value": 0.5, "stderr": 0.1, "n": 9}
    (before / "judge.json").write_text(json.dumps({"metrics": {"eval/reward": pi0}}))
    row = {"step": 1, "time": 1.0, "eval/reward": 0.9, "eval/kl/ref": 2.0, "pairs/valid": 0.25,
           "eval/sampler_scorer_mismatch": 0.001}  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for number, phases in ((1, runs.PHASES), (2, ("sample", "score"))):
        place = folder / "rounds" / f"round-{number:03d}"
        place.mkdir(parents=True)
        for name in phases:
            (place / f"{name}.json").write_text(json.dumps({"seconds": 1.5}))
    arrays = {
        "prompts/ids": np.array([[7, 8, 0]]), "prompts/lengths": np.array([2]),
        "responses/ids": np.array([[[1, 2], [3, 0]]]), "responses/lengths": np.array([[2, 1]]),
        "label": np.array([0.0], np.float32), "weight": np.array([1.0], np.float32),
    }  # fmt: skip
    safetensors.numpy.save_file(arrays, folder / "rounds" / "round-001" / "label.safetensors")
    return folder


def test_a_stopped_run_has_its_log_in_charts_and_half_a_line_costs_itself(tmp_path):
    path = runs.write(dpo(tmp_path / "run"))
    text = path.read_text()
    found = data_of(text)
    assert path == tmp_path / "run" / "report.html"
    assert found["status"] == {"state": "stopped", "by": None}
    charts = {chart["title"]: chart["series"] for chart in found["charts"]}
    train, held = charts["Loss"]
    assert (train["name"], train["x"]) == ("loss", [10, 20, 30])
    assert train["y"] == pytest.approx([0.7, 0.35, 0.7 / 3])
    assert train["error"] == [0.01] * 3
    assert (held["name"], held["error"]) == ("eval/loss", None)
    assert found["plane"]["x"] == [1.0, 2.0, 3.0]
    assert found["plane"]["y"] == pytest.approx([0.2, 0.4, 0.6])
    assert found["plane"]["xError"] == [0.1] * 3
    assert found["config"]["model"] == EVIL
    assert found["config"]["lora.targets"] == '["query"]'
    assert len(Page(text).scripts) == 3
    assert 'http-equiv="refresh' not in text


def test_a_run_that_goes_on_is_shown_as_running_and_then_as_finished(tmp_path):
    folder = dpo(tmp_path / "run")
    code = (
        "import sys, time; from jax_klrlhf import folders\n"
        f"with folders.locked({str(folder)!r}):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout.readline() == "held\n"
        status = runs.read(folder)["status"]
        assert status["state"] == "running"
        assert f"process {held.pid} on" in status["by"]
        assert 'http-equiv="refresh" content="7"' in runs.write(folder, every=7.0).read_text()
        held.stdin.close()
    assert runs.read(folder)["status"]["state"] == "stopped"
    (folder / "model").mkdir()
    (folder / "finished.json").write_text(json.dumps({"left": "model", "command": "dpo"}))
    metric = {"value": 2.0, "stderr": 0.5, "n": 16}
    results = {"name": "dpo", "config": {}, "metrics": {"eval/sigmoid/loss": metric}}
    (folder / "results.json").write_text(json.dumps(results))
    found = runs.read(folder)
    assert found["status"]["state"] == "finished"
    assert found["results"] == [
        {"name": "eval/sigmoid/loss", **metric, "low": 2.0 - 0.98, "high": 2.0 + 0.98}
    ]


def test_who_looks_at_a_lock_does_not_keep_a_run_from_its_folder(tmp_path):
    with folders.locked(tmp_path):
        assert "process" in folders.holder(tmp_path)
        with pytest.raises(InputError, match="in use by process"), folders.locked(tmp_path):
            pass
    assert folders.holder(tmp_path) is None
    # A lock that is held for a look alone: who comes looks again.
    path = tmp_path / ".lock"
    path.touch()
    code = (
        f"import fcntl, time; f = open({str(path)!r}); fcntl.flock(f, fcntl.LOCK_SH)\n"
        "print('looks', flush=True); time.sleep(0.05)"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True
    ) as looks:
        assert looks.stdout.readline() == "looks\n"
        deadline = time.monotonic() + 5
        with folders.locked(tmp_path):
            assert time.monotonic() < deadline


def test_an_iterative_run_has_its_plane_from_pi0_on_its_rounds_and_who_it_waits_for(tmp_path):
    folder = iterated(tmp_path / "run")
    report_of = runs.read(folder)
    assert report_of["plane"]["labels"] == ["pi0", "round 1"]
    assert report_of["plane"]["x"] == [0.0, 2.0]
    assert report_of["plane"]["y"] == [0.5, 0.9]
    one, two = report_of["rounds"]
    assert one["seconds"] == dict.fromkeys(runs.PHASES, 1.5)
    assert set(two["seconds"]) == {"sample", "score"}
    # Without a tokenizer, token ids.
    assert one["pairs"] == [{"prompt": "7 8", "texts": ["1 2", "3"], "label": 0.0}]
    assert report_of["waits"]["pairs"] == 0
    assert any("25% of the prompts made a pair" in text for text in report_of["warnings"])
    assert not any("sampler" in text for text in report_of["warnings"])


def test_health_is_what_the_run_would_say_of_its_log(tmp_path):
    assert runs.read(dpo(tmp_path / "fine"))["warnings"] == []
    (said,) = runs.read(dpo(tmp_path / "far", kl=500.0))["warnings"]
    assert said.startswith("exploded_kl: step 10: KL(policy || reference) is 500.0 nats")


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no run: neither config.json nor results.json" in capsys.readouterr().err
    dpo(tmp_path / "run")
    for options, message in (
        (["--serve", "--watch", "3"], "--serve: the page follows the run"),
        (["--port", "3"], "--port is read by no run with --serve False"),
        (["--watch", "0"], "--watch is 0.0; it must be positive"),
    ):
        assert cli.main(["report", str(tmp_path / "run"), *options]) == 2
        assert message in capsys.readouterr().err


def test_answers_of_generate_and_eval_side_by_side(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    rows = [
        {"prompt": "p", "model": "a", "answers": ["x", "y"], "tokens": [1, 2]},
        {"prompt": "p", "policy": ["uv"], "reference": ["w"], "policy/reward": [1.0],
         "reference/reward": [0.5], "kl": [3.0], "policy/tokens": [["u", "v"]],
         "kl/tokens": [[1.0, 2.0]]},
        {"prompt": "q", "policy": "online", "text": EVIL, "gold": 1.0},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["report", str(path)]) == 0
    found = data_of((tmp_path / "answers.html").read_text())
    assert found["policies"] == ["a", "policy", "reference", "online"]
    said = {(a["policy"], a["text"]): a for a in found["answers"]}
    assert said["a", "y"]["numbers"] == {"tokens": 2}
    assert said["policy", "uv"]["token_kl"] == [1.0, 2.0]
    assert said["policy", "uv"]["numbers"] == {"reward": 1.0, "kl": 3.0, "tokens": 2}
    assert said["reference", "w"]["numbers"] == {"reward": 0.5}
    path.write_text('{"prompt": "p", "other": 1}\n')
    assert cli.main(["report", str(path)]) == 2
    assert "line 1: no answers of klrlhf generate or eval" in capsys.readouterr().err


def test_a_served_page_follows_the_run_and_is_empty_without_its_token(tmp_path, monkeypatch):
    folder = dpo(tmp_path / "run", lines=1)
    served, found = [], []
    start = program.serving.start

    def kept(*arguments, **options):
        served.append(start(*arguments, **options))
        return served[0]

    def meanwhile(seconds):
        (page,) = served
        body = request(page.port, "/", method="GET")[2].decode()
        assert str(folder) not in body
        assert json.dumps(EVIL)[1:-1] not in body
        assert data_of(body)["live"] == 5.0
        assert request(page.port, "/api/report", {})[0] == 401
        right = f"Bearer {page.token}"
        found.append(post(page.port, "/api/report", {}, Authorization=right))
        dpo(folder, lines=2)
        found.append(post(page.port, "/api/report", {}, Authorization=right))
        raise KeyboardInterrupt

    monkeypatch.setattr(program.serving, "start", kept)
    monkeypatch.setattr(program.time, "sleep", meanwhile)
    config = program.ReportConfig(run=folder, serve=True, port=0, token="always")
    program.report(config)
    assert [len(x["plane"]["x"]) for x in found] == [1, 2]
