"""Rows as records of a TFDS data set: written in order, read at random, neither by slow paths.

TFDS can open what is written here: ArrayRecord files of ``tf.train.Example``, ``features.json`` and
``dataset_info.json``. Its own writer and reader take most of a preparation's time; here the same
protocol buffers are filled and read directly. Reading goes by the files alone: nothing that a
folder says of its features is believed, or run.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_klrlhf.data.rows import Row

DATASET = "preferences"
_SHARD = 100_000  # rows of one file
_FORMAT = "array_record"
_WRITTEN = "group_size:1,snappy"  # zstd makes ids no smaller, and takes as long as all the rest


class Writer:
    """Appends rows to the splits of a new data set in an empty folder."""

    def __init__(self, folder: Path, splits: Sequence[str]):
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._shards: dict[str, list[int]] = {name: [] for name in splits}
        self._bytes = dict.fromkeys(splits, 0)

    def add(self, split: str, row: Row) -> None:
        """One more row of a split."""
        shards = self._shards[split]
        if split not in self._files:
            import array_record.python.array_record_module as compiled

            module: Any = compiled
            path = self._folder / f"{DATASET}-{split}.{_FORMAT}-{len(shards):05d}"
            self._files[split] = module.ArrayRecordWriter(str(path), _WRITTEN)
            shards.append(0)
        content = to_bytes(row)
        self._files[split].write(content)
        self._bytes[split] += len(content)
        shards[-1] += 1
        if shards[-1] == _SHARD:
            self._files.pop(split).close()

    def close(self) -> None:
        """Finish the files and write what TFDS wants to know of them."""
        import tensorflow_datasets

        tfds: Any = tensorflow_datasets  # its names are lazy, beyond what a type checker follows
        for file in self._files.values():
            file.close()
        self._files = {}
        info = _info(self._folder)
        info.set_file_format(_FORMAT)
        info.set_splits(
            tfds.core.splits.SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=name,
                        shard_lengths=shards,
                        num_bytes=self._bytes[name],
                        filename_template=tfds.core.ShardedFileTemplate(
                            dataset_name=DATASET,
                            data_dir=self._folder,
                            split=name,
                            filetype_suffix=_FORMAT,
                            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
                        ),
                    )
                    for name, shards in self._shards.items()
                ]
            )
        )
        info.write_to_directory(self._folder)


def reader(folder: Path, split: str) -> tuple[int, Callable[[Sequence[int]], list[Row]]]:
    """The number of rows of a split, and row numbers to rows, safe to call from many threads.

    Both raise what ArrayRecord raises where files are damaged.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    paths = sorted(folder.glob(f"{DATASET}-{split}.{_FORMAT}-*"))
    if not paths:
        raise FileNotFoundError(f"no records of split {split!r}")
    source = ArrayRecordDataSource([str(path) for path in paths])
    # Imported here: TFDS is lazy, and two threads that import it at once may wait for each other
    # for ever (on Python 3.11, where ``cached_property`` has a lock).
    _example_type()

    def fetch(numbers: Sequence[int]) -> list[Row]:
        return [from_bytes(record) for record in source.__getitems__(list(numbers))]

    return len(source), fetch


def to_bytes(row: Row) -> bytes:
    """A row as a serialized ``tf.train.Example``."""
    example = _example_type()()
    feature = example.features.feature
    feature["prompt"].int64_list.value.extend(row.prompt)
    flat = feature["responses"].int64_list.value
    for response in row.responses:
        flat.extend(response)
    feature["responses"].int64_list.SetInParent()  # an empty list is there, too
    feature["response_lengths"].int64_list.value.extend(map(len, row.responses))
    feature["response_lengths"].int64_list.SetInParent()
    feature["number"].int64_list.value.append(row.number)
    example.MergeFromString(_rest(tuple(row.scores), row.label, row.weight))
    return example.SerializeToString()


def from_bytes(content: bytes) -> Row:
    """The row of a serialized ``tf.train.Example``."""
    feature = _example_type().FromString(content).features.feature
    flat = list(feature["responses"].int64_list.value)
    responses, begin = [], 0
    for length in feature["response_lengths"].int64_list.value:
        responses.append(flat[begin : begin + length])
        begin += length
    return Row(
        prompt=list(feature["prompt"].int64_list.value),
        responses=responses,
        scores=list(feature["scores"].float_list.value),
        label=feature["label"].float_list.value[0],
        weight=feature["weight"].float_list.value[0],
        number=feature["number"].int64_list.value[0],
    )


@functools.lru_cache(maxsize=1024)
def _rest(scores: tuple[float, ...], label: float, weight: float) -> bytes:
    """What most rows have in common, serialized."""
    example = _example_type()()
    feature = example.features.feature
    feature["scores"].float_list.value.extend(scores)
    feature["scores"].float_list.SetInParent()
    feature["label"].float_list.value.append(label)
    feature["weight"].float_list.value.append(weight)
    return example.SerializeToString()


@functools.cache
def _example_type() -> Any:
    """The protocol buffer, whose class is made at import."""
    from tensorflow_datasets.proto import tf_example_pb2

    module: Any = tf_example_pb2
    return module.Example


def _info(folder: Path) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    def vector(dtype: Any) -> Any:
        return tfds.features.Tensor(shape=(None,), dtype=dtype)

    identity: Any = DatasetIdentity(
        name=DATASET,
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
