"""What lies in a model folder, read with distrust: JSON, safetensors, nothing that could run.

A folder may be cut off, edited by hand, half downloaded, or made to harm. Whatever is wrong with it
is an ``InputError`` of one line, before any compute.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors

from jax_klrlhf.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights: safetensors' name, and NumPy's."""


class Files:
    """The safetensors of a folder, opened lazily: tensor name to slices."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self.file_of = self._listed()
        elif (folder / SINGLE).is_file():
            self.file_of = dict.fromkeys(self._reader(SINGLE).keys(), SINGLE)
        else:
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            remedy = (
                f"{pickled[0]} is pickled and is not opened, since that can run code: convert it "
                "with transformers' save_pretrained"
                if pickled
                else "a model folder holds config.json and safetensors"
            )
            raise InputError(f"{folder}: no {SINGLE} and no {INDEX}; {remedy}")
        if not self.file_of:
            raise InputError(f"{folder}: there is no tensor in it; download it again")

    def _listed(self) -> dict[str, str]:
        """Tensors and their files by the index, which must agree with what lies there."""
        where = self.folder / INDEX
        listed = read_json(where).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise InputError(f"{where}: no weight_map from tensors to files; download it again")
        for name in sorted(set(listed.values())):
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts or "\\" in name or "\0" in name:
                raise InputError(f"{where}: weight_map leads out of the folder, to {name!r}")
            if not (self.folder / name).is_file():
                raise InputError(
                    f"{self.folder}: {INDEX} names {name}, which is not there; copy or download "
                    "all shards"
                )
        there = {file: set(self._reader(file).keys()) for file in set(listed.values())}
        for name, file in listed.items():
            if name not in there[file]:
                raise InputError(f"{where}: tensor {name} is not in {file}; download both again")
        # Tensors that lie there unlisted are no secret: the reader refuses what is left over.
        return {name: file for file, names in there.items() for name in names} | listed

    def _reader(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safetensors.safe_open(str(self.folder / file), framework="np")
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(
                    f"{self.folder / file}: not a safetensors file ({_line(error)}); download it "
                    "again"
                ) from error
        return self._open[file]

    def tensor(self, name: str) -> Any:
        """The tensor, sliced when indexed.

        Raises ``InputError`` where it holds no floating point numbers.
        """
        found = self._reader(self.file_of[name]).get_slice(name)
        if found.get_dtype() not in FLOATS:
            raise InputError(
                f"{self.folder}: tensor {name} is of type {found.get_dtype()}, and weights are of "
                f"{', '.join(FLOATS)}; if it is quantized, give the model as it was before"
            )
        return found

    def dtype(self) -> Any:
        """The dtype of the largest tensor."""
        slices = [self._reader(file).get_slice(name) for name, file in self.file_of.items()]
        slices = [s for s in slices if s.get_dtype() in FLOATS] or [
            self.tensor(next(iter(self.file_of)))  # Refused, by name.
        ]
        largest = max(slices, key=lambda s: int(np.prod(s.get_shape(), dtype=np.float64)))
        import ml_dtypes

        name = FLOATS[largest.get_dtype()]
        return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; ``InputError`` naming it where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model folder holds config.json") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 (byte {error.start})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({_line(error)})") from None
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: holds {_KINDS.get(type(found), 'no object')}, not an object of settings"
        )
    return found


_KINDS = {list: "a list", str: "a string", type(None): "null", bool: "a truth value"}
_KINDS |= {int: "a number", float: "a number"}


def find_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, None where it has none. Never runs the folder's own code.

    Raises ``InputError`` naming the folder, where there is one that cannot be read.
    """
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() and not (folder / "tokenizer.json").is_file():
        return None
    if settings.is_file() and read_json(settings).get("auto_map"):
        raise InputError(
            f"{settings}: auto_map names a tokenizer's own code, which is never run; convert the "
            "tokenizer to a tokenizer.json and remove the key"
        )
    from transformers import AutoTokenizer  # Slow to import.

    try:
        return AutoTokenizer.from_pretrained(os.fspath(folder), trust_remote_code=False)
    except BaseException as error:
        # Of a dozen classes; a panic of the tokenizers library is not even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{folder}: its tokenizer cannot be read ({_line(error)}); copy or download "
            "tokenizer.json and tokenizer_config.json again"
        ) from error


def _line(error: BaseException) -> str:
    """The first line of what an error says, at a length that is read."""
    text = str(error).strip().splitlines() or [""]
    return (text[0] or type(error).__name__)[:300]
