"""Where preferences come from: files, folders, hub data sets, TFDS names; all as one stream.

``open_source(name)`` accepts

- a file: ``.jsonl``, ``.json`` (lines or one array), either with ``.gz``; ``.parquet``;
- a folder of such files, laid out as data sets on the Hugging Face hub are
  (``data/train-00000-of-00001.parquet``, ``train.jsonl``);
- a folder that holds a TFDS data set (``features.json``), or ``tfds:name`` for one in TFDS's
  own folder (``TFDS_DATA_DIR``), prepared with ``file_format="array_record"``;
- a hub id, ``owner/name`` or ``owner/name/subfolder``;
- a list of records, for data already in memory.

Only data is read: no script that comes with a data set is run.
"""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jax_klrlhf.columns import Columns
from jax_klrlhf.data import tfds_folder
from jax_klrlhf.data.examples import Example, parse
from jax_klrlhf.data.messages import first_line
from jax_klrlhf.errors import InputError

Record: TypeAlias = tuple[str, Mapping[str, Any]]
"""Place (file and line) and columns."""

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
_LINE = 64 * 2**20
_ARRAY = 512 * 2**20
_SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "eval", "evaluation")}
_SPLITS["validation"] = ("validation", "valid", "val", "dev")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Records that can be read again and again, and a hash of their content."""

    name: str
    records: Callable[[], Iterator[Record]]
    fingerprint: Callable[[], str]
    """SHA-256 of the content: equal content, equal hash, wherever it lies."""

    def examples(self, *, columns: Columns | None = None) -> Iterator[Example]:
        """The records, parsed; see :func:`examples.parse`."""
        named = columns or Columns()
        for where, record in self.records():
            yield parse(record, columns=named, where=where)


def open_source(
    source: str | Path | Sequence[Mapping[str, Any]], *, split: str | None = None
) -> Source:
    """Find a source by its name; nothing is parsed yet.

    `split` names one split of a folder, hub or TFDS data set; it is refused for a single file, and
    may be left out where there is one split only, or one called train.

    Raises :class:`InputError` where there is no such source, with what was looked for.
    """
    if not isinstance(source, str | Path):
        if split is not None:
            raise InputError(f"split {split!r} was asked of a list of records, which has none")
        return _in_memory(list(source))
    name = str(source)
    if name.startswith("tfds:"):
        return _tfds(name, split)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "prepared.json").is_file():
            raise InputError(f"{name} is already prepared: open it with prepare.load")
        if (path / "features.json").is_file():
            return _tfds(name, split)
        return _files(name, _split_files(path, split))
    if path.is_file():
        if split is not None:
            raise InputError(f"split {split!r} was asked of the single file {name}: leave it out")
        return _files(name, [path])
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", name) and not name.endswith(_SUFFIXES):
        return _hub(name, split)
    raise InputError(
        f"no data at {name!r}: give a file ({', '.join(_SUFFIXES)}), a folder of them, a hub id "
        "(owner/name) or tfds:name"
    )


def _in_memory(records: list[Mapping[str, Any]]) -> Source:
    def read() -> Iterator[Record]:
        for number, record in enumerate(records):
            yield f"record {number}", record

    def fingerprint() -> str:
        content = [dict(record) for record in records]
        try:
            text = json.dumps(content, sort_keys=True, default=_listed)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"records in memory: not data ({first_line(error)}): give text, numbers and lists"
            ) from error
        return hashlib.sha256(text.encode()).hexdigest()

    return Source(name="records in memory", records=read, fingerprint=fingerprint)


def _listed(value: Any) -> Any:
    """Arrays as the lists that they are read as."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a column")


def _files(name: str, paths: Sequence[Path]) -> Source:
    for path in paths:
        if not path.name.endswith(_SUFFIXES):
            raise InputError(f"{path}: not a format read here; give {', '.join(_SUFFIXES)}")

    def read() -> Iterator[Record]:
        for path in paths:
            yield from (_parquet if path.name.endswith(".parquet") else _json)(path)

    return Source(name=name, records=read, fingerprint=partial(hash_files, paths))


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of the content of files, in the given order; their names do not count."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, blank ones left out; ``.gz`` is unpacked.

    Raises :class:`InputError` naming the line that is not UTF-8, or too long to be one.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    _not_cut_to_nothing(path)
    number = 0
    try:
        with opened(path, "rb") as file:
            while line := file.readline(_LINE + 1):
                number += 1
                if len(line) > _LINE:
                    raise InputError(
                        f"{path}, line {number}: longer than {_LINE >> 20} MiB: is it one record a "
                        "line?"
                    )
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # a byte order mark is no content
                if line.strip():
                    yield number, line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}, byte {error.start + 1}: not readable as UTF-8 "
            f"({error.reason}): write the file anew as UTF-8"
        ) from error
    except _GZIP as error:
        raise InputError(
            f"{path}, after line {number}: not readable ({first_line(error)}): is it whole?"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror or error})") from error


def _not_cut_to_nothing(path: Path) -> None:
    """A gzip file of no bytes reads as an empty one, without a word from gzip."""
    if path.suffix == ".gz" and path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: not readable (it has no bytes): is it whole?")


def _json(path: Path) -> Iterator[Record]:
    _not_cut_to_nothing(path)
    if ".json" in path.suffixes and _begins_array(path):
        yield from _array(path)
        return
    for number, line in lines(path):
        where = f"{path}, line {number}"
        yield _object(_parsed(line, where, "one object a line is expected"), where)


def _begins_array(path: Path) -> bool:
    return next((line.lstrip().startswith("[") for _, line in lines(path)), False)


def _array(path: Path) -> Iterator[Record]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read(_ARRAY + 1)
            if len(content) > _ARRAY:
                raise InputError(
                    f"{path}: one array of more than {_ARRAY >> 20} MiB, which is held in memory "
                    "whole: write one object a line (.jsonl)"
                )
            text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {number}: not readable as UTF-8 ({error.reason} at byte {error.start}): "
            "write the file anew as UTF-8"
        ) from error
    except _GZIP as error:
        raise InputError(f"{path}: not readable ({first_line(error)}): is it whole?") from error
    items = _parsed(text, str(path), "the file begins as one array of objects", whole=True)
    for number, item in enumerate(items):
        yield _object(item, f"{path}, item {number}")


def _parsed(text: str, where: str, expected: str, *, whole: bool = False) -> Any:
    """JSON of a line, or of a whole file. Raises :class:`InputError` naming line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if whole else ""
        raise InputError(
            f"{where}{line}, column {error.colno}: not JSON ({error.msg}): {expected}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply to be data: {expected}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{where}: not readable ({first_line(error)}): {expected}") from error


def _object(item: Any, where: str) -> Record:
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected an object with columns, found {type(item).__name__}")
    return where, item


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                try:
                    records = batch.to_pylist()
                except UnicodeDecodeError:  # one by one, up to the one that it is
                    records = (batch.slice(k, 1).to_pylist()[0] for k in range(len(batch)))
                for record in records:
                    yield f"{path}, row {number}", record
                    number += 1
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, row {number}: a text is not readable as UTF-8 ({error.reason}): write the "
            "file anew"
        ) from error
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}, after row {number}: not readable as Parquet ({first_line(error)}): is it "
            "whole?"
        ) from error


def _split_files(folder: Path, split: str | None) -> list[Path]:
    """The files of one split in a folder laid out as on the hub."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name.endswith(_SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(_split_of(path.relative_to(folder)) or "train", []).append(path)
    if not groups:
        raise InputError(f"{folder}: no data file ({', '.join(_SUFFIXES)}) in this folder")
    if split is None:
        split = next(iter(groups)) if len(groups) == 1 else "train"
    if split not in groups:
        raise InputError(f"{folder}: no split {split!r}; there are {', '.join(sorted(groups))}")
    homes = sorted({str(path.parent.relative_to(folder)) for path in groups[split]})
    if len(homes) > 1:
        raise InputError(
            f"{folder}: split {split!r} lies in several subfolders ({', '.join(homes)}): name one "
            "of them"
        )
    return groups[split]


def _split_of(path: Path) -> str | None:
    """Split named by a path, as the hub reads it: a word of the file name, or of a folder."""
    for part in reversed(path.parts):
        words = re.split(r"[-_. ]", part.lower())
        for split, names in _SPLITS.items():
            if any(name in words for name in names):
                # train_sft and train_prefs of one data set are different splits
                stem = re.split(r"\.|-\d{5}-of-", part)[0].lower()
                return split if stem in names or not stem.startswith(names) else stem
    return None


def _hub(name: str, split: str | None) -> Source:
    import huggingface_hub

    owner, repository, *rest = name.split("/", 2)
    inside = rest[0].strip("/") + "/" if rest else ""
    try:
        folder = huggingface_hub.snapshot_download(
            f"{owner}/{repository}",
            repo_type="dataset",
            allow_patterns=[f"{inside}*{suffix}" for suffix in _SUFFIXES],
        )
    except Exception as error:  # no network, no such repository, not logged in, offline mode
        raise InputError(
            f"{name!r} is no file here, and as a hub data set it could not be had "
            f"({first_line(error)}): "
            "check the name and the network, or download it and give the folder"
        ) from error
    return _files(name, _split_files(Path(folder) / inside, split))


def _tfds(name: str, split: str | None) -> Source:
    given = name.startswith("tfds:")
    folder = tfds_folder.find(name.removeprefix("tfds:")) if given else Path(name).expanduser()
    builder = tfds_folder.open_builder(folder)
    splits = list(builder.info.splits)
    if split is None and splits:
        split = splits[0] if len(splits) == 1 else "train"
    if split not in splits:
        raise InputError(
            f"{name}: no split {split!r}; there are {', '.join(splits) or 'none: not prepared'}; "
            "prepare it with file_format='array_record'"
        )
    try:
        rows = builder.as_data_source(split=split)
    except Exception as error:  # tfrecord files, which need TensorFlow
        raise InputError(
            f"{name}: not readable at random access ({first_line(error)}): prepare it with "
            "file_format='array_record'"
        ) from error
    files = [Path(path) for path in builder.info.splits[split].filepaths]

    def read() -> Iterator[Record]:
        for number in range(len(rows)):
            where = f"{name}, split {split}, row {number}"
            try:
                record = _plain(rows[number])
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 ({error}): write it anew") from error
            except Exception as error:  # of TFDS, ArrayRecord and protocol buffers
                raise InputError(
                    f"{where}: not readable ({first_line(error)}): is the data set whole?"
                ) from error
            yield where, record

    return Source(name=name, records=read, fingerprint=partial(hash_files, files))


def _plain(value: Any) -> Any:
    """TFDS's bytes as text, its arrays as lists, its dicts of lists as lists of dicts."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        plain = {key: _plain(item) for key, item in value.items()}
        if {"role", "content"} <= set(plain) and isinstance(plain["role"], list):
            return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
