"""What every training program does: folder, mesh, data, loop, results.

A run's folder holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``data/`` (the prepared
data set), ``model/`` (the result, as Hugging Face would have it) and ``results.json``. Started
again with the same configuration, a run goes on from its last checkpoint.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jax_klrlhf import finished, folders, models, placement
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import check as suits
from jax_klrlhf.data import packing, prepare, statistics, tokenize
from jax_klrlhf.data.batch import Lengths, Loader, Stream
from jax_klrlhf.data.examples import Columns
from jax_klrlhf.data.packing import PackedLoader
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import LanguageModel, partition
from jax_klrlhf.programs.config import FREE, TrainingConfig, check, steps_of
from jax_klrlhf.results import Metric, output_folder, write_json, write_results
from jax_klrlhf.training import defaults, health, loop, metrics, optimizers, processes
from jax_klrlhf.training import evaluate as evaluation
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import state as states
from jax_klrlhf.training.checkpoint import Checkpoints
from jax_klrlhf.training.state import TrainState
from jax_klrlhf.training.step import make_step
from jax_klrlhf.training.tasks import Batch, PackedBatch, Task

T = TypeVar("T")


class Run(NamedTuple):
    """A run that has begun: its configuration, folder, devices and terminal."""

    config: Any
    name: str
    folder: Path
    mesh: Mesh | None
    console: Console

    @property
    def compute_dtype(self) -> Any:
        """What parameters are cast to in a step, or None."""
        return jnp.bfloat16 if self.config.dtype == "bfloat16" else None


class Splits(NamedTuple):
    """The data of a run."""

    train: Prepared
    held_out: Prepared | None
    encoder: tokenize.Encoder


def begin(config: TrainingConfig, name: str, console: Console | None) -> Run:
    """Join the processes, lay out the mesh, and claim the folder.

    Raises:
        InputError: where the folder cannot be written, or holds a run of another configuration.
    """
    check(config)
    processes.join(**dataclasses.asdict(config.processes))
    mesh = None
    if jax.device_count() > 1:
        try:
            mesh = meshes.make(**dataclasses.asdict(config.mesh))
        except ValueError as error:
            raise InputError(str(error)) from None
    folder = output_folder(config.output)
    hold(folder)
    run = Run(config, name, folder, mesh, console or Console(quiet=not placement.leader()))
    _claim(run)
    return run


_held: ContextVar[ExitStack | None] = ContextVar("held", default=None)


def alone(program: Callable[..., T]) -> Callable[..., T]:
    """A program of a configuration that has its folder to itself: it lets go of it at its end."""

    @wraps(program)
    def call(config: Any, *, console: Console | None = None) -> T:
        with ExitStack() as stack:
            token = _held.set(stack)
            try:
                return program(config, console=console)
            except Exception as error:
                if processes.lost(error):
                    processes.leave()
                raise
            finally:
                _held.reset(token)

    return call


def hold(folder: Path) -> None:
    """Take a run's folder, to the end of the program, and sweep up what killed ones left in it.

    Raises:
        InputError: naming the program that has it.
    """
    stack = _held.get()
    assert stack is not None, "a program that holds a folder is decorated with `alone`"

    def take() -> None:
        stack.enter_context(folders.locked(folder))
        for name in ("model", "adapter"):
            folders.sweep(folder / name, alone=True)

    placement.lead(take)


def _claim(run: Run) -> None:
    """Write the configuration, or see that the one that is there is the same.

    A finished run may be asked for more steps or epochs.
    """
    path = run.folder / "config.json"
    ours = {"command": run.name, **finished.plain(run.config)}
    if path.exists() and any((run.folder / "checkpoints").glob("[0-9]*")):
        theirs = _recorded(path)
        more = {"steps", "epochs"} if finished.read(run.folder) is not None else set()
        for key in sorted(ours.keys() - FREE - more):
            if theirs.get(key) != ours[key]:
                raise InputError(
                    f"{path}: this run was started with {key} {theirs.get(key)!r}, now it is "
                    f"{ours[key]!r}; give the same to go on with it, or another --output."
                )
    placement.lead(lambda: write_json(path, ours))


def _recorded(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON ({error}); name another --output.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not the configuration of a run; name another --output.")
    return found


def open_data(run: Run, loaded: models.Loaded, *, needs: Callable[[Prepared], None]) -> Splits:
    """The prepared data set: the one given, or one made in the run's folder.

    ``needs`` refuses data that the program cannot learn from: :func:`check.pairs` or
    :func:`check.responses`.

    Raises:
        InputError: naming file, line and column of what is wrong with the data.
    """
    config: TrainingConfig = run.config
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        raise InputError(f"{config.model}: the folder has no tokenizer, which data need.")
    source = Path(config.data).expanduser()
    given = (source / "prepared.json").is_file()
    if given:
        train = prepare.load(source, "train")
        splits = {"train": train}
        if "test" in train.manifest["splits"]:
            splits["test"] = prepare.load(source, "test")
        recipe = train.manifest["recipe"]
        encoder = tokenize.encoder(tokenizer, control_tokens=recipe["control_tokens"])
        if recipe["tokenizer"] != encoder.fingerprint():
            raise InputError(
                f"{config.data}: prepared with the tokenizer of {train.manifest['tokenizer']}, "
                f"another than {config.model}'s; prepare it again."
            )
        names = (
            "max_prompt_length", "max_response_length", "control_tokens", "test_fraction", "split",
            "columns",
        )  # fmt: skip
        asked, fields = finished.plain(config), {f.name: f for f in dataclasses.fields(config)}
        usual = {name: fields[name].default for name in names}
        usual["columns"] = dataclasses.asdict(Columns())
        suits.options(train, {name: asked[name] for name in names}, usual)
    else:
        encoder = tokenize.encoder(tokenizer, control_tokens=config.control_tokens)
        splits = prepare.build(
            config.data,
            tokenizer,
            run.folder / "data",
            max_prompt_length=config.max_prompt_length,
            max_response_length=config.max_response_length,
            max_length=model.max_length,
            control_tokens=config.control_tokens,
            split=config.split,
            columns=config.columns,
            test_fraction=config.test_fraction,
            split_seed=config.seed,
        )
    for data in splits.values():
        needs(data)
        suits.context(data, max_length=model.max_length, model=config.model)
        suits.vocabulary(data, vocab_size=model.vocab_size, model=config.model)
    _say(run, splits, given=given, context=model.max_length)
    return Splits(splits["train"], splits.get("test"), encoder)


def _say(run: Run, splits: Mapping[str, Prepared], *, given: bool, context: int) -> None:
    """What the preparation cut, and what contradicts itself."""
    manifest = splits["train"].manifest
    cut = manifest["rows_with_cut"]["to the context"]
    lines = (
        [f"{cut} rows cut to the model's context of {context} tokens"] if cut and not given else []
    )
    for name, data in splits.items():
        count = statistics.describe_prepared(data).contradictions
        if count:
            lines.append(
                f"{name}: {count} of {len(data)} rows are contradicted by another row of their "
                "prompt, which prefers the other response"
            )
    for line in lines:
        run.console.print(line, highlight=False, markup=False)


def loader(run: Run, data: Prepared, *, seed: int | None) -> Loader:
    """Batches of a split that divide over micro-batches and devices."""
    config: TrainingConfig = run.config
    parts = placement.parts(run.mesh)
    # Evaluation takes batches whole.
    divisor = parts * (config.micro_batches if seed is not None else 1)
    size = config.batch_size
    if seed is None:
        size = -(-min(size, len(data)) // divisor) * divisor
    elif config.token_budget is None and size % divisor:
        raise InputError(
            f"--batch-size {size} must be a multiple of {divisor}: {config.micro_batches} "
            f"micro-batches on {parts} parts of the mesh."
        )
    return data.loader(
        seed=seed,
        token_budget=config.token_budget,
        batch_size=size if config.token_budget is None else None,
        max_shapes=config.max_shapes,
        divisor=divisor,
        own=partial(placement.own_rows, run.mesh),
    )


def packed_loader(run: Run, data: Prepared, take: np.ndarray) -> PackedLoader:
    """Packed batches of a split, of the responses ``take [rows, K]`` of each row.

    Raises:
        InputError: where the token budget does not hold the longest row on each device.
    """
    config: TrainingConfig = run.config
    parts = placement.parts(run.mesh)
    rows = np.arange(len(data))[:, None]
    lengths = Lengths(data.lengths.prompts, data.lengths.responses[rows, take])

    def fetch(numbers: Sequence[int]) -> list[Row]:
        return [
            row._replace(
                responses=[row.responses[k] for k in take[number]],
                scores=[row.scores[k] for k in take[number]],
            )
            for number, row in zip(numbers, data.fetch(numbers), strict=True)
        ]

    layouts = packing.fit(
        lengths,
        streams=parts * config.micro_batches,
        token_budget=config.token_budget,
        batch_size=config.batch_size if config.token_budget is None else None,
        max_shapes=config.max_shapes,
    )
    return PackedLoader(
        fetch,
        lengths,
        layouts=layouts,
        seed=config.seed,
        own=partial(placement.own_rows, run.mesh),
    )


def whole_epoch(loaded: Loader) -> Iterator[Any]:
    """Every row once, in order of the loader."""
    return (loaded[step] for step in range(loaded.steps_per_epoch))


def pairs(batch: Any, table: np.ndarray | None = None) -> Batch:
    """A data batch for the training step: its best and its last response, and pi0's ``table``.

    Of K > 2 responses to a prompt the best and the worst are the pair.
    """
    take = best_and_worst(batch.responses.lengths)
    rows = np.arange(len(take))[:, None]
    ref_log_prob: Any = None if table is None else table[batch.row[:, None], take]
    return Batch(
        prompts=batch.prompts,
        responses=Ragged(batch.responses.ids[rows, take], batch.responses.lengths[rows, take]),
        weight=batch.weight,
        label=batch.label,
        ref_log_prob=ref_log_prob,
        scores=batch.scores[rows, take],
    )


def best_and_worst(lengths: np.ndarray) -> np.ndarray:
    """Numbers ``[rows, 2]`` of the first and the last response of each row that has tokens."""
    count = np.maximum((lengths > 0).sum(-1), 1)
    return np.stack([np.zeros_like(count), count - 1], -1)


def best(lengths: np.ndarray) -> np.ndarray:
    """Numbers ``[rows, 1]`` of the first response of each row: 0."""
    return np.zeros((len(lengths), 1), np.int64)


def packed(batch: packing.PackedBatch, table: np.ndarray | None = None) -> PackedBatch:
    """A packed data batch for the training step, and pi0's ``table`` of the responses in it."""
    given: Any = batch
    ref_log_prob: Any = None if table is None else table[batch.row]
    return PackedBatch(given.packed, given.weight, given.label, ref_log_prob, given.scores)


def firsts(batch: Any, table: np.ndarray | None = None) -> Batch:
    """A data batch for supervised training: its best response alone."""
    del table
    return Batch(
        prompts=batch.prompts,
        responses=Ragged(batch.responses.ids[:, :1], batch.responses.lengths[:, :1]),
        weight=batch.weight,
    )


class Feed:
    """A stream of data batches, made into training batches; its position is the stream's."""

    def __init__(self, stream: Stream, convert: Any):
        self._stream, self._convert = stream, convert

    def __next__(self) -> Batch | PackedBatch:
        """The next batch."""
        return self._convert(next(self._stream))

    def state(self) -> Any:
        """Position of the next batch."""
        return self._stream.state()

    def restore(self, state: Any) -> None:
        """Go on from a position."""
        self._stream.restore(state)


def make_optimizer(config: TrainingConfig, steps: int) -> tuple[Any, Any]:
    """The optimizer of a configuration, and its schedule."""
    decay = {"cosine": optimizers.cosine, "linear": optimizers.linear, "constant": None}
    rate = optimizers.schedule(
        config.learning_rate,
        warmup=int(config.warmup * steps),
        steps=steps,
        decay=decay[config.schedule],
    )
    if config.optimizer == "adafactor":
        return optimizers.adafactor(rate, clip=config.clip), rate
    return optimizers.adamw(rate, clip=config.clip, weight_decay=config.weight_decay), rate


def fit(
    run: Run,
    task: Task,
    params: Any,
    splits: Splits,
    convert: Any,
    *,
    picked: Callable[[np.ndarray], np.ndarray] = best_and_worst,
    tables: Sequence[np.ndarray | None] = (None, None),
    trainable: Any = None,
    live: bool = False,
    fingerprint: Any = None,
    more: Any = None,
) -> TrainState:
    """Train a task from ``params`` on, to the last step, and write the results.

    Args:
        run: from :func:`begin`.
        task: what is minimized.
        params: whole parameters at the start; used up, unless they are the live reference.
        splits: the data.
        convert: data batch and table of the reference to training batch.
        picked: which responses of a row the packed layout holds (:func:`best_and_worst`).
        tables: pi0's log-probabilities of the rows of each split.
        trainable: predicate on paths; all by default.
        live: keep ``params`` as the live reference.
        fingerprint: of pi0, where that is not ``params``.
        more: ``more(state) -> metrics`` besides those of the held-out split.

    Raises:
        loop.Stopped: where the run was stopped, with the reason.
    """
    config: TrainingConfig = run.config
    if getattr(config, "layout", "bucketed") == "packed":
        take = picked(splits.train.lengths.responses)
        source: Loader | PackedLoader = packed_loader(run, splits.train, take)
        table = None if tables[0] is None else tables[0][np.arange(len(take))[:, None], take]
        feed = partial(packed, table=table)
    else:
        source = loader(run, splits.train, seed=config.seed)
        feed = partial(convert, table=tables[0])
    steps = steps_of(config, source.steps_per_epoch)
    optimizer, rate = make_optimizer(config, steps)
    options = {
        "trainable": trainable,
        "ref_params": params if live else None,
        "fingerprint": fingerprint,
        # Whoever holds the loaded parameters holds no memory once training begins.
        "donate": not live,
    }
    key = jax.random.key(config.seed)
    shardings = None
    if run.mesh is None:
        state = states.init(key, params, optimizer, **options)
    else:
        state, shardings = meshes.init(
            key, params, optimizer, shardings=partition.shardings(params, run.mesh), **options
        )
    del params, options
    compiled = partial(make_step, micro_batches=config.micro_batches)(
        task, optimizer, compute_dtype=run.compute_dtype, shardings=shardings
    )
    score = evaluation.make_evaluate(task, compute_dtype=run.compute_dtype, shardings=shardings)

    def evaluate(state: TrainState) -> metrics.Metrics:
        found: metrics.Metrics = {}
        if splits.held_out is not None:
            held = whole_epoch(loader(run, splits.held_out, seed=None))
            found |= score(state, (convert(batch, tables[1]) for batch in held))
        return found | (more(state) if more is not None else {})

    store = Checkpoints(run.folder / "checkpoints", keep=config.keep)
    batches = Feed(Stream(source), feed)
    state, log = loop.resume(store, state, batches, console=run.console)
    first = int(state.step)
    if first > steps:
        raise InputError(
            f"{run.folder}: this run has taken {first} steps already, and is asked for {steps}; "
            "ask for more, or name another --output."
        )
    placement.lead(lambda: finished.unmark(run.folder))
    if first:
        run.console.print(f"going on from step {first} of {steps}", highlight=False)
    shown = {
        "perf/padding_fraction": source.padding_fraction,
        "rows": len(splits.train),
        "shapes": len(source.shapes),
    }
    run.console.print("  ".join(f"{k} {v:.4g}" for k, v in shown.items()), highlight=False)
    try:
        outcome = loop.train(
            compiled,
            state,
            batches,
            steps=steps,
            names=task.names,
            log_every=config.log_every,
            save_every=config.save_every,
            evaluate_every=config.evaluate_every,
            evaluate=None if splits.held_out is None and more is None else evaluate,
            checkpoints=store,
            config=finished.plain(config),
            sinks=_sinks(run, first),
            learning_rate=rate,
            limits=health.Limits(skipped=config.max_skipped),
            log=log,
            tokens=(splits.encoder.begin, splits.encoder.end),
            console=run.console,
        )
    finally:
        store.close()
    report(run, outcome.metrics, outcome.seconds)
    return outcome.state


def _sinks(run: Run, first: int) -> list[metrics.Sink]:
    if not placement.leader():
        return []
    sinks = [metrics.json_lines(run.folder / "metrics.jsonl", after=first)]
    if run.config.tensorboard:
        sinks.append(metrics.tensorboard(run.folder / "tensorboard"))
    if run.config.wandb is not None:
        config = finished.plain(run.config)
        sinks.append(metrics.wandb(run.folder, project=run.config.wandb, config=config))
    return sinks


def report(run: Run, found: metrics.Metrics, seconds: float) -> None:
    """Write ``results.json``: metrics named ``train/<method>/...`` and ``eval/<method>/...``."""
    method = getattr(run.config, "objective", run.name)
    named: dict[str, Metric] = {}
    for name, metric in found.items():
        panel, rest = ("eval", name[5:]) if name.startswith("eval/") else ("train", name)
        named[f"{panel}/{method}/{rest}"] = metric
    if placement.leader():
        write_results(
            run.folder,
            name=run.name,
            config=finished.plain(run.config),
            seeds=[run.config.seed],
            seconds=seconds,
            metrics=named,
        )


class Prompts(NamedTuple):
    """Prompts of the first batches of a loader."""

    batches: list[Ragged]
    """Of each batch this process's rows."""
    longest: int
    """Tokens of the longest of all processes' prompts."""


def first_prompts(loaded: Loader, count: int) -> Prompts:
    """Batches of at least ``count`` prompts in all (fewer where there are fewer).

    Counted over the global batches: every process takes as many, whatever its own rows are.
    """
    batches, total, longest = [], 0, 0
    for step in range(loaded.steps_per_epoch):
        if total >= count:
            break
        rows = loaded.piece(step).rows
        batches.append(loaded[step].prompts)
        total += len(rows)
        longest = max(longest, int(loaded.lengths.prompts[rows].max()))
    return Prompts(batches, longest)


def chunk(run: Run, model: LanguageModel) -> int:
    """Tokens projected on the vocabulary at one time: the configuration's, or the default."""
    parts = placement.parts(run.mesh)
    return run.config.chunk or defaults.chunk(model.vocab_size, parts=parts)


def optional(config: Any, *, frozen: bool = False) -> dict[str, Any]:
    """Loading options of a configuration; ``frozen`` for an adapter's base."""
    dtype = jnp.dtype(config.dtype)
    stored = defaults.base_dtype(dtype) if frozen else jnp.float32
    options: dict[str, Any] = {"param_dtype": stored, "dtype": dtype}
    return options | ({} if config.remat is None else {"remat": config.remat})


def close(run: Run, left: str) -> None:
    """The run is finished: say so, where ``left`` in its folder is, and what to do next."""
    placement.lead(lambda: finished.mark(run.folder, run.name, run.config, left=left))
    said = finished.next_step(run.name, run.folder, left)
    run.console.print(said, markup=False, highlight=False, soft_wrap=True)
