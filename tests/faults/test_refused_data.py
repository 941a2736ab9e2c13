"""Data that do not suit a model or a program: refused in one line, before anything is computed."""

import contextlib
import copy
import functools
import io
import json
import re
import shutil

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jax_klrlhf import cli, models
from jax_klrlhf.data import check, prepare, rows, tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs import SftConfig, sft, train
from jax_klrlhf.training import loop, reference

CONTEXT = 48
LENGTHS = {"max_prompt_length": 32, "max_response_length": 16}


def pairs(count, **changed):
    return [
        {"prompt": f"question {n}? ", "chosen": f"yes {n}", "rejected": f"no, not {n}"} | changed
        for n in range(count)
    ]


def ranked(count, scores):
    return [
        {"prompt": f"question {n}?", "responses": [" one", " two", " six"], "scores": scores}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random GPT-2 (learned positions) of 48 tokens' context, saved with its tokenizer."""
    home = tmp_path_factory.mktemp("tiny")
    texts = [json.dumps(row) for row in pairs(30)]
    tokenizer = tokenize.train_tokenizer(texts, vocab_size=300, folder=home / "words")
    config = models.ModelConfig.from_hf(
        {
            "model_type": "gpt2",
            "vocab_size": len(tokenizer),
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": CONTEXT,
        }
    )
    params = models.language_model(config).init(jax.random.key(0))
    models.save(home / "model", config, params, tokenizer)
    return home / "model"


@pytest.fixture(scope="module")
def words(tiny):
    return tokenize.load(tiny)


@pytest.fixture
def refused(tiny, tmp_path_factory, monkeypatch, capsys):
    """The one line that a program ends with, without a step or a reference computed."""

    def compute(*args, **kwargs):
        raise AssertionError("something was about to be computed")

    monkeypatch.setattr(loop, "train", compute)
    monkeypatch.setattr(reference, "tabulate", compute)

    def start(command, data, *options):
        home = tmp_path_factory.mktemp("run")
        if isinstance(data, list):
            (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
            data = home / "data.jsonl"
        arguments = ["--model", tiny, "--data", data, "--output", home / "out", "--mesh.data", 8]
        arguments += ["--mesh.fsdp", 1, "--batch-size", 8, "--steps", 1, *options]
        assert cli.main([command, *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return start


REFUSED = {
    "prompts alone": (
        [{"prompt": f"question {n}?"} for n in range(9)],
        ("dpo", "sft", "reward"),
        r"data\.jsonl, line \d+: a prompt without.*rows are so",
    ),
    "one response each": (
        [{"prompt": f"question {n}?", "response": " yes"} for n in range(9)],
        ("dpo", "reward"),
        r"line \d+: one response, where a preference has two",
    ),
    "one response in one of them": (
        [*pairs(9), {"prompt": "alone? ", "response": "yes"}, *pairs(3)],
        ("dpo", "reward"),
        r"line 10: one response.*1 of 13 rows",
    ),
    "scores all equal": (
        [*ranked(5, [1, 0, 2]), *ranked(1, [2.5, 2.5, 2.5])],
        ("dpo", "reward"),
        r"line 6: responses of equal scores.*--arrange best_worst",
    ),
    "scores that float32 cannot tell apart": (
        [*ranked(5, [1, 0, 2]), *ranked(1, [2**24, 2**24 + 1, 2**24])],
        ("dpo",),
        r"line 6: responses of equal scores",
    ),
    "one weight beyond float32": (pairs(9, weight=1e39), ("dpo",), "line 1.*weight 1e.39 is out"),
    "half of a surrogate pair": (
        pairs(9, chosen="yes \ud800"),
        ("dpo", "sft", "reward"),
        r"line 1, column 'chosen': character 4 is half",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_say_nothing_are_refused_before_any_compute(refused, case):
    records, commands, message = REFUSED[case]
    for command in commands:
        error = refused(command, records, "--test-fraction", 0)
        assert re.search(message, error), error


def test_one_response_is_enough_for_supervised_training(words, tmp_path):
    records = [{"prompt": "p", "response": " r"}, *pairs(2)]
    data = prepare.build(records, words, tmp_path / "data", **LENGTHS)["train"]
    check.responses(data)
    with pytest.raises(InputError, match="record 0: one response"):
        check.pairs(data)


def test_token_beyond_the_vocabulary_is_refused_by_name(refused, words, tiny, tmp_path):
    grown = copy.deepcopy(words)
    grown.add_tokens(["<mood>"])  # and the model is not resized
    assert len(grown) == len(words) + 1
    model = shutil.copytree(tiny, tmp_path / "grown")
    grown.save_pretrained(model)
    records = [*pairs(3), *pairs(1, chosen="yes <mood>")]
    for command in ("dpo", "sft", "reward"):
        error = refused(command, records, "--test-fraction", 0, "--model", model)
        assert f"line 4: token id {len(words)} is beyond the vocabulary of {model}" in error
        assert "resize" in error
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree <mood>\n")
    for name in ("positive", "negative"):
        (tmp_path / f"{name}.txt").write_text("good day\nbad day\n")
    options = ("--prompts", prompts, "--reward", tmp_path, "--held-out", 1, "--model", model)
    error = refused_iterate(options, tmp_path / "out")
    assert f"token id {len(words)} is beyond the vocabulary" in error


def refused_iterate(options, output):
    lengths = ("--max-prompt-length", 16, "--max-response-length", 16)
    arguments = ["iterate", "--output", output, *options, *lengths, "--fit.batch-size", 8]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert cli.main([str(a) for a in arguments]) == 2
    return error.getvalue()


def test_rows_are_checked_in_memory_too():
    row = rows.Row([1, 2], [[3], [9]], [1.0, 0.0], 1.0, 1.0, 0, where="a.jsonl, line 7")
    check.vocabulary([row], vocab_size=10, model="m")
    with pytest.raises(InputError, match="line 7: token id 9 is beyond the vocabulary of m"):
        check.vocabulary([row], vocab_size=9, model="m")


def test_rows_longer_than_the_context_are_cut_to_it_and_counted(words, tmp_path):
    long = pairs(2, prompt="word " * 30, chosen="good " * 30)
    records = [*pairs(4), *long]
    build = functools.partial(
        prepare.build, records, words, max_prompt_length=400, max_response_length=400
    )
    whole = build(tmp_path / "whole")["train"]
    cut = build(tmp_path / "cut", max_length=CONTEXT)["train"]
    assert cut.manifest["rows_with_cut"]["to the context"] == 2
    assert int((cut.lengths.prompts + cut.lengths.longest).max()) == CONTEXT
    before, after = whole.fetch(range(6)), cut.fetch(range(6))
    assert [r._replace(number=0) for r in after[:4]] == [r._replace(number=0) for r in before[:4]]
    for left, right in zip(before[4:], after[4:], strict=True):
        assert right.prompt[0] == left.prompt[0]  # the begin token stands
        assert right.prompt[1:] == left.prompt[-len(right.prompt) + 1 :]
        assert right.responses[0] == left.responses[0][: len(right.responses[0])]
    check.context(cut, max_length=CONTEXT, model="m")
    message = f"2 of 6 rows are longer than the context of m, {CONTEXT} tokens.*--max-length"
    with pytest.raises(InputError, match=message):
        check.context(whole, max_length=CONTEXT, model="m")


@given(
    prompt=st.integers(1, 40), first=st.integers(1, 40), other=st.integers(1, 40),
    room=st.integers(2, 50),
)  # fmt: skip
def test_cut_to_the_context_fits_and_keeps_what_it_can(prompt, first, other, room):
    given_prompt = [1, *range(10, 9 + prompt)]
    responses = [list(range(100, 100 + n)) for n in (first, other)]
    kept, cut = rows.cut_to_context(given_prompt, responses, room, begin=1)
    assert len(kept) + max(map(len, cut)) == min(room, prompt + max(first, other))
    assert len(kept) >= min(prompt, room // 2)
    for short, whole in zip(cut, responses, strict=True):
        assert short == whole[: len(short)]
        assert len(short) == min(len(whole), room - len(kept))


def test_a_program_says_what_it_cut_and_what_contradicts_itself(tiny, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise InputError("enough")

    monkeypatch.setattr(train, "fit", stop)
    one = {"prompt": "which? ", "chosen": "this", "rejected": "that"}
    other = {"prompt": "which? ", "chosen": "that", "rejected": "this"}
    records = [*pairs(6), one, other, *pairs(1, prompt="word " * 60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    text = io.StringIO()
    config = SftConfig(
        model=str(tiny), data=str(tmp_path / "a.jsonl"), output=tmp_path / "out", test_fraction=0.0
    )
    with pytest.raises(InputError, match="enough"):
        sft(config, console=Console(file=text, width=200))
    assert f"1 rows cut to the model's context of {CONTEXT} tokens" in text.getvalue()
    assert "2 of 9 rows are contradicted by another row of their prompt" in text.getvalue()


def test_options_that_a_prepared_folder_would_ignore_are_refused_by_name(refused, words, tmp_path):
    home = tmp_path / "prepared"
    prepare.build(pairs(20), words, home, max_length=CONTEXT, **LENGTHS)
    for options, message in {
        ("--max-prompt-length", 16): "--max-prompt-length 16: .*already with 32: leave",
        ("--max-response-length", 8): "--max-response-length 8: .*with 16",
        ("--columns.chosen", "good"): "--columns .*is prepared already",
        ("--split", "train"): "--split 'train': .*is prepared already: leave",
        ("--test-fraction", 0.5): "--test-fraction 0.5: .*already with 0.0",
        ("--control-tokens",): "--control-tokens True: .*already with False",
    }.items():
        assert re.search(message, refused("sft", home, *options))
    # What it was prepared with may be said again.
    (data,) = [prepare.load(home)]
    check.options(data, {"max_prompt_length": 32}, {"max_prompt_length": 512})


def test_prepared_rows_longer_than_the_context_are_refused(refused, words, tmp_path):
    home = tmp_path / "prepared"
    long = pairs(9, prompt="word " * 60)
    prepare.build(long, words, home, max_prompt_length=90, max_response_length=16)
    error = refused("sft", home)
    assert "9 of 9 rows are longer than the context of" in error
    assert f"--max-length {CONTEXT}" in error
