"""A source prepared once: a TFDS data set of token rows in ArrayRecord files, and its manifest.

:func:`build` tokenizes a source into a folder that TFDS can open by itself
(``tfds.builder_from_directory(folder)``), without TensorFlow. Beside the records lie the lengths of
all rows, which batching needs at once, and ``prepared.json``: the *recipe* (hash of the source's
content, hash of the tokenizer, lengths, columns, split), the counts, and what was dropped and why.
A folder of the same recipe is reused; one of another recipe is refused by the name of what differs.

The folder appears whole or not at all: it is written beside its place and renamed.

Train and test have no prompt in common: a row's split is decided by a hash of its prompt's ids.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jax_klrlhf.data import buckets, tokenize
from jax_klrlhf.data.arrange import Arrangement, as_is
from jax_klrlhf.data.batch import Lengths, Loader
from jax_klrlhf.data.examples import Columns
from jax_klrlhf.data.rows import Dropped, Row, encode
from jax_klrlhf.data.sources import Source, open_source
from jax_klrlhf.errors import InputError

_FORMAT = 1  # raised when the rules of tokenizing or the layout of the folder change
_MANIFEST = "prepared.json"
_CHUNK = 1000
_SHARD = 100_000  # rows of one ArrayRecord file
_PLACES = 5  # dropped examples named in the manifest, per reason


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
        process_index: int = 0,
        process_count: int = 1,
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
            process_index=process_index,
            process_count=process_count,
        )


def build(
    source: str | Path | Sequence[Mapping[str, Any]] | Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    max_prompt_length: int,
    max_response_length: int,
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
    encoder = tokenize.encoder(tokenizer)
    named = columns or Columns()
    folder = Path(folder)
    recipe = {
        "format": _FORMAT,
        "source": opened.fingerprint(),
        "tokenizer": encoder.fingerprint(),
        "max_prompt_length": max_prompt_length,
        "max_response_length": max_response_length,
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
        )
        with _appearing(folder) as temporary:
            counts = _write(temporary, items, test_fraction=test_fraction, split_seed=split_seed)
            manifest = {
                "recipe": recipe,
                "source": opened.name,
                "tokenizer": str(tokenizer.name_or_path),
                "vocab_size": encoder.vocab_size,
                **counts,
                "versions": {
                    name: version(name)
                    for name in ("jax-klrlhf", "tokenizers", "transformers", "tensorflow-datasets")
                },
            }
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
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


def _write(
    folder: Path, items: Iterator[Row | Dropped], *, test_fraction: float, split_seed: int
) -> dict[str, Any]:
    """Records and lengths of all splits; returns the counts for the manifest."""
    import tensorflow_datasets as tfds

    splits = ["train", "test"] if test_fraction > 0 else ["train"]
    writer = tfds.core.SequentialWriter(
        _info(folder), max_examples_per_shard=_SHARD, file_format="array_record"
    )
    writer.initialize_splits(splits)
    prompts: dict[str, list[int]] = {name: [] for name in splits}
    responses: dict[str, list[list[int]]] = {name: [] for name in splits}
    dropped: dict[str, dict[str, Any]] = {}
    cut = {"prompts": 0, "responses": 0}
    examples = 0
    while chunk := list(islice(items, _CHUNK)):
        records: dict[str, list[dict[str, Any]]] = {name: [] for name in splits}
        for item in chunk:
            examples += 1
            if isinstance(item, Dropped):
                entry = dropped.setdefault(item.reason, {"count": 0, "first": []})
                entry["count"] += 1
                entry["first"] = [*entry["first"], item.where][:_PLACES]
                continue
            testing = test_fraction > 0 and in_test_split(
                item.prompt, test_fraction=test_fraction, split_seed=split_seed
            )
            name = "test" if testing else "train"
            records[name].append(_record(item))
            prompts[name].append(len(item.prompt))
            responses[name].append([len(response) for response in item.responses])
            cut["prompts"] += item.lost[0] > 0
            cut["responses"] += item.lost[1] > 0
        writer.add_examples(records)
    writer.close_all()
    empty = [name for name in splits if not prompts[name]]
    if empty:
        reasons = ", ".join(f"{entry['count']} {why}" for why, entry in dropped.items())
        raise InputError(
            f"split {empty[0]!r} would be empty: {examples} examples read, dropped: "
            f"{reasons or 'none'}; test_fraction {test_fraction}"
        )
    width = max(len(row) for name in splits for row in responses[name])
    for name in splits:
        table = np.zeros((len(responses[name]), width), np.int32)
        for number, row in enumerate(responses[name]):
            table[number, : len(row)] = row
        np.savez(
            folder / f"lengths-{name}.npz",
            prompts=np.array(prompts[name], np.int32),
            responses=table,
        )
    return {
        "examples": examples,
        "splits": {name: len(prompts[name]) for name in splits},
        "dropped": dropped,
        "rows_with_cut": cut,
    }


def _info(folder: Path) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    def vector(dtype: Any) -> Any:
        return tfds.features.Tensor(shape=(None,), dtype=dtype)

    identity: Any = DatasetIdentity(
        name="preferences",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(folder),
        module_name=__name__,
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        description="Prompts with K responses each, in token ids, best response first.",
        features=tfds.features.FeaturesDict(
            {
                "prompt": vector(np.int32),
                "responses": vector(np.int32),  # all K, one after the other
                "response_lengths": vector(np.int32),
                "scores": vector(np.float32),
                "label": tfds.features.Scalar(np.float32),
                "weight": tfds.features.Scalar(np.float32),
                "number": tfds.features.Scalar(np.int64),
            }
        ),
        disable_shuffling=True,
    )


def _record(row: Row) -> dict[str, Any]:
    flat = [token for response in row.responses for token in response]
    return {
        "prompt": np.array(row.prompt, np.int32),
        "responses": np.array(flat, np.int32),
        "response_lengths": np.array([len(r) for r in row.responses], np.int32),
        "scores": np.array(row.scores, np.float32),
        "label": np.float32(row.label),
        "weight": np.float32(row.weight),
        "number": np.int64(row.number),
    }


def _row(record: Mapping[str, Any]) -> Row:
    ends = np.cumsum(record["response_lengths"])
    return Row(
        prompt=record["prompt"].tolist(),
        responses=[part.tolist() for part in np.split(record["responses"], ends)[:-1]],
        scores=record["scores"].tolist(),
        label=float(record["label"]),
        weight=float(record["weight"]),
        number=int(record["number"]),
    )


def _open(folder: Path, split: str, manifest: Mapping[str, Any]) -> Prepared:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(folder)
        records = builder.as_data_source(split=split)
        _row(records[len(records) - 1])  # a missing or torn file shows only when it is read
        with np.load(folder / f"lengths-{split}.npz") as saved:
            lengths = Lengths(saved["prompts"], saved["responses"])
    except Exception as error:
        raise InputError(
            f"{folder}: damaged ({error}): remove the folder and prepare it again"
        ) from error
    if not len(records) == len(lengths.prompts) == manifest["splits"][split]:
        raise InputError(
            f"{folder}: damaged: split {split!r} has {len(records)} records and "
            f"{len(lengths.prompts)} lengths, {manifest['splits'][split]} expected: remove the "
            "folder and prepare it again"
        )

    def fetch(numbers: Sequence[int]) -> list[Row]:
        return [_row(record) for record in records.__getitems__(list(numbers))]

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
    try:
        found = json.loads((folder / _MANIFEST).read_text())
        if not {"recipe", "splits"} <= found.keys():
            raise ValueError("recipe or splits missing")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: not a prepared data set ({_MANIFEST}: {error}): prepare it first"
        ) from error
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


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the given place once it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are private
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process was first: its folder is checked against the recipe like any other.
            if not (folder / _MANIFEST).is_file():
                raise
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
