"""Configuration of the training programs: frozen records that a file holds and the shell sets.

Nothing heavy is imported here: a command's ``--help`` reads this alone.
"""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jax_klrlhf import defaults
from jax_klrlhf.columns import Columns
from jax_klrlhf.errors import InputError, meant
from jax_klrlhf.programs import options
from jax_klrlhf.programs.options import (
    Count,
    Number,
    Seed,
    Share,
    Unread,
    Weight,
    When,
    choose,
    default,
    family,
    not_negative,
)

Config = TypeVar("Config")
Layout = Literal["bucketed", "packed"]
_ADAMW = When("optimizer", "adamw")


# What may change between a run and its continuation: how often it reports, and on what it runs.
FREE = {
    "output", "log_every", "save_every", "evaluate_every", "keep", "tensorboard", "wandb",
    "max_skipped", "mesh", "processes", "profile", "compilation_cache", "kl_prompts", "kl_samples",
    "reference_cache",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Devices along each axis; one size may be -1 and takes the rest. By default as many as divide
    for fsdp, 16 at most, and what is left for data."""

    data: int | None = None
    fsdp: int | None = None
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Several hosts. Left alone, a TPU pod finds them out by itself with `auto`."""

    auto: bool = False
    """Ask the cluster's environment for all that follows."""
    coordinator: str | None = None
    """Address and port of process 0."""
    count: int = 1
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the training programs have in common."""

    model: str
    """Folder or hub id of the model to start from."""
    data: str
    """File (.jsonl, .jsonl.gz, .parquet), folder, hub id, tfds:name, or a prepared folder."""
    output: Path
    """Folder of the run. A run that was cut off goes on from it."""

    split: str | None = None
    """Split of the source, where it has several."""
    test_fraction: Share = 0.05
    """Share of the prompts held out for evaluation; 0 for none."""
    max_prompt_length: Count = 512
    """Tokens; a longer prompt loses its beginning."""
    max_response_length: Count = 512
    """Tokens; a longer response loses its end. Where both together exceed the model's context, the
    prompt gives first."""
    control_tokens: bool = False
    """Read control tokens such as ``<|im_end|>`` in the data's text as such, not as words: for data
    that were put in a chat template before."""
    columns: Columns = field(default_factory=Columns)
    """What the columns are called."""
    batch_size: Count = 64
    """Rows of a batch, over all devices."""
    token_budget: Count | None = None
    """Token slots of a batch instead: short rows then come in larger batches."""
    max_shapes: Count = 8
    """Bound on the batch shapes, each of which is compiled."""
    micro_batches: Count = 1
    """Pieces that a batch is cut into, one in memory at a time."""

    epochs: Number = 1.0
    steps: Count | None = None
    """Steps instead of epochs."""
    learning_rate: Number = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: Annotated[Weight, _ADAMW] = 0.0
    """Of adamw."""
    moments: Annotated[Literal["float32", "bfloat16"], _ADAMW] = "float32"
    """Of adamw, the first ones; the second, which change by a thousandth a step, stay float32."""
    clip: Number | None = 1.0
    """Largest norm of the gradient."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; master parameters and moments are float32."""
    remat: str | None = defaults.REMAT
    """What the backward pass recomputes: full, a policy of jax.checkpoint_policies, or None."""
    chunk: Count | None = None
    """Tokens projected on the vocabulary at one time, over all devices; by default what fills
    128 MiB of logits on each, 1024 at most."""
    mesh: MeshSizes = MeshSizes()
    processes: Processes = Processes()

    seed: Seed = 0
    log_every: Count = 10
    save_every: Count = 200
    evaluate_every: Count = 200
    keep: Count = 2
    """Checkpoints kept."""
    max_skipped: Count = 5
    """Updates in a row whose loss or gradient is not finite: so many stop the run."""
    tensorboard: bool = False
    wandb: str | None = None
    """Project to log to."""
    profile: bool = False
    """Leave a trace of a few steps, taken once they are compiled, in OUTPUT/profile (TensorBoard,
    Perfetto)."""
    compilation_cache: str = "auto"
    """Folder that keeps compiled programs for the next start; auto: one of the user's on
    accelerators, and none on a CPU; none."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Low-rank adaptation; the base is then the reference, without a second copy."""

    rank: int = 0
    """0 trains all parameters."""
    alpha: Number = 16.0
    targets: tuple[str, ...] = ("query", "key", "value", "out", "up", "gate", "down")
    merged: bool = True
    """Beside the adapter, write the whole model with the adapter in it: what every other command
    and transformers open."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(TrainingConfig):
    """Preference training: DPO and its relatives, against the model it starts from."""

    objective: str = "sigmoid"
    """Name of a loss in jax_klrlhf.core.objectives: sigmoid, ipo, hinge, simpo, ...; or
    module:function of your own, whose positional arguments are named like those of the losses there
    (chosen_log_ratio [B], ..., or scores), and which returns a loss [B]."""
    kl_coef: Number = 0.1
    """Strength of the KL regularization (beta of DPO, eta of Xiong et al.)."""
    options: dict[str, float] = field(default_factory=dict)
    """Further numbers of the objective, such as label_smoothing 0.1."""
    reference: Literal["cached", "live"] = "cached"
    """Reference log-probabilities: computed once and kept on disk, or in each step."""
    reference_cache: Path | None = None
    """File of the cache; in the run's folder by default."""
    layout: Layout = "bucketed"
    """packed: streams of tokens with next to no padding, a shape for each of max_shapes lengths;
    batch_size is then an average. bucketed: prompts and responses padded to max_shapes shapes."""
    lora: Adapter = Adapter()
    kl_prompts: Annotated[int, not_negative] = 32
    """Held-out prompts from which KL(policy || reference) is estimated; 0 for none."""
    kl_samples: int = 2
    """Responses drawn for each."""


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Supervised training on the first (chosen) response of each row."""

    learning_rate: Number = 1e-5
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` takes of the model's folder its config.json and tokenizer alone."""
    layout: Layout = "bucketed"
    """As in `klrlhf dpo`."""
    lora: Adapter = Adapter()


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Bradley-Terry reward model on preference pairs."""

    learning_rate: Number = 1e-5
    margin_coef: Weight = 0.0
    """Margin asked for per point of difference in the data's scores."""
    centring: Weight = 0.0
    """Weight of the square of a pair's summed rewards; 0.01 is usual."""


def read(path: Path, kind: type[Config], *, command: str | None = None) -> Config:
    """A configuration from JSON or YAML, as a run saved it or a person wrote it.

    A run saves the name of its ``command`` too, which must then be the one given.

    Raises:
        InputError: naming the file and the key that is unknown, missing or of the wrong type.
    """
    try:
        text = path.read_text()
        if path.suffix in (".yaml", ".yml"):
            import yaml

            found = yaml.safe_load(text)
        else:
            found = json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from None
    except Exception as error:  # yaml's own errors, without importing it to name them
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if isinstance(found, Mapping) and "command" in found:
        found = dict(found)
        theirs = found.pop("command")
        if command is not None and theirs != command:
            raise InputError(f"{path}: a configuration of klrlhf {theirs}, not of {command}.")
    return _build(found, kind, str(path))


def _build(found: Any, kind: Any, where: str) -> Any:
    """``found`` (plain JSON) as a value of the type ``kind``."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(found, Mapping):
            raise InputError(f"{where}: expected an object with keys, found {found!r}.")
        if (of := family(kind)) is not None:
            try:
                kind, found = choose(of, found)
            except Unread as error:
                raise InputError(f"{where}: {error}") from None
        hints = get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for key in found:
            if key not in fields:
                raise InputError(
                    f"{where}: unknown key {key!r}; there are {', '.join(fields)}"
                    f"{meant(str(key), fields)}"
                )
        for name, entry in fields.items():
            required = entry.default is dataclasses.MISSING
            if required and entry.default_factory is dataclasses.MISSING and name not in found:
                raise InputError(f"{where}: key {name!r} is missing.")
        return kind(**{k: _build(v, hints[k], f"{where}: {k}") for k, v in found.items()})
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if found is None and type(None) in inner:
            return None
        return _build(found, next(t for t in inner if t is not type(None)), where)
    if origin is Literal:
        if found not in inner:
            raise InputError(f"{where}: {found!r} is none of {', '.join(map(str, inner))}.")
        return found
    if origin is dict and isinstance(found, Mapping):
        return {key: _build(value, inner[1], f"{where}: {key}") for key, value in found.items()}
    if origin is tuple and isinstance(found, list | tuple):
        return tuple(_build(value, inner[0], where) for value in found)
    if kind is Path and isinstance(found, str):
        return Path(found)
    if kind is float and isinstance(found, int | float) and not isinstance(found, bool):
        return float(found)
    if isinstance(found, kind if isinstance(kind, type) else object) and not (
        kind is int and isinstance(found, bool)
    ):
        return found
    raise InputError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {found!r}.")


def check(config: TrainingConfig) -> None:
    """What no type says. Raises ``InputError`` naming the option."""
    options.check(config)
    if getattr(config, "kl_samples", 1) < 1:
        raise InputError("--kl-samples must be at least 1; --kl-prompts 0 leaves the KL out.")
    if config.steps is not None and config.epochs != default_of(type(config), "epochs"):
        raise InputError("--epochs: --steps says how long the run is; leave one of them out.")
    check_adapter(getattr(config, "lora", Adapter()))


def check_adapter(adapter: Adapter) -> None:
    """Raises ``InputError`` where an option of an adapter is out of range or read by nobody."""
    if adapter.rank < 0:
        raise InputError(f"--lora.rank is {adapter.rank}; 0 trains all parameters.")
    for entry in dataclasses.fields(Adapter):
        if adapter.rank == 0 and getattr(adapter, entry.name) != entry.default:
            name = "no-merged" if entry.name == "merged" else entry.name
            raise InputError(f"--lora.{name}: of an adapter; give --lora.rank, or leave it out.")


def default_of(kind: Any, name: str) -> Any:
    """The default of a configuration's field."""
    return default(next(f for f in dataclasses.fields(kind) if f.name == name))


def steps_of(config: TrainingConfig, steps_per_epoch: int) -> int:
    """Number of the last step."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(config.epochs * steps_per_epoch))
