"""A source prepared once: a TFDS data set of token rows in ArrayRecord files, and its manifest.

:func:`build` tokenizes a source into a folder that TFDS can open by itself
(``tfds.builder_from_directory(folder)``), without TensorFlow. Beside the records lie the lengths of
all rows, which batching needs at once, and ``prepared.json``: the *recipe* (hash of the source's
content, hash of the tokenizer, lengths, columns, split), the counts, and what was dropped and why.
A folder of the same recipe is reused; one of another recipe is refused by the name of what differs.

The folder appears whole or not at all: it is written beside its place and renamed. Of several
programs that prepare it at once one does, and the others wait for it. The manifest has a digest of
every file and of itself, so that a damaged folder is refused when it is opened.

Train and test have no prompt in common: a row's split is decided by a hash of its prompt's ids.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jax_klrlhf import folders
from jax_klrlhf.columns import Columns
from jax_klrlhf.data import buckets, records, tokenize
from jax_klrlhf.data.arrange import Arrangement, as_is
from jax_klrlhf.data.batch import Lengths, Loader, Own
from jax_klrlhf.data.facts import PLACES, Facts
from jax_klrlhf.data.messages import first_line, short
from jax_klrlhf.data.rows import Dropped, Row, encode
from jax_klrlhf.data.sources import Source, open_source
from jax_klrlhf.errors import InputError

_FORMAT = 2  # raised when the rules of tokenizing or the layout of the folder change
_MANIFEST = "prepared.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """One split of a prepared folder, at random access."""

    folder: Path
    split: str
    manifest: Mapping[str, Any]
    lengths: Lengths
    fetch: Callable[[Sequence[int]], list[Row]]
    """Row numbers to rows; safe to call from many threads."""

    def __len__(self) -> int:
        return len(self.lengths.prompts)

    @property
    def responses(self) -> int:
        """K: responses of a row, at most."""
        return self.lengths.responses.shape[1]

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the rows: source, tokenizer, lengths, split. Names a cache."""
        text = json.dumps([self.manifest["recipe"], self.split], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def loader(
        self,
        *,
        seed: int | None,
        token_budget: int | None = None,
        batch_size: int | None = None,
        max_shapes: int = 8,
        divisor: int = 1,
        multiple: int = 8,
        own: Own = np.arange,
    ) -> Loader:
        """Batches of this split; see :func:`buckets.fit` and :class:`Loader`."""
        shapes = buckets.fit(
            self.lengths.prompts,
            self.lengths.longest,
            responses=self.responses,
            max_shapes=max_shapes,
            token_budget=token_budget,
            batch_size=batch_size,
            divisor=divisor,
            multiple=multiple,
        )
        return Loader(
            self.fetch,
            self.lengths,
            shapes=shapes,
            seed=seed,
            own=own,
        )


def build(
    source: str | Path | Sequence[Mapping[str, Any]] | Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    max_prompt_length: int,
    max_response_length: int,
    max_length: int | None = None,
    control_tokens: bool = False,
    split: str | None = None,
    columns: Columns | None = None,
    arrange: Arrangement = as_is,
    test_fraction: float = 0.0,
    split_seed: int = 0,
) -> dict[str, Prepared]:
    """Prepare a source into a folder, or reuse the folder if it holds just that.

    Args:
        source: anything :func:`sources.open_source` accepts, or what it returns.
        tokenizer: of the model that will read the rows.
        folder: appears whole or not at all; its parent is made.
        max_prompt_length: tokens; longer prompts lose their beginning.
        max_response_length: tokens; longer responses lose their end.
        max_length: tokens of prompt and longest response together, the model's context; see
            :func:`rows.cut_to_context`.
        control_tokens: read control tokens in a text as such; see :mod:`tokenize`, rule 9.
        split: of the source, where it has several.
        columns: what the columns are called.
        arrange: examples to examples, of :mod:`arrange` or one's own: a function with a name, by
            which it is fingerprinted.
        test_fraction: share of the prompts that form the split ``test``.
        split_seed: another seed, another split.

    Returns the splits by name: ``train``, and ``test`` where asked for.

    Raises :class:`InputError` naming file, line and column of a bad record, or what differs between
    an existing folder and the request.
    """
    if not 0.0 <= test_fraction < 1.0:
        raise InputError(f"test_fraction {test_fraction}: a share of the prompts in [0, 1)")
    opened = source if isinstance(source, Source) else open_source(source, split=split)
    encoder = tokenize.encoder(tokenizer, control_tokens=control_tokens)
    named = columns or Columns()
    folder = Path(folder)
    recipe = {
        "format": _FORMAT,
        "source": opened.fingerprint(),
        "tokenizer": encoder.fingerprint(),
        "max_prompt_length": max_prompt_length,
        "max_response_length": max_response_length,
        "max_length": max_length,
        "control_tokens": control_tokens,
        "columns": asdict(named),
        "arrange": _name(arrange),
        "test_fraction": test_fraction,
        "split_seed": split_seed,
    }
    if not _is_prepared(folder):
        items = encode(
            encoder,
            arrange(opened.examples(columns=named)),
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            max_length=max_length,
        )
        manifest = {
            "recipe": recipe,
            "source": opened.name,
            "tokenizer": str(tokenizer.name_or_path),
            "vocab_size": encoder.vocab_size,
            "versions": _versions(),
        }
        _make(folder, items, manifest, test_fraction=test_fraction, split_seed=split_seed)
    found = _manifest(folder)
    _check_recipe(folder, found["recipe"], recipe)
    return {name: _open(folder, name, found) for name in found["splits"]}


def load(folder: str | Path, split: str = "train") -> Prepared:
    """Open a prepared folder, whatever it was prepared from.

    Raises :class:`InputError` where it is none, or has no such split.
    """
    found = _manifest(Path(folder))
    if split not in found["splits"]:
        raise InputError(
            f"{folder}: no split {split!r}; there are {', '.join(found['splits'])}: prepare it "
            "with test_fraction for a test split"
        )
    return _open(Path(folder), split, found)


def in_test_split(prompt: Sequence[int], *, test_fraction: float, split_seed: int) -> bool:
    """Whether a prompt belongs to the test split: by its ids alone, so duplicates stay together."""
    text = json.dumps([split_seed, list(prompt)]).encode()
    draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return draw < test_fraction


def _make(
    folder: Path,
    items: Iterator[Row | Dropped],
    manifest: Mapping[str, Any],
    *,
    test_fraction: float,
    split_seed: int,
) -> None:
    """Write the folder, unless another program does so at this time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folders.locked(folder.parent, name=f".{folder.name}.lock", wait=True):
            folders.sweep(folder)
            if _is_prepared(folder):
                return
            with folders.appearing(folder, replace=False) as partial:
                with _left_alone():
                    counts = _write(
                        partial, items, test_fraction=test_fraction, split_seed=split_seed
                    )
                whole = {**manifest, **counts, "files": _digests(partial)}
                whole["digest"] = _digest(whole)
                (partial / _MANIFEST).write_text(json.dumps(whole, indent=2) + "\n")
    except (OSError, _NotWritten) as error:
        raise InputError(
            f"{folder}: cannot be written ({first_line(error)}): make room, or give another folder"
        ) from error


def _write(
    folder: Path, items: Iterator[Row | Dropped], *, test_fraction: float, split_seed: int
) -> dict[str, Any]:
    """Records and lengths of all splits; returns the counts for the manifest."""
    splits = ["train", "test"] if test_fraction > 0 else ["train"]
    writer = records.Writer(folder, splits)
    lengths = {name: _Lengths() for name in splits}
    facts = {name: Facts() for name in splits}
    dropped: dict[str, dict[str, Any]] = {}
    cut = {"prompts": 0, "responses": 0, "to the context": 0}
    examples = 0
    for item in items:
        examples += 1
        if isinstance(item, Dropped):
            entry = dropped.setdefault(item.reason, {"count": 0, "first": []})
            entry["count"] += 1
            entry["first"] = [*entry["first"], item.where][:PLACES]
            continue
        testing = test_fraction > 0 and in_test_split(
            item.prompt, test_fraction=test_fraction, split_seed=split_seed
        )
        name = "test" if testing else "train"
        try:
            writer.add(name, item)
        except Exception as error:  # of ArrayRecord, where the disk is full
            raise _NotWritten(first_line(error)) from error
        lengths[name].add(item)
        facts[name].add(item)
        cut["prompts"] += item.lost[0] > 0
        cut["responses"] += item.lost[1] > 0
        cut["to the context"] += item.cut_to_context
    try:
        writer.close()
    except Exception as error:
        raise _NotWritten(first_line(error)) from error
    empty = [name for name in splits if not lengths[name].prompts]
    if empty:
        reasons = ", ".join(f"{entry['count']} {why}" for why, entry in dropped.items())
        raise InputError(
            f"split {empty[0]!r} would be empty: {examples} examples read, dropped: "
            f"{reasons or 'none'}; test_fraction {test_fraction}"
        )
    width = max(max(lengths[name].counts) for name in splits)
    for name in splits:
        prompts, responses = lengths[name].tables(width)
        np.savez(folder / f"lengths-{name}.npz", prompts=prompts, responses=responses)
    return {
        "examples": examples,
        "splits": {name: len(lengths[name].prompts) for name in splits},
        "dropped": dropped,
        "rows_with_cut": cut,
        "facts": {name: found.to_json() for name, found in facts.items()},
    }


@contextlib.contextmanager
def _left_alone() -> Iterator[None]:
    """Garbage is searched for a hundred times as seldom, and not in what stands now.

    Rows leave none, and JAX adds a search of its own to each of Python's.
    """
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100 * usual[0], *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


class _NotWritten(RuntimeError):
    """Records could not be written."""


class _Lengths:
    """Token counts of rows as they come, in 4 bytes each."""

    def __init__(self) -> None:
        self.prompts, self.counts, self._flat = array("i"), array("i"), array("i")

    def add(self, row: Row) -> None:
        self.prompts.append(len(row.prompt))
        self.counts.append(len(row.responses))
        self._flat.extend(map(len, row.responses))

    def tables(self, width: int) -> Lengths:
        """As arrays ``[rows]`` and ``[rows, width]``, 0 where a row has no further response."""
        counts = np.frombuffer(self.counts, np.int32)
        table = np.zeros((len(counts), width), np.int32)
        table[np.arange(width) < counts[:, None]] = np.frombuffer(self._flat, np.int32)
        return Lengths(np.array(self.prompts, np.int32), table)


def _digests(folder: Path, names: Sequence[str] | None = None) -> dict[str, str]:
    """SHA-256 of the files of a folder, by name."""
    found = {}
    for name in sorted(names or (path.name for path in folder.iterdir())):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, without its own digest."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("jax-klrlhf", "tokenizers", "transformers", "array-record"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found


def _open(folder: Path, split: str, manifest: Mapping[str, Any]) -> Prepared:
    remedy = "remove the folder and prepare it again"
    others = tuple(f"-{name}." for name in manifest["splits"] if name != split)
    expected = {
        name: digest
        for name, digest in manifest["files"].items()
        if not any(other in name for other in others)
    }
    try:
        found = _digests(folder, list(expected))
        changed = [name for name in expected if found[name] != expected[name]]
        if changed:
            raise ValueError(f"{changed[0]} is not what was written")
        count, read = records.reader(folder, split)
        with np.load(folder / f"lengths-{split}.npz") as saved:
            lengths = Lengths(saved["prompts"], saved["responses"])
        if not count == len(lengths.prompts) == len(lengths.responses) == manifest["splits"][split]:
            raise ValueError(f"split {split!r} has {count} records, {len(lengths.prompts)} lengths")
    except Exception as error:
        raise InputError(f"{folder}: damaged ({first_line(error)}): {remedy}") from error

    def fetch(numbers: Sequence[int]) -> list[Row]:
        try:
            return read(numbers)
        except Exception as error:  # it was whole when it was opened
            raise InputError(f"{folder}: damaged ({first_line(error)}): {remedy}") from error

    return Prepared(folder=folder, split=split, manifest=manifest, lengths=lengths, fetch=fetch)


def _is_prepared(folder: Path) -> bool:
    """False: nothing is there. Raises where something else is."""
    if (folder / _MANIFEST).is_file():
        return True
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(
            f"{folder}: not empty, and no prepared data set (no {_MANIFEST}): give another"
        )
    return False


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder}: not a prepared data set ({_MANIFEST}: {first_line(error)}): remove it and "
            "prepare it again"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
        raise InputError(f"{path}: no manifest of a prepared data set: prepare it again")
    if found["recipe"].get("format") != _FORMAT:
        raise InputError(
            f"{folder}: prepared by another version of this program (format "
            f"{short(found['recipe'].get('format'))}, now {_FORMAT}): remove the folder and "
            "prepare it again"
        )
    if found.get("digest") != _digest(found):
        raise InputError(f"{path}: damaged: remove the folder and prepare it again")
    return found


def _check_recipe(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differing = [key for key in asked if found.get(key) != asked[key]]
    if differing:
        pairs = ", ".join(
            f"{key} {_short(found.get(key))} (now {_short(asked[key])})" for key in differing
        )
        raise InputError(
            f"{folder}: prepared with another {pairs}: give another folder, or remove this one"
        )


def _name(function: Arrangement) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    if "<" in name:
        raise ValueError(f"arrange={name} has no name of its own: define it at the top of a module")
    return name


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) == 64 else text  # a hash
