"""Sources and prepared folders, broken on purpose: one line, or the same result.

The default part breaks a few things by seed; with ``KLRLHF_FAULTS=1`` the slow part breaks many. A
bit that flips in a file of plain text gives another text, which nobody can know; there it is enough
that nothing else than one line comes of what can no longer be read.
"""

import gzip
import json
import os
import shutil

import numpy as np
import pytest

from jax_klrlhf.data import prepare, rows, sources, tokenize
from jax_klrlhf.errors import InputError

SEEDS = range(40)
MANY = range(40, 2000)
slow = pytest.mark.skipif(
    not os.environ.get("KLRLHF_FAULTS"), reason="slow: set KLRLHF_FAULTS=1 to run it"
)
LENGTHS = {"max_prompt_length": 16, "max_response_length": 8}
RECORDS = [
    {"prompt": f"question {n}? é", "chosen": f" yes {n}", "rejected": " no", "weight": 0.5}
    for n in range(60)
]


def cut(random, content):
    return content[: random.integers(len(content))]


def flip(random, content):
    place = random.integers(len(content))
    return (
        content[:place] + bytes([content[place] ^ (1 << random.integers(8))]) + content[place + 1 :]
    )


def blank(random, content):
    begin = random.integers(len(content))
    length = min(int(random.integers(1, 64)), len(content) - begin)
    return content[:begin] + bytes(length) + content[begin + length :]


def drop(random, content):
    begin = random.integers(len(content))
    return content[:begin] + content[begin + random.integers(1, 64) :]


def repeat(random, content):
    begin, end = sorted(random.integers(len(content), size=2))
    return content[:end] + content[begin:]


DAMAGES = (cut, flip, blank, drop, repeat)


def damaged(seed, content):
    random = np.random.default_rng(seed)
    damage = DAMAGES[seed % len(DAMAGES)]
    return damage(random, content)


class Tally:
    """What came of many damages: how many were refused in one line, and what was wrong of it."""

    def __init__(self):
        self.tried, self.refused, self.wrong = 0, 0, []

    def outcome(self, read, *, what):
        """What was read, None where it was refused; anything else than one line is wrong."""
        self.tried += 1
        try:
            return read()
        except InputError as error:
            line = str(error)
            if "\n" in line or not 10 < len(line) < 1000:
                self.wrong.append((what, line))
        except Exception as error:
            self.wrong.append((what, repr(error)))
        self.refused += 1
        return None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [json.dumps(record) for record in RECORDS]
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenize.train_tokenizer(texts, vocab_size=300, folder=folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet

    home = tmp_path_factory.mktemp("files")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    (home / "a.jsonl").write_bytes(lines)
    (home / "a.json").write_bytes(json.dumps(RECORDS).encode())
    (home / "a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (home / "a.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode(), mtime=0))
    pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS), home / "a.parquet")
    return home


def examples(path):
    return list(sources.open_source(path).examples())


def break_sources(files, place, seeds):
    """A tally for each kind of file."""
    whole = {path.name: examples(path) for path in files.iterdir()}
    tallies = {name: Tally() for name in whole}
    for name in sorted(whole):
        content = (files / name).read_bytes()
        for seed in seeds:
            (place / name).write_bytes(damaged(seed, content))
            found = tallies[name].outcome(lambda name=name: examples(place / name), what=seed)
            if name.endswith(".gz") and found is not None:  # it has a checksum
                found = [e._replace(where="") for e in found]
                if found != [e._replace(where="") for e in whole[name]]:
                    tallies[name].wrong.append((seed, "another text"))
    return tallies


def test_broken_source_is_one_line_or_is_read(files, tmp_path):
    for name, tally in break_sources(files, tmp_path, SEEDS).items():
        assert tally.wrong == [], name
        assert tally.refused > tally.tried // 4, name  # it bites


@slow
def test_many_broken_sources(files, tmp_path):
    for name, tally in break_sources(files, tmp_path, MANY).items():
        assert tally.wrong == [], name


ODD = [
    None, True, 0, -1, 10**400, 1e39, 1e-320, float("nan"), float("inf"), "", " ", "\ud83d",
    "é" * 9, "</s>", [], [[]], [1, 2], [1, -1], [10**30], [None], ["a", None], [1.5], [True],
    ["a", ["b"]], {}, {"role": "user"}, [{}], [{"role": "user", "content": "a"}],
    [{"role": 1, "content": "a"}], [{"role": "user", "content": ["a"]}],
    [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "\ud83d"}], ["x"] * 500,
]  # fmt: skip
NAMES = ["prompt", "chosen", "rejected", "response", "responses", "scores", "ranks", "label"]
NAMES += ["weight"]


def odd_records(tokenizer, place, seeds):
    encoder = tokenize.encoder(tokenizer)
    tally = Tally()
    for seed in seeds:
        random = np.random.default_rng(seed)
        record = dict(RECORDS[0])
        for _ in range(random.integers(1, 4)):
            name = NAMES[random.integers(len(NAMES))]
            record[name] = ODD[random.integers(len(ODD))]
        if random.integers(2):
            record.pop(NAMES[random.integers(4)], None)
        path = place / "odd.jsonl"
        path.write_text(json.dumps(record) + "\n")
        found = tally.outcome(
            lambda: list(rows.encode(encoder, examples(place / "odd.jsonl"), **LENGTHS)), what=seed
        )
        for row in found or ():
            if isinstance(row, rows.Row):  # what is let in is finite in float32
                numbers = np.array([*row.scores, row.label, row.weight], np.float32)
                if not np.isfinite(numbers).all():
                    tally.wrong.append((seed, numbers))
    return tally


def test_values_of_wrong_types_are_one_line_or_rows(tokenizer, tmp_path):
    tally = odd_records(tokenizer, tmp_path, range(400))
    assert tally.wrong == []
    assert 20 < tally.refused < tally.tried - 20


@slow
def test_many_values_of_wrong_types(tokenizer, tmp_path):
    assert odd_records(tokenizer, tmp_path, range(400, 20_000)).wrong == []


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare.build(RECORDS, tokenizer, folder, test_fraction=0.3, **LENGTHS)
    return folder


def everything(folder):
    found = {}
    for name in ("train", "test"):
        data = prepare.load(folder, name)
        found[name] = data.fetch(range(len(data))), data.fingerprint, dict(data.manifest)
        for array in data.lengths:
            found[name] += (array.tolist(),)
    return found


def break_prepared(prepared, place, seeds):
    whole, tally = everything(prepared), Tally()
    for path in sorted(prepared.iterdir()):
        content = path.read_bytes()
        folder = shutil.copytree(prepared, place / path.stem / path.suffix.strip("."))
        for seed in seeds:
            (folder / path.name).write_bytes(damaged(seed, content))
            what = path.name, seed
            found = tally.outcome(lambda folder=folder: everything(folder), what=what)
            if found is not None and found != whole:
                tally.wrong.append((what, "other rows"))
        (folder / path.name).unlink()
        what = path.name, "removed"
        if tally.outcome(lambda folder=folder: everything(folder), what=what) is not None:
            tally.wrong.append((what, "not missed"))
    return tally


def test_broken_prepared_folder_is_one_line_or_the_same(prepared, tmp_path):
    tally = break_prepared(prepared, tmp_path, SEEDS)
    assert tally.wrong == []
    assert tally.refused > tally.tried * 0.9  # a flip in the manifest's white space is none


@slow
def test_many_broken_prepared_folders(prepared, tmp_path):
    assert break_prepared(prepared, tmp_path, MANY).wrong == []


def test_records_damaged_after_they_were_opened_are_one_line(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "data")
    data = prepare.load(folder)
    (path,) = folder.glob("*-train.array_record-*")
    content = path.read_bytes()
    tally = Tally()
    for seed in SEEDS:
        path.write_bytes(blank(np.random.default_rng(seed), content))
        tally.outcome(lambda: data.fetch(range(len(data))), what=seed)
    path.write_bytes(b"")
    tally.outcome(lambda: data.fetch(range(len(data))), what="emptied")
    assert tally.wrong == []
    assert tally.refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a prepared data set"),
        ("null", "no manifest"),
        ("[]", "no manifest"),
        ('{"recipe": []}', "no manifest"),
        ("[" * 100_000, "not a prepared data set"),
        ('{"recipe": {"format": 1}, "splits": {}}', r"another version .* \(format 1, now 2\)"),
        ('{"recipe": {"format": 2}, "splits": {"train": 5}}', "damaged"),
    ],
)
def test_manifest_that_is_none_is_one_line(prepared, tmp_path, text, message):
    folder = shutil.copytree(prepared, tmp_path / "data")
    (folder / "prepared.json").write_text(text)
    with pytest.raises(InputError, match=message):
        prepare.load(folder)


def test_full_disk_is_one_line_and_leaves_nothing(tokenizer, tmp_path):
    import resource
    import signal

    # A limit on the size of files stands in for a full disk: writing fails the same way.
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits, tally = resource.getrlimit(resource.RLIMIT_FSIZE), Tally()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        tally.outcome(
            lambda: prepare.build(RECORDS, tokenizer, tmp_path / "data", **LENGTHS), what="full"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert (tally.refused, tally.wrong) == (1, [])
    assert list(tmp_path.iterdir()) == []


def test_a_gzip_file_cut_to_nothing_is_refused(tmp_path):
    """gzip reads it as an empty file, without a word."""
    for name in ("a.json.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match="no bytes"):
            list(sources.open_source(str(tmp_path / name)).records())
