"""``klrlhf label`` from the command line: one server a folder, options that fit, and its end."""

import json

import pytest

from jax_klrlhf import cli, folders, labelling
from jax_klrlhf.label import program
from tests.label.asking import post


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"p {n}", "answers": [f"a {n}", f"b {n} good"]} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_server_has_its_folder_alone_and_ends_with_a_count(
    answers, tmp_path, monkeypatch, capsys
):
    folder, served = tmp_path / "labels", []
    serve = program.serve

    def kept(*arguments, **options):
        served.append(serve(*arguments, **options))
        return served[-1]

    sleep = program.time.sleep

    def meanwhile(seconds):
        if seconds < 60:  # of somebody else
            return sleep(seconds)
        (page,) = served
        ask = post(page.port, "/api/next", {"annotator": "Ana"})
        post(page.port, "/api/answer", {"annotator": "Ana", "ask": ask["ask"], "answer": "tie"})
        given = ["label", "--answers", str(answers), "--output", str(folder), "--port", "0"]
        assert cli.main(given) == 2
        assert folders.holder(folder, name=program.LOCK) is not None
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "serve", kept)
    monkeypatch.setattr(program.time, "sleep", meanwhile)
    given = ["label", "--answers", str(answers), "--output", str(folder), "--port", "0"]
    assert cli.main([*given, "--rule", "sampled"]) == 0
    said = capsys.readouterr()
    assert "8 answers to 4 prompts" in said.out
    assert "label here: http://127.0.0.1:" in said.out
    assert "1 new labels, 1 in all" in said.out
    assert "in use by process" in said.err
    assert [x.answer for x in labelling.read_labels(folder)] == ["tie"]
    assert folders.holder(folder, name=program.LOCK) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "cleverest"], "--rule 'cleverest': there are most-uncertain"),
        (["--repeats", "1"], "--repeats is 1.0"),
        (["--port", "70000"], "--port is 70000"),
        (["--ridge", "0"], "--ridge is 0.0; it must be positive"),
        (["--rule", "sampled"], "--rule: the pairs that wait in"),
        (["--answers", "absent.jsonl"], "no data at 'absent.jsonl'"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, message):
    assert cli.main(["label", "--output", str(tmp_path / "labels"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
