"""Weights from and to Hugging Face folders: ``config.json``, safetensors, tokenizer.

Reading is by slices: each device's part of each parameter is read from the (memory-mapped) files
when that device asks for it, so no host holds the model twice and no device holds what is not its
own. Pickled weights are refused, and no code from a model folder is ever run.
"""

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from jax_klrlhf.errors import InputError
from jax_klrlhf.models import partition, weights
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model

CAUSAL = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""The class in transformers that a saved folder names."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Loaded(NamedTuple):
    """What :func:`load` returns."""

    model: LanguageModel
    params: Any
    tokenizer: Any
    """A transformers tokenizer; None where the folder has none."""
    config: ModelConfig


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    mesh: Any = None,
    **overrides: Any,
) -> Loaded:
    """Model, parameters and tokenizer of a Hugging Face folder, or of a hub id.

    ``dtype`` is of activations (None: the file's own) and ``param_dtype`` of parameters (None: as
    ``dtype``). With a ``mesh`` every parameter is cut by :mod:`~jax_klrlhf.models.partition`, and
    activations are constrained to match. ``overrides`` set other fields of
    :class:`~jax_klrlhf.models.config.ModelConfig`, such as ``remat``.

    Raises ``InputError`` naming the folder, file, tensor or key, and the remedy.
    """
    folder = find(path)
    where = folder / "config.json"
    settings, files = read_json(where), Files(folder)
    if dtype is None:
        dtype = files.dtype()
    chosen = {"dtype": dtype, "param_dtype": dtype if param_dtype is None else param_dtype}
    config = ModelConfig.from_hf(settings, where=str(where), **chosen, **overrides)
    params = read_params(config, files, mesh=mesh)
    return Loaded(language_model(config), params, load_tokenizer(folder), config)


def find(path: str | os.PathLike[str]) -> Path:
    """The local folder of a path, or of a hub id such as ``Qwen/Qwen3-0.6B`` (downloaded once).

    Only configs, tokenizer files and safetensors are fetched.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = os.fspath(path)
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise InputError(f"{name}: no such folder; give a model folder or a hub id (owner/name)")
    import huggingface_hub  # Slow to import, and needed for hub ids only.

    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt"]
        )
    except Exception as error:
        # Everything from a bad name to no network arrives here, in a dozen exception classes.
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name}: neither a folder nor to be had from the Hugging Face hub ({reason}); check "
            "the name, log in if it is gated, or copy the model to a folder and give its path"
        ) from error
    return Path(found)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, None where it has none. Never runs the folder's own code."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer  # Slow to import.

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


class Files:
    """The safetensors of a folder, opened lazily: tensor name to slices."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self.file_of: dict[str, str] = dict(read_json(folder / INDEX)["weight_map"])
            missing = {f for f in self.file_of.values() if not (folder / f).is_file()}
            if missing:
                raise InputError(
                    f"{folder}: {INDEX} names {sorted(missing)[0]}, which is not there; copy or "
                    "download all shards"
                )
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

    def _reader(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safetensors.safe_open(str(self.folder / file), framework="np")
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(
                    f"{self.folder / file}: not a safetensors file ({error}); download it again"
                ) from error
        return self._open[file]

    def tensor(self, name: str) -> Any:
        """The tensor, sliced when indexed."""
        return self._reader(self.file_of[name]).get_slice(name)

    def dtype(self) -> Any:
        """The dtype of the largest tensor."""
        slices = [self.tensor(name) for name in self.file_of]
        largest = max(slices, key=lambda s: int(np.prod(s.get_shape())))
        return largest[tuple(slice(0, 1) for _ in largest.get_shape())].dtype


def read_params(config: ModelConfig, files: Files, *, mesh: Any = None) -> Any:
    """The parameters, each shard read straight to its device."""
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    table = weights.sources(config)
    if mesh is None:
        placed = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(_device()), shapes)
    else:
        placed = partition.shardings(shapes, mesh)

    def leaf(path, shape, sharding):
        source = _available(table[partition.path_name(path)], files)
        stacked = "{}" in source.name
        inner = shape.shape[1:] if stacked else shape.shape
        names = [source.name.format(i) for i in range(shape.shape[0] if stacked else 1)]
        expected = weights.disk_shape(source, inner)
        for name in names:
            if name not in files.file_of:
                raise InputError(
                    f"{files.folder}: tensor {name} is missing; the config asks for it "
                    f"(shape {list(expected)})"
                )
            found = tuple(files.tensor(name).get_shape())
            if found != expected:
                raise InputError(
                    f"{files.folder}: tensor {name} has shape {list(found)}, but the config asks "
                    f"for {list(expected)}"
                )

        def part(index):
            layers, rest = (index[0], index[1:]) if stacked else (slice(0, 1), index)
            read = [
                weights.read(files.tensor(name).__getitem__, source, inner, rest)
                for name in names[layers]
            ]
            whole = np.stack(read) if stacked else read[0]
            return whole.astype(shape.dtype)

        return jax.make_array_from_callback(shape.shape, sharding, part)

    return jax.tree_util.tree_map_with_path(leaf, shapes, placed)


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Any,
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a folder that transformers loads: ``config.json``, safetensors, tokenizer.

    The folder appears complete or not at all: it is written beside ``path`` and renamed; one that
    was there is replaced. With several hosts every process calls this and the first writes.
    """
    path = Path(path)
    with whole_folder(path) as partial:
        write_weights(partial, config, params, max_shard_bytes=max_shard_bytes)
        if jax.process_index() == 0:
            settings = config.to_hf() | {"architectures": [CAUSAL[config.family]]}
            (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
            if tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
    return path


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, renamed to ``path`` at the end: readers see all of it or nothing.

    What was at ``path`` is replaced. Of several processes only the first makes and renames it.
    """
    partial = path.with_name(f".{path.name}-new-{os.getpid()}")
    if jax.process_index() != 0:
        yield partial
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            old = path.with_name(f".{path.name}-old-{os.getpid()}")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def write_weights(
    folder: Path,
    config: ModelConfig,
    params: Any,
    *,
    max_shard_bytes: int,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write safetensors, with an index where there are several, one file in memory at a time.

    ``extra`` are tensors beside the decoder's, such as a reward head. Every process takes part in
    gathering, the first writes.
    """
    writes, extra = jax.process_index() == 0, dict(extra or {})
    leaves = {
        partition.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    # Tensor name -> its parts in order: one part each, save where GPT-2 fuses three.
    pieces: dict[str, list[tuple[int, weights.Source, Any, int | None]]] = defaultdict(list)
    for name, source in weights.sources(config).items():
        leaf = leaves[name]
        layers = range(leaf.shape[0]) if "{}" in source.name else [None]
        for layer in layers:
            pieces[source.name.format(layer)].append((source.part[0], source, leaf, layer))

    def size(name):
        if name in extra:
            return extra[name].nbytes
        leaves_of = [(leaf, layer) for _, _, leaf, layer in pieces[name]]
        return sum(x.nbytes // (1 if layer is None else x.shape[0]) for x, layer in leaves_of)

    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name in sorted({*pieces, *extra}):
        if shards[-1] and size(name) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size(name)
    index = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            index[name] = file
            if name in extra:
                tensors[name] = extra[name]
                continue
            parts = [
                weights.write(source, host(leaf if layer is None else leaf[layer]))
                for _, source, leaf, layer in sorted(pieces[name], key=lambda piece: piece[0])
            ]
            tensors[name] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if writes:
            write_tensors(folder / file, tensors)
    if writes and len(shards) > 1:
        total = sum(size(name) for name in index)
        listing = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(listing, indent=2) + "\n")


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, readable by all (the library makes it private)."""
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def host(x: Any) -> np.ndarray:
    """The whole array in host memory, gathered from other hosts where it lies there."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.ascontiguousarray(jax.device_get(x))


def _available(source: weights.Source, files: Files) -> weights.Source:
    """The source under the name the files have it by.

    Tied matrices are stored as either end, base models lack a prefix and the text part of a model
    with vision has a longer one.
    """
    ends = ("model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight")
    names = ends if source.name in ends[:2] else (source.name,)
    prefixes = ("model.", "transformer.", "language_model.model.", "model.language_model.", "")
    for name in (source.name, *names):
        family, _, rest = name.partition(".")
        others = [prefix + rest for prefix in prefixes] if family != "lm_head" else []
        for other in (name, *others, f"language_model.{name}"):
            if other.format(0) in files.file_of:
                return source._replace(name=other)
    return source


def _device() -> Any:
    return jax.local_devices()[0]


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; ``InputError`` naming it where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model folder holds config.json") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
