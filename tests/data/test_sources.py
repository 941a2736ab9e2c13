"""Every place that preferences come from gives the same examples."""

import gzip
import json

import numpy as np
import pytest

from jax_klrlhf.data import sources
from jax_klrlhf.errors import InputError

RECORDS = [
    {"prompt": f"question {n}?", "chosen": f" yes {n} ü", "rejected": f" no {n}"} for n in range(5)
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"question {n}?"}],
        "chosen": [{"role": "assistant", "content": f"yes {n} ü"}],
        "rejected": [{"role": "assistant", "content": f"no {n}"}],
    }
    for n in range(5)
]


def write(path, records):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text(lines)
    return path


def write_tfds(folder, records, *, chat):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    text = tfds.features.Text()
    if chat:
        text = tfds.features.Sequence({"role": text, "content": text})
    folder.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(
            name=folder.parent.name,
            version=tfds.core.Version(folder.name),
            data_dir=str(folder),
            module_name=__name__,
        ),
        features=tfds.features.FeaturesDict(dict.fromkeys(records[0], text)),
    )
    writer = tfds.core.SequentialWriter(info, 2, file_format="array_record")
    writer.initialize_splits(["train", "test"])
    writer.add_examples({"train": records, "test": records[:1]})
    writer.close_all()
    return folder


def content(source):
    return [example._replace(where="") for example in source.examples()]


IN_MEMORY = content(sources.open_source(RECORDS))


@pytest.mark.parametrize("records", [RECORDS, CHATS], ids=["text", "chat"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_file_of_every_format(tmp_path, name, records):
    source = sources.open_source(write(tmp_path / name, records))
    assert content(source) == content(sources.open_source(records))
    assert content(source) == content(source)  # can be read again


@pytest.mark.parametrize("chat", [False, True])
def test_tfds_by_folder_and_by_name(tmp_path, chat):
    import tensorflow_datasets as tfds

    records = CHATS if chat else RECORDS
    name = f"preferences_{'chat' if chat else 'text'}"
    folder = write_tfds(tmp_path / name / "1.0.0", records, chat=chat)
    expected = content(sources.open_source(records))
    assert content(sources.open_source(folder)) == expected
    assert content(sources.open_source(folder, split="test")) == expected[:1]
    tfds.core.add_data_dir(tmp_path)
    assert content(sources.open_source(f"tfds:{name}")) == expected
    with pytest.raises(InputError, match=r"no split 'dev'; there are .*train"):
        sources.open_source(folder, split="dev")


def test_tfds_name_that_is_none(tmp_path):
    with pytest.raises(InputError, match="no TFDS data set 'tfds:no_such_thing'"):
        sources.open_source("tfds:no_such_thing")


@pytest.fixture
def hub_folder(tmp_path):
    """Laid out as `datasets` uploads it: two shards of one split, one of another."""
    write(tmp_path / "data" / "train-00000-of-00002.parquet", RECORDS[:3])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", RECORDS[3:])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", RECORDS[:1])
    (tmp_path / "README.md").write_text("card")
    return tmp_path


def test_folder_in_the_hubs_layout(hub_folder):
    assert content(sources.open_source(hub_folder)) == IN_MEMORY
    assert content(sources.open_source(hub_folder, split="test")) == IN_MEMORY[:1]
    with pytest.raises(InputError, match=r"no split 'validation'; there are test, train"):
        sources.open_source(hub_folder, split="validation")


def test_hub_id_read_from_the_hubs_own_cache(tmp_path, hub_folder, monkeypatch):
    # The cache as huggingface_hub leaves it, offline: refs name a snapshot, the snapshot the files.
    import huggingface_hub.constants

    cache = tmp_path / "cache"
    home = cache / "datasets--owner--name"
    (home / "snapshots").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    (hub_folder / "data").rename(home / "data")
    (home / "snapshots" / ("0" * 40)).mkdir()
    (home / "data").rename(home / "snapshots" / ("0" * 40) / "data")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert content(sources.open_source("owner/name")) == IN_MEMORY
    assert content(sources.open_source("owner/name/data", split="test")) == IN_MEMORY[:1]
    with pytest.raises(InputError, match=r"'owner/other' is no file here.*could not be had"):
        sources.open_source("owner/other")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("test.jsonl.gz", "test"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("data/train_prefs-00000-of-00001.parquet", "train_prefs"),
        ("test/part-0.parquet", "test"),
        ("my_dev.jsonl", "validation"),
        ("answers.jsonl", "train"),
    ],
)
def test_split_named_by_a_path(tmp_path, path, split):
    write(tmp_path / path, RECORDS)
    write(tmp_path / "elsewhere" / "unsupervised.jsonl", RECORDS[:1])
    if split == "train":
        (tmp_path / "elsewhere" / "unsupervised.jsonl").unlink()
    assert content(sources.open_source(tmp_path, split=split)) == IN_MEMORY


def test_split_in_several_subfolders_must_be_named(tmp_path):
    for part in ("harmless", "helpful"):
        write(tmp_path / part / "train.jsonl", RECORDS)
    with pytest.raises(InputError, match=r"several subfolders .harmless, helpful.*name one"):
        sources.open_source(tmp_path)
    assert content(sources.open_source(tmp_path / "helpful")) == IN_MEMORY


@pytest.mark.parametrize("start", ["\ufeff", "\n  ", "\ufeff\n"])
def test_byte_order_mark_and_blank_beginning_are_no_content(tmp_path, start):
    (tmp_path / "a.json").write_text(start + json.dumps(RECORDS))
    (tmp_path / "a.jsonl").write_text(start + "\r\n".join(map(json.dumps, RECORDS)))
    for name in ("a.json", "a.jsonl"):
        assert content(sources.open_source(tmp_path / name)) == IN_MEMORY


def test_fingerprint_is_of_the_content(tmp_path):
    one = sources.open_source(write(tmp_path / "a.jsonl", RECORDS)).fingerprint()
    assert sources.open_source(write(tmp_path / "b.jsonl", RECORDS)).fingerprint() == one
    assert sources.open_source(write(tmp_path / "a.jsonl", RECORDS[1:])).fingerprint() != one
    memory = sources.open_source(RECORDS).fingerprint()
    assert sources.open_source(RECORDS[::-1]).fingerprint() != memory


def scored(number):
    return f'{{"prompt": "p", "responses": ["a", "b"], "scores": [{number}, 0]}}'.encode()


def weighted(number):
    return f'{{"prompt": "p", "chosen": "a", "rejected": "b", "weight": {number}}}'.encode()


def damaged_gzip():
    random = np.random.default_rng(0)
    lines = b"".join(b'{"prompt": "%d"}\n' % n for n in random.integers(0, 10**9, 2000))
    packed = bytearray(gzip.compress(lines))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = bytes(40)
    return bytes(packed)


BAD = {
    "not JSON": (
        "a.jsonl",
        b'{"prompt": "p"}\n\n{"prompt": \n',
        r"a.jsonl, line 3, column 12: not",
    ),
    "not an object": ("a.jsonl", b'{"prompt": "p"}\n[1]\n', "line 2: expected an object.*list"),
    "bad array": ("a.json", b'[{"prompt": "p"},\n x]', "a.json, line 2, column 2: not JSON"),
    "array item": ("a.json", b'[{"prompt": "p"}, 3]', "a.json, item 1: expected an object"),
    "column": ("a.jsonl", b'{"prompt": "p"}\n{"chosen": "c"}\n', "line 2: column 'rejected'"),
    "not gzip": ("a.jsonl.gz", b"{}", "a.jsonl.gz, after line 0: not readable"),
    "torn gzip": ("a.jsonl.gz", gzip.compress(b'{"prompt": "p"}' * 99)[:-12], "is it whole"),
    "not UTF-8": ("a.jsonl", b'\n\n{"prompt": "\xff"}', "line 3, byte 13: not readable"),
    "not UTF-8 in an array": ("a.json", b'[\n{"prompt": "\xff"}]', "line 2: not readable as UTF-8"),
    "not Parquet": ("a.parquet", b"PAR1 nothing", "a.parquet, after row 0: not readable as"),
    "lone surrogate": ("a.jsonl", rb'{"prompt": "ab\ud83d"}', "'prompt'.*character 2 .*U.D83D"),
    "lone surrogate in a chat": (
        "a.jsonl",
        rb'{"prompt": [{"role": "user", "content": "a", "name": "\udc00"}]}',
        "line 1, column 'prompt': character 0 .*U.DC00",
    ),
    "nested": ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1: nested too deeply"),
    "nested array": ("a.json", b"[" * 100_000, "a.json: nested too deeply"),
    "score of 400 digits": ("a.jsonl", scored("1" * 400), "'scores': expected finite.*found 111"),
    "score of 5000 digits": ("a.jsonl", scored("1" * 5000), "line 1: not readable .*4300"),
    "score 1e300": ("a.jsonl", scored("1e300"), r"'scores': .*within 1e.30 of 0, found 1e.300"),
    "score NaN": ("a.jsonl", scored("NaN"), "'scores': expected finite numbers"),
    "weight 1e39": ("a.jsonl", weighted("1e39"), r"'weight': weight 1e.39 is out of range"),
    "weight 1e38": ("a.jsonl", weighted("1e38"), r"'weight': weight 1e.38 is out of range"),
    "weight 1e-50": ("a.jsonl", weighted("1e-50"), "'weight': weight 1e-50 is out of range"),
    "weight of 400 digits": ("a.jsonl", weighted("1" * 400), "'weight': expected a finite number"),
    "gzip damaged in the middle": (
        "a.jsonl.gz",
        damaged_gzip(),
        r"a.jsonl.gz, (after )?line [0-9]+",
    ),
    "array after a mark": ("a.json", b"\xef\xbb\xbf[{}", "a.json, line 1, column 4: not JSON"),
    "suffix": ("a.csv", b"prompt,chosen\n", "a.csv: not a format read here.*parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_with_its_line(tmp_path, name):
    file, data, message = BAD[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        list(sources.open_source(tmp_path / file).examples())
    assert "\n" not in str(caught.value)


def test_nothing_there_says_what_is_accepted(tmp_path):
    with pytest.raises(InputError, match=r"no data at .*absent.jsonl.*hub id.*tfds"):
        sources.open_source(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="no data file"):
        sources.open_source(tmp_path)


def test_split_of_what_has_none_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(InputError, match="single file"):
        sources.open_source(path, split="train")
    with pytest.raises(InputError, match="list of records"):
        sources.open_source(RECORDS, split="train")


def test_arrays_in_parquet_are_token_ids(tmp_path):
    ids = [{"prompt": [1, 2], "responses": [[3], [4, 5]], "scores": [0.0, 1.0]}]
    (example,) = sources.open_source(write(tmp_path / "a.parquet", ids)).examples()
    assert (example.prompt, example.responses) == ([1, 2], [[4, 5], [3]])
    assert np.all(np.diff(example.scores) <= 0)


def test_invalid_text_in_parquet_is_named_with_its_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    data = [b"fine"] * 1500 + [b"\xff\xfe"]
    text = pa.array(data, pa.binary()).view(pa.string())  # not validated, as other writers do
    pyarrow.parquet.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 1500: a text is not readable as UTF-8"):
        list(sources.open_source(tmp_path / "a.parquet").examples())


def test_line_too_long_to_be_one_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n' + "x" * 1001)
    records = sources.open_source(path).records()
    assert next(records)[1] == {"prompt": "p"}
    with pytest.raises(InputError, match=r"line 2: longer than .*one record a line"):
        next(records)
    monkeypatch.setattr(sources, "_ARRAY", 100)
    (tmp_path / "a.json").write_text("[" + '{"prompt": "p"},' * 60 + "{}]")
    with pytest.raises(InputError, match=r"held in memory whole"):
        list(sources.open_source(tmp_path / "a.json").records())


def test_long_column_names_are_cut_and_many_are_counted(tmp_path):
    record = {"x" * 100_000: 1, **{f"column {n}": n for n in range(500)}}
    with pytest.raises(InputError, match="and 489 more") as caught:
        list(sources.open_source([record]).examples())
    assert len(str(caught.value)) < 600


def test_records_in_memory_may_hold_arrays_and_odd_ones_are_refused():
    arrays = [{"prompt": np.array([1, 2]), "response": np.array([3])}]
    lists = [{"prompt": [1, 2], "response": [3]}]
    assert sources.open_source(arrays).fingerprint() == sources.open_source(lists).fingerprint()
    with pytest.raises(InputError, match="records in memory: not data"):
        sources.open_source([{"prompt": print}]).fingerprint()
    huge = {"prompt": "p", "responses": ["a", "b"], "scores": [10**5000, 0]}
    with pytest.raises(InputError, match="found a number of 16610 bits"):
        list(sources.open_source([huge]).examples())
