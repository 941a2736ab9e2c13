"""The facts of a data set, counted by hand on one that is small enough."""

import io
import tracemalloc

import numpy as np
import pytest
import tyro
from rich.console import Console

from jax_klrlhf.data import statistics
from jax_klrlhf.data.batch import Lengths
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs import data as program


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


def test_what_is_kept_of_rows_is_a_few_bytes_of_each():
    """Two million rows are described in 0.1 GB: nothing of their contents is kept."""
    count = 3000
    rows = (row([n] * 50, [n] * 50, [n, n + 1] * 25) for n in range(count))
    tracemalloc.start()
    got = statistics.describe(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (got.rows, got.prompts, got.duplicates) == (count, count, 0)
    # Four hashes and four lengths, arrays' room to grow, and a sorted copy of the hashes.
    assert peak < count * (4 * 8 + 4 * 4) * 1.5 + 50_000


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
    config = tyro.cli(program.DataConfig, args=[*arguments, *columns])
    text = io.StringIO()
    assert program.data(config, console=Console(file=text, width=200)) is None
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


def test_the_table_fits_eighty_columns_and_cuts_nothing(tmp_path):
    """Of a large data set with the longest of names."""
    most = statistics.LengthSummary(12345.6, 23456, 34567, 45678, 56789)
    text = dict.fromkeys(("prompt_length", "first_length", "other_length"), most)
    found = statistics.describe([row([1], [2], [3])])._replace(rows=12345678, ties=7654321, **text)
    place = str(tmp_path / "a-name-that-is-longer-than-the-column-it-stands-in.jsonl, line 1234567")
    reason = {"count": 123456, "first": [place]}
    manifest = {
        "source": place,
        "tokenizer": str(tmp_path),
        "facts": {name: {"description": found._asdict()} for name in ("train", "test")},
        "examples": 12345678,
        "rows_with_cut": {"prompts": 1, "responses": 2, "to the context": 3},
        "dropped": {"identical responses": reason},
    }
    none = Lengths(np.zeros(0, np.int32), np.zeros((0, 2), np.int32))
    splits = {
        name: Prepared(folder=tmp_path, split=name, manifest=manifest, lengths=none, fetch=list)
        for name in ("train", "test")
    }
    said = io.StringIO()
    Console(file=said, width=80).print(statistics.table(splits))
    assert max(map(len, said.getvalue().splitlines())) <= 80
    assert "…" not in said.getvalue()
    columns = [line.split("│")[1:4] for line in said.getvalue().splitlines() if "│" in line]
    words = ["".join(cell.strip() for cell in column) for column in zip(*columns, strict=True)]
    assert place.replace(" ", "") in words[1].replace(" ", "")
    for column in words[1:]:
        assert column.startswith("12345678")
        assert column.replace(" ", "").count("12345.6,23456,34567,45678,56789") == 3


def test_program_keeps_the_folder_it_is_given(byte_level, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(RECORDS.replace("good", "chosen").replace("bad", "rejected"))
    config = program.DataConfig(
        data=str(path), tokenizer=byte_level.name_or_path, output=tmp_path / "kept"
    )
    splits = program.data(config, console=Console(file=io.StringIO()))
    assert splits is not None
    assert len(splits["train"]) == 3
    assert (tmp_path / "kept" / "prepared.json").is_file()


def test_program_names_the_column_that_is_missing(byte_level, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(RECORDS.replace("good", "chosen"))
    config = program.DataConfig(data=str(path), tokenizer=byte_level.name_or_path)
    with pytest.raises(InputError, match=r"a.jsonl, line 1: column 'rejected' is missing"):
        program.data(config, console=Console(file=io.StringIO()))
