"""The facts of a data set, counted by hand on one that is small enough."""

import io

import numpy as np
import pytest
import tyro
from rich.console import Console

from jax_klrlhf.data import statistics
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError


def row(prompt, *responses, scores=(1.0, 0.0)):
    return Row(prompt, list(responses), list(scores)[: len(responses)], 1.0, 1.0, 0)


def test_description_counted_by_hand():
    got = statistics.describe(
        [
            row([1, 2], [3, 4, 5], [6]),
            row([1, 2], [6], [3, 4, 5]),  # contradicts the first
            row([1, 2], [3, 4, 5], [6]),  # repeats the first
            row([1], [3], [4], scores=(1.0, 1.0)),
            row([1, 7], [3]),
            row([9]),
        ]
    )
    assert got.rows == 6
    assert got.prompts == 4
    assert got.responses == {0: 1, 1: 1, 2: 4}
    assert got.duplicates == 1
    assert got.contradictions == 3
    assert got.ties == 1
    assert got.prompt_length == statistics.LengthSummary(10 / 6, 2, 2, 2, 2)
    assert got.first_length == statistics.LengthSummary(9 / 5, 1, 3, 3, 3)
    assert got.other_length == statistics.LengthSummary(6 / 4, 1, 3, 3, 3)
    assert got.first_longer == 2 / 4
    assert got.first_shorter == 1 / 4


def test_same_tokens_parted_otherwise_are_no_duplicate():
    got = statistics.describe([row([1, 2], [3], [4]), row([1], [2, 3], [4])])
    assert (got.duplicates, got.prompts) == (0, 2)


def test_nothing_to_describe():
    got = statistics.describe([])
    assert got.rows == 0
    assert got.prompt_length is None
    assert got.first_longer is None


def test_quantiles_are_lengths_that_occur():
    values = np.arange(1, 101)
    assert statistics.length_summary(values) == statistics.LengthSummary(50.5, 50, 90, 99, 100)


RECORDS = "\n".join(
    [
        '{"prompt": "is it?", "good": " yes it is", "bad": " no"}',
        '{"prompt": "is it?", "good": " yes it is", "bad": " no"}',
        '{"prompt": "was it?", "good": " yes", "bad": " yes"}',
        '{"prompt": "will it be?", "good": " no", "bad": " yes it will"}',
    ]
)


def test_program_prints_counts_and_what_was_dropped(byte_level, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(RECORDS)
    arguments = ["--data", str(path), "--tokenizer", byte_level.name_or_path]
    columns = ["--columns.chosen", "good", "--columns.rejected", "bad"]
    config = tyro.cli(statistics.DataConfig, args=[*arguments, *columns])
    text = io.StringIO()
    assert statistics.main(config, console=Console(file=text, width=200)) is None
    lines = {
        line.split("│")[1].strip(): line for line in text.getvalue().splitlines() if "│" in line
    }
    assert " 3 " in lines["rows"]
    assert " 2 " in lines["different prompts"]
    assert " 1 " in lines["duplicate rows"]
    assert "66.7%" in lines["chosen longer"]
    assert "1 (first: " in lines["dropped: identical responses"]
    assert "line 3" in lines["dropped: identical responses"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]  # nothing kept unasked


def test_program_keeps_the_folder_it_is_given(byte_level, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(RECORDS.replace("good", "chosen").replace("bad", "rejected"))
    config = statistics.DataConfig(
        data=str(path), tokenizer=byte_level.name_or_path, output=tmp_path / "kept"
    )
    splits = statistics.main(config, console=Console(file=io.StringIO()))
    assert splits is not None
    assert len(splits["train"]) == 3
    assert (tmp_path / "kept" / "prepared.json").is_file()


def test_program_names_the_column_that_is_missing(byte_level, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(RECORDS.replace("good", "chosen"))
    config = statistics.DataConfig(data=str(path), tokenizer=byte_level.name_or_path)
    with pytest.raises(InputError, match=r"a.jsonl, line 1: column 'rejected' is missing"):
        statistics.main(config, console=Console(file=io.StringIO()))
