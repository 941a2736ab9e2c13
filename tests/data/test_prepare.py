"""A prepared folder: whole or absent, reused or refused, and what is read is what was written."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_klrlhf import folders
from jax_klrlhf.data import batch, prepare, rows, sources, tokenize
from jax_klrlhf.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [
    {"prompt": f"question {n % 7}?", "chosen": f" yes {n}", "rejected": f" no, not {n} times"}
    for n in range(40)
]
LENGTHS = {"max_prompt_length": 16, "max_response_length": 8}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out" / "prepared"


def encoded(tokenizer, records):
    items = rows.encode(
        tokenize.encoder(tokenizer), sources.open_source(records).examples(), **LENGTHS
    )
    return [item for item in items if isinstance(item, rows.Row)]


def test_what_reads_rows_imports_nothing(byte_level, folder):
    """Two threads that import what imports lazily can wait for each other for ever."""
    prepare.build(RECORDS, byte_level, folder, **LENGTHS)
    code = """
import sys
from pathlib import Path
from jax_klrlhf.data import records
path = Path(sys.argv[1])
_, fetch = records.reader(path, sys.argv[2])
before = set(sys.modules)
assert fetch([0])[0].prompt
print(sorted(set(sys.modules) - before))
"""
    (path,) = {file.parent for file in folder.rglob("*.array_record-*")}
    split = next(path.glob("*.array_record-*")).name.split("-")[1].split(".")[0]
    out = subprocess.run(
        [sys.executable, "-c", code, str(path), split],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stdout == "[]\n"


def test_rows_read_are_the_rows_written(byte_level, folder):
    records = [
        {"prompt": "p", "responses": [" a", " b", " c"], "scores": [1, 3, 2], "label": 0.75},
        {"prompt": "q", "chosen": " d", "rejected": " e", "weight": 0.5},
        {"prompt": "q", "chosen": " same", "rejected": " same"},
        {"prompt": "only"},
    ]
    (split,) = prepare.build(records, byte_level, folder, **LENGTHS).values()
    expected = [row._replace(lost=(0, 0), where="") for row in encoded(byte_level, records)]
    assert split.fetch([0, 1, 2]) == expected
    assert split.fetch([2, 0]) == [expected[2], expected[0]]  # random access
    assert split.responses == 3
    assert split.lengths.responses.tolist() == [
        [len(r) for r in row.responses] + [0] * (3 - len(row.responses)) for row in expected
    ]
    assert split.manifest["examples"] == 4
    assert split.manifest["dropped"] == {"identical responses": {"count": 1, "first": ["record 2"]}}


def test_folder_is_a_tfds_data_set_and_needs_no_tensorflow(byte_level, folder):
    import tensorflow_datasets as tfds

    prepare.build(RECORDS, byte_level, folder, **LENGTHS)
    data = tfds.builder_from_directory(folder).as_data_source(split="train")
    assert [record["number"] for record in data] == list(range(40))  # in order, not hash-shuffled
    assert "tensorflow" not in sys.modules


def test_batches_from_the_folder_are_those_from_memory(byte_level, folder):
    split = prepare.build(RECORDS, byte_level, folder, **LENGTHS)["train"]
    loader = split.loader(seed=3, token_budget=400)
    fetch, lengths = batch.from_rows(encoded(byte_level, RECORDS))
    memory = batch.Loader(fetch, lengths, shapes=loader.shapes, seed=3)
    stream = batch.Stream(loader)
    for step in range(loader.steps_per_epoch + 2):
        got, want = next(stream), memory[step]
        np.testing.assert_array_equal(got.prompts.ids, want.prompts.ids)
        np.testing.assert_array_equal(got.responses.ids, want.responses.ids)
        np.testing.assert_array_equal(got.row, want.row)


def test_same_recipe_is_reused_and_each_other_one_refused_by_name(byte_level, no_begin, folder):
    def build(records=RECORDS, tokenizer=byte_level, **changes):
        return prepare.build(records, tokenizer, folder, **{**LENGTHS, **changes})

    first = build()["train"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = build()["train"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert again.fingerprint == first.fingerprint
    for key, changes in {
        "max_prompt_length 16 .now 12.": {"max_prompt_length": 12},
        "max_response_length 8 .now 9.": {"max_response_length": 9},
        "source ": {"records": RECORDS[1:]},
        "tokenizer ": {"tokenizer": no_begin},
        "test_fraction 0.0 .now 0.5.": {"test_fraction": 0.5},
        "split_seed 0 .now 1.": {"split_seed": 1},
        "max_length None .now 20.": {"max_length": 20},
        "tokenizer .* control_tokens False .now True.": {"control_tokens": True},
        "columns ": {"columns": prepare.Columns(label="other")},
    }.items():
        with pytest.raises(InputError, match=f"prepared: prepared with another {key}"):
            build(**changes)


def test_fingerprint_tells_splits_and_recipes_apart(byte_level, tmp_path):
    one = prepare.build(RECORDS, byte_level, tmp_path / "a", test_fraction=0.5, **LENGTHS)
    two = prepare.build(RECORDS, byte_level, tmp_path / "b", test_fraction=0.5, **LENGTHS)
    three = prepare.build(RECORDS[1:], byte_level, tmp_path / "c", **LENGTHS)
    assert one["train"].fingerprint == two["train"].fingerprint  # of the content, not the place
    assert len({one["train"].fingerprint, one["test"].fingerprint, three["train"].fingerprint}) == 3


@given(fraction=st.sampled_from([0.3, 0.5]), seed=st.integers(0, 20))
def test_split_leaves_no_prompt_in_common(fraction, seed):
    prompts = [[1, n] for n in range(200)] * 2
    testing = [prepare.in_test_split(p, test_fraction=fraction, split_seed=seed) for p in prompts]
    assert testing[:200] == testing[200:]  # a repeated prompt stays on its side
    # A binomial count of 200: its standard deviation is at most 7.1, so 6 of them are 42. False
    # alarms over the 25 draws: below 25 x 2e-9.
    assert abs(sum(testing[:200]) - 200 * fraction) < 42


def test_split_in_the_folder_leaves_no_prompt_in_common(byte_level, folder):
    splits = prepare.build(RECORDS, byte_level, folder, test_fraction=0.5, **LENGTHS)
    prompts = {
        name: {tuple(row.prompt) for row in split.fetch(range(len(split)))}
        for name, split in splits.items()
    }
    assert not prompts["train"] & prompts["test"]
    assert sum(map(len, splits.values())) == 40
    assert len(prepare.load(folder, "test")) == len(splits["test"])


def test_failure_leaves_nothing_behind(byte_level, folder):
    bad = [*RECORDS, {"prompt": "p", "chosen": "c"}]
    with pytest.raises(InputError, match="record 40: column 'rejected'"):
        prepare.build(bad, byte_level, folder, **LENGTHS)
    assert list(folder.parent.iterdir()) == []
    prepare.build(RECORDS, byte_level, folder, **LENGTHS)
    assert [path.name for path in folder.parent.iterdir()] == ["prepared"]


def test_folder_appears_whole(byte_level, folder, monkeypatch):
    # At the moment of the rename everything is there; before it, nothing has the final name.
    seen = []

    def rename(source, target):
        assert not os.path.exists(target)
        seen.extend(sorted(os.listdir(source)))
        os.replace(source, target)

    monkeypatch.setattr(folders.os, "rename", rename)
    prepare.build(RECORDS, byte_level, folder, **LENGTHS)
    assert seen == sorted(path.name for path in folder.iterdir())
    assert "prepared.json" in seen


def counting(examples):
    passes.append(threading.get_ident())
    time.sleep(0.3)
    yield from examples


passes = []


def test_of_two_that_prepare_a_folder_at_once_one_does_and_both_have_it(byte_level, folder):
    passes.clear()
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(
                lambda _: prepare.build(RECORDS, byte_level, folder, arrange=counting, **LENGTHS),
                range(2),
            )
        )
    assert len(passes) == 1
    assert [len(splits["train"]) for splits in both] == [40, 40]
    assert [path.name for path in folder.parent.iterdir()] == ["prepared"]


def test_left_overs_of_a_killed_preparation_are_removed_at_the_next_start(byte_level, folder):
    code = f"""
import os
from jax_klrlhf.data import prepare, tokenize
def dying(examples):
    for number, example in enumerate(examples):
        if number == 20:
            os.kill(os.getpid(), 9)
        yield example
tokenizer = tokenize.load({byte_level.name_or_path!r})
records = {RECORDS!r}
prepare.build(records, tokenizer, {str(folder)!r}, arrange=dying, **{LENGTHS!r})
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert ended.returncode == -9, ended.stderr
    left = [path.name for path in folder.parent.iterdir()]
    assert any(name.startswith(".prepared.new-") for name in left)
    prepare.build(RECORDS, byte_level, folder, **LENGTHS)
    assert [path.name for path in folder.parent.iterdir()] == ["prepared"]


def test_folder_of_something_else_is_left_alone(byte_level, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty, and no prepared data set"):
        prepare.build(RECORDS, byte_level, tmp_path, **LENGTHS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_place_that_cannot_be_written_is_named(byte_level, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/prepared: cannot be written"):
        prepare.build(RECORDS, byte_level, tmp_path / "file" / "prepared", **LENGTHS)


def test_split_that_would_be_empty_says_why(byte_level, folder):
    same = [{"prompt": "p", "chosen": "a", "rejected": "a"}]
    with pytest.raises(InputError, match="1 examples read, dropped: 1 identical responses"):
        prepare.build(same, byte_level, folder, **LENGTHS)
    with pytest.raises(InputError, match="'test' would be empty"):
        prepare.build(RECORDS[:1], byte_level, folder, test_fraction=0.01, **LENGTHS)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_test_fraction_is_a_share(byte_level, folder, fraction):
    with pytest.raises(InputError, match=r"in .0, 1."):
        prepare.build(RECORDS, byte_level, folder, test_fraction=fraction, **LENGTHS)


@pytest.mark.parametrize("damage", ["lengths", "records", "manifest", "manifest text"])
def test_damaged_folder_is_refused_with_the_remedy(byte_level, folder, damage):
    prepare.build(RECORDS, byte_level, folder, **LENGTHS)
    if damage == "lengths":
        np.savez(folder / "lengths-train.npz", prompts=np.zeros(3), responses=np.zeros((3, 2)))
    elif damage == "records":
        next(folder.glob("*array_record*")).unlink()
    elif damage == "manifest":
        (folder / "prepared.json").unlink()
    else:
        (folder / "prepared.json").write_text(json.dumps({"recipe": {}}))
    with pytest.raises(InputError, match="prepare it"):
        prepare.load(folder)


def test_load_names_the_splits_there_are(byte_level, folder):
    prepare.build(RECORDS, byte_level, folder, **LENGTHS)
    with pytest.raises(InputError, match=r"no split 'test'; there are train"):
        prepare.load(folder, "test")


def test_prepared_folder_is_no_source(byte_level, folder):
    prepare.build(RECORDS, byte_level, folder, **LENGTHS)
    with pytest.raises(InputError, match="already prepared"):
        sources.open_source(folder)
