"""Folders in the layout of TFDS, opened without running anything that they name.

TFDS imports the module of every class that ``features.json`` names (or the features inside
``dataset_info.json``), so that a data folder could run code. Here these files are read first, and a
folder that names any class but TFDS's own features is refused. Data sets are found by name among
their files alone: no builder's code is imported, and none is fetched.
"""

import json
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from jax_klrlhf.data.messages import first_line, short
from jax_klrlhf.errors import InputError

_OWN = re.compile(r"tensorflow_datasets\.core\.features\.\w+\.\w+", re.ASCII)
_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?", re.ASCII)
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)", re.ASCII)
_CLASS = {"pythonClassName", "python_class_name"}
_LARGEST = 64 * 2**20


def open_builder(folder: Path) -> Any:
    """TFDS's read-only builder of a folder (its type is not one that a checker follows).

    Raises :class:`InputError` where a file of it names code, or files outside of the folder, and
    where TFDS finds something wrong.
    """
    for name in ("features.json", "dataset_info.json"):
        path = folder / name
        content = _read(path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected an object, found {short(content)}")
        # Words like `type` are names of classes in a description of features only.
        names = _class_names(content if name == "features.json" else content.get("features"))
        for given in (*names, *_class_names(content, words=_CLASS)):
            if not isinstance(given, str) or not _OWN.fullmatch(given):
                raise InputError(
                    f"{path}: names the class {short(given)}, whose code TFDS would run; only "
                    "tensorflow_datasets.core.features are read: give the data as JSON Lines, "
                    "Parquet, or with TFDS's own features"
                )
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(folder)
        paths = [Path(p) for split in builder.info.splits.values() for p in split.filepaths]
    except Exception as error:
        raise InputError(f"{folder}: no TFDS data set ({first_line(error)})") from error
    for path in paths:
        if path.parent.resolve() != folder.resolve():
            raise InputError(f"{folder}: names the file {path}, which lies elsewhere: move it here")
    return builder


def find(name: str) -> Path:
    """The folder of ``dataset``, ``dataset/config``, either with ``:1.2.3``; the newest version.

    Looked for in TFDS's folders: ``TFDS_DATA_DIR`` and those given to ``add_data_dir``. Raises
    :class:`InputError` where there is none, or several.
    """
    from tensorflow_datasets.core.utils import file_utils

    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{name!r} is no name of a TFDS data set: tfds:name/config:1.2.3")
    dataset, config, version = match.groups()
    homes = [Path(home) for home in file_utils.list_data_dirs()]
    found: list[Path] = []
    for home in homes:
        top = home / dataset
        places = [top / config] if config else [top, *sorted(p for p in _folders(top))]
        versions = [[p for p in _folders(place) if _is_version(p, version)] for place in places]
        found += [max(some, key=_number) for some in versions if some]
    if not found:
        raise InputError(
            f"no TFDS data set {'tfds:' + name!r} in {', '.join(map(str, homes))}: prepare it "
            "there, or give its folder"
        )
    if len(found) > 1:
        raise InputError(
            f"{'tfds:' + name!r} is {', '.join(map(str, found))}: give one of these folders"
        )
    return found[0]


def _folders(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from (path for path in place.iterdir() if path.is_dir())


def _is_version(folder: Path, version: str | None) -> bool:
    named = folder.name == version if version else _VERSION.fullmatch(folder.name) is not None
    return named and (folder / "features.json").is_file()


def _number(folder: Path) -> tuple[int, ...]:
    match = _VERSION.fullmatch(folder.name)
    return tuple(map(int, match.groups())) if match else ()


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path}: larger than {_LARGEST} bytes: no file of TFDS's is")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: is the data set whole?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({first_line(error)})") from error


def _class_names(content: Any, *, words: Set[str] = _CLASS | {"type"}) -> Iterator[Any]:
    """Whatever TFDS could take for a class, in JSON within text too."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                if key in _CLASS or (key in words and isinstance(item, str)):
                    yield item
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            try:
                waiting.append(json.loads(value))
            except RecursionError:
                yield value
            except ValueError:
                pass  # A description that begins with a bracket.
