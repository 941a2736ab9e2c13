"""From a task and its data to trained parameters: optimizer, state, loop, results."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_klrlhf import finished, placement
from jax_klrlhf.data.batch import Loader, Stream
from jax_klrlhf.data.packing import PackedLoader
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import partition
from jax_klrlhf.programs import batches as feeds
from jax_klrlhf.programs.config import TrainingConfig, steps_of
from jax_klrlhf.programs.run import Run, report
from jax_klrlhf.programs.splits import Splits
from jax_klrlhf.training import evaluate as evaluation
from jax_klrlhf.training import health, loop, metrics, optimizers
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import state as states
from jax_klrlhf.training.checkpoint import Checkpoints
from jax_klrlhf.training.state import TrainState
from jax_klrlhf.training.step import make_step
from jax_klrlhf.training.tasks import Task


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
    adamw = optimizers.adamw(
        rate,
        clip=config.clip,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.moments),
    )
    return adamw, rate


def fit(
    run: Run,
    task: Task,
    params: Any,
    splits: Splits,
    convert: Any,
    *,
    picked: Callable[[np.ndarray], np.ndarray] = feeds.best_and_worst,
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
        picked: which responses of a row the packed layout holds (:func:`batches.best_and_worst`).
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
        source: Loader | PackedLoader = feeds.packed_loader(run, splits.train, take)
        table = None if tables[0] is None else tables[0][np.arange(len(take))[:, None], take]
        feed = partial(feeds.packed, table=table)
    else:
        source = feeds.loader(run, splits.train, seed=config.seed)
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
            held = feeds.whole_epoch(feeds.loader(run, splits.held_out, seed=None))
            found |= score(state, (convert(batch, tables[1]) for batch in held))
        return found | (more(state) if more is not None else {})

    store = Checkpoints(run.folder / "checkpoints", keep=config.keep)
    batches = feeds.Feed(Stream(source), feed)
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
            profile=run.folder / "profile" if config.profile else None,
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
