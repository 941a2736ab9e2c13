"""Weights from and to Hugging Face folders: ``config.json``, safetensors, tokenizer.

Reading is by slices: each device's part of each parameter is read from the (memory-mapped) files
when that device asks for it, so no host holds the model twice and no device holds what is not its
own. Pickled weights are refused, and no code from a model folder is ever run.
"""

import contextlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jax_klrlhf import folders, placement
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import files, partition, quantized, weights
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.files import INDEX, SINGLE, Files, read_json
from jax_klrlhf.models.transformer import language_model

log = logging.getLogger(__name__)

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
GENERATION = "generation_config.json"
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|vision_tower\..*|"
    r"(model\.)?multi_modal_projector\..*|model\.vision_tower\..*)"
)
"""Tensors that no decoder here needs: constants that older files store, and Gemma 3's eyes."""


class Loaded(NamedTuple):
    """What :func:`load` returns."""

    model: LanguageModel
    params: Any
    tokenizer: Any
    """A transformers tokenizer; None where the folder has none."""
    config: ModelConfig
    generation: Mapping[str, Any] | None = None
    """Settings of ``generation_config.json`` (the tokens that end a response, for one), or those
    that transformers derives from ``config.json`` where there is none. They are saved along."""


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    mesh: Any = None,
    weights: Literal["float", "int8"] = "float",
    **overrides: Any,
) -> Loaded:
    """Model, parameters and tokenizer of a Hugging Face folder, or of a hub id.

    ``dtype`` is of activations and products. None chooses by the device, not by the file: float32
    on CPU, where bfloat16 is slower and a sampler and a scorer that round it in different places
    disagree by tenths of a nat over a response; bfloat16 on accelerators. ``param_dtype`` is of
    parameters; None is ``dtype`` where that is given, else the file's own, widened to ``dtype``.

    With a ``mesh`` every parameter is cut by :mod:`~jax_klrlhf.models.partition`, and activations
    are constrained to match. ``overrides`` set other fields of
    :class:`~jax_klrlhf.models.config.ModelConfig`, such as ``remat``.

    ``weights="int8"`` makes each parameter :mod:`~jax_klrlhf.models.quantized` as it is read, for
    sampling and scoring alone: one of them is held at full width at a time.

    Raises ``InputError`` naming the folder, file, tensor or key, and the remedy.
    """
    return read(
        path, dtype=dtype, param_dtype=param_dtype, mesh=mesh, heads=(), eight=weights == "int8",
        **overrides,
    )  # fmt: skip


def read(
    path: str | os.PathLike[str],
    *,
    dtype: Any,
    param_dtype: Any,
    mesh: Any,
    heads: Collection[str],
    eight: bool = False,
    **overrides: Any,
) -> Loaded:
    """:func:`load`, of a folder that holds the tensors ``heads`` beside the decoder's."""
    folder = find(path)
    where = folder / "config.json"
    settings, found = read_json(where), Files(folder)
    chosen = dtypes(found.dtype(), dtype=dtype, param_dtype=param_dtype)
    config = ModelConfig.from_hf(settings, where=str(where), **chosen, **overrides)
    tokenizer = load_tokenizer(folder)
    generation = generation_settings(folder, settings)
    params = read_params(config, found, mesh=mesh, heads=heads, eight=eight)
    if config.dtype != found.dtype():
        log.info("%s: computed in %s; the file is %s", folder, config.dtype, found.dtype())
    return Loaded(language_model(config), params, tokenizer, config, generation)


def dtypes(stored: Any, *, dtype: Any = None, param_dtype: Any = None) -> dict[str, Any]:
    """``dtype`` and ``param_dtype`` of :func:`load`, for a file of ``stored``."""
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        if param_dtype is None:
            # float16 and bfloat16 hold neither the other's range nor its digits.
            kept = [np.dtype(x) for x in (stored, dtype)]
            sizes = [x.itemsize for x in kept]
            equal = sizes[0] == sizes[1] and kept[0] != kept[1]
            wider = np.dtype(np.float32) if equal else kept[sizes.index(max(sizes))]
            param_dtype = jax.dtypes.canonicalize_dtype(wider)
    return {"dtype": dtype, "param_dtype": dtype if param_dtype is None else param_dtype}


def generation_settings(folder: Path, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What transformers' ``generate`` goes by: ``generation_config.json``, else ``config.json``.

    None where neither says anything. Raises ``InputError`` where the file is damaged.
    """
    path = folder / GENERATION
    if path.is_file():
        return read_json(path)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: settings[key] for key in ids if settings.get(key) is not None} or None


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


load_tokenizer = files.find_tokenizer


def read_params(
    config: ModelConfig,
    files: Files,
    *,
    mesh: Any = None,
    heads: Collection[str] = (),
    eight: bool = False,
) -> Any:
    """The parameters, each shard read straight to its device; with ``eight``, in eight bits.

    Raises ``InputError`` naming the tensor that is missing, of another shape or type, not finite,
    or left over: a tensor that nothing reads, ``heads`` aside, says that the config is not that of
    these weights.
    """
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
            used.add(name)
            found = tuple(files.tensor(name).get_shape())
            if found != expected:
                raise InputError(
                    f"{files.folder}: tensor {name} has shape {list(found)}, but the config asks "
                    f"for {list(expected)}"
                )

        def part(index):
            layers, rest = (index[0], index[1:]) if stacked else (slice(0, 1), index)
            read = [finite(name, source, inner, rest, shape.dtype) for name in names[layers]]
            return np.stack(read) if stacked else read[0]

        return lambda: jax.make_array_from_callback(shape.shape, sharding, part)

    def finite(name, source, inner, rest, dtype):
        with np.errstate(over="ignore", invalid="ignore"):
            found = weights.read(files.tensor(name).__getitem__, source, inner, rest).astype(dtype)
        if not np.isfinite(found).all():
            raise InputError(
                f"{files.folder}: tensor {name} has numbers that are not finite in "
                f"{jnp.dtype(dtype)}; the file is damaged, or its training diverged"
            )
        return found

    used: set[str] = set()
    makers = jax.tree_util.tree_map_with_path(leaf, shapes, placed)
    _refuse_left_over(config, files, used | set(heads))
    # Every name and shape was looked at before the first byte of a weight is read.
    if eight:
        return quantized.weights(makers, made=lambda make: make())
    return jax.tree.map(lambda make: make(), makers)


def _refuse_left_over(config: ModelConfig, files: Files, used: set[str]) -> None:
    left = {name for name in files.file_of if name not in used and not BUFFERS.fullmatch(name)}
    ends = {name for name in left if name.endswith(("lm_head.weight", *EMBEDDINGS))}
    if config.tied and ends:
        # transformers ties the two ends only if they are the same numbers.
        other = next(name for name in used if name.endswith(("lm_head.weight", *EMBEDDINGS)))
        for name in ends:
            mine, theirs = files.tensor(name), files.tensor(other)
            same = mine.get_shape() == theirs.get_shape()
            if not same or not np.array_equal(mine[:], theirs[:]):
                raise InputError(
                    f"{files.folder}: config.json ties {name} to {other}, but they are different "
                    'numbers; set "tie_word_embeddings": false'
                )
    if left - ends or (ends and not config.tied):
        name = min(left - ends or ends)
        raise InputError(
            f"{files.folder}: tensor {name} is read by nothing that config.json asks for; is this "
            "the config of these weights?"
        )


EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Any,
    tokenizer: Any = None,
    *,
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a folder that transformers loads: ``config.json``, safetensors, tokenizer.

    ``generation`` becomes ``generation_config.json``: hand on that of :class:`Loaded`, or the saved
    model forgets at which tokens its responses end.

    The folder appears complete or not at all: it is written beside ``path`` and renamed; one that
    was there is replaced. With several hosts every process calls this and the first writes.

    Raises ``ValueError`` where the parameters are in eight bits, which are for sampling alone.
    """
    path = Path(path)
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params)):
        raise ValueError(
            f"{path}: the parameters are in eight bits, for sampling alone; save those that they "
            "were made from"
        )
    with whole_folder(path) as partial:
        write_weights(partial, config, params, max_shard_bytes=max_shard_bytes)
        if placement.leader():
            settings = config.to_hf() | {"architectures": [CAUSAL[config.family]]}
            settings |= token_ids(tokenizer, generation)
            (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
            if generation is not None:
                (partial / GENERATION).write_text(json.dumps(dict(generation), indent=2) + "\n")
            if tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
    return path


def token_ids(tokenizer: Any, generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Begin, end and pad tokens for a ``config.json``, in place of the family's defaults, which
    are those of some other tokenizer."""
    found = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found[key] = (generation or {}).get(key)
        if found[key] is None and tokenizer is not None:
            found[key] = getattr(tokenizer, key)
    return found


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, renamed to ``path`` at the end: readers see all of it or nothing.

    What was at ``path`` is replaced, and what killed programs left there half-written is removed.
    Of several processes only the first makes and renames it, and none goes on before it has.
    """
    if not placement.leader():
        yield folders.fresh_name(path)  # Nothing is written there.
        placement.meet(f"whole folder {path.name}")
        return
    folders.sweep(path)
    with folders.appearing(path) as partial:
        yield partial
    placement.meet(f"whole folder {path.name}")


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
    writes, extra = placement.leader(), dict(extra or {})
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
                weights.write(source, placement.host(leaf if layer is None else leaf[layer]))
                for _, source, leaf, layer in sorted(pieces[name], key=lambda piece: piece[0])
            ]
            if writes:  # The others only take part in gathering.
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
