"""From what a step reports to named numbers, and from those to a terminal and files.

Inside the program quantities are sums over rows (:class:`~.step.Moments`); names are given here,
TRL's where TRL has one:

- ``loss``: weighted mean of the rows' losses
- ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``: implicit rewards, nats
- ``rewards/accuracies``: share of pairs with a positive margin
- ``logps/chosen``, ``logps/rejected``: log-probabilities of whole responses
- ``grad_norm``, ``update_norm``: of the gradient before clipping; of the optimizer's step
- ``learning_rate``: of the schedule, where it is known
- ``updates/skipped``: steps so far whose loss or gradient was not finite: they moved nothing
- ``perf/padding_fraction``: token slots that held no token
- ``perf/tokens_per_second``: true prompt and response tokens
- ``perf/mfu``: share of the chips' peak arithmetic, on the true tokens alone

A sink is a function ``(step, metrics) -> None``. Each run writes ``metrics.jsonl``, one object a
line; TensorBoard and wandb join in where they are installed and asked for.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import numpy as np

from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric
from jax_klrlhf.training.step import Info

Metrics: TypeAlias = dict[str, Metric]
Sink: TypeAlias = Callable[[int, Mapping[str, Metric]], None]

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 peak of a device, by the beginning of its kind, from its maker's data sheet."""


def mean(moments: Sequence[Any]) -> Metric:
    """Weighted mean with its standard error, from the sums that :class:`.step.Moments` names.

    ``n`` is the effective number of rows, (sum w)^2 / sum w^2, rounded.
    """
    total, square, weight, weight_square = (float(np.asarray(x)) for x in moments)
    if weight == 0:
        return Metric(math.nan)
    value, n = total / weight, weight**2 / weight_square
    if not math.isfinite(value) or n < 1.5:
        return Metric(value, None, round(n))
    variance = max(square / weight - value**2, 0.0)
    return Metric(value, math.sqrt(variance / (n - 1)), round(n))


def rates(infos: Sequence[Info], *, seconds: float, flops: float) -> Metrics:
    """Speed of steps that took ``seconds`` together; nothing where there are none.

    ``flops`` are those of a token (:func:`flops_per_token`).
    """
    if not infos:
        return {}
    tokens = sum(int(info.tokens) for info in jax.device_get(list(infos)))
    found = {
        "perf/tokens_per_second": Metric(tokens / seconds),
        "perf/steps_per_second": Metric(len(infos) / seconds),
    }
    share = mfu(tokens / seconds, flops)
    return found if share is None else found | {"perf/mfu": Metric(share)}


def flops_per_token(state: Any) -> float:
    """Multiplications and additions that a step needs per token, 2 per parameter and pass.

    A trained parameter is passed three times (forward, towards the inputs, towards the weights), a
    frozen one twice, the live reference once. Attention scores and recomputation do not count,
    and all parameters are taken to act on every token, prompt tokens' vocabulary projection
    included; so for a small model with a large vocabulary the number is too high.
    """
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    return 6.0 * size(state.params) + 4.0 * size(state.frozen) + 2.0 * size(state.ref_params)


def mfu(tokens_per_second: float, flops: float) -> float | None:
    """Model FLOPs utilization over all devices; None where the device's peak is not known."""
    kind = jax.devices()[0].device_kind
    # The longest name that fits: "TPU v5" is also how "TPU v5 lite" begins.
    known = sorted((name for name in PEAK_FLOPS if kind.startswith(name)), key=len)
    if not known:
        return None
    return tokens_per_second * flops / (PEAK_FLOPS[known[-1]] * jax.device_count())


def json_lines(path: Path, *, after: int = 0) -> Sink:
    """Append one JSON object per call to ``path``.

    A run that goes on from step ``after`` first drops what it is about to write again: the lines
    of later steps, and that step's evaluation (the line with names that begin with ``eval/``). A
    line that is no JSON object (a killed run wrote half of it, a byte was damaged) costs only
    itself. The file is replaced in one step, so that a kill there loses nothing.

    Raises:
        InputError: where the file cannot be read or written.
    """
    unwritable = lambda error: InputError(  # noqa: E731
        f"{path}: cannot be written ({error.strerror}); make room, or move what is in its place."
    )
    try:
        content = path.read_bytes() if path.exists() else b""
        kept = b"".join(line for line in content.splitlines(keepends=True) if _stays(line, after))
        if kept != content or not path.exists():
            partial = path.with_name(path.name + ".tmp")
            partial.write_bytes(kept)
            os.replace(partial, path)
    except OSError as error:
        raise unwritable(error) from None

    def sink(step: int, metrics: Mapping[str, Metric]) -> None:
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, metric in metrics.items():
            row[name] = metric.value if math.isfinite(metric.value) else None
            if metric.stderr is not None and math.isfinite(metric.stderr):
                row[f"{name}/stderr"] = metric.stderr
        try:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise unwritable(error) from None

    return sink


def _stays(line: bytes, after: int) -> bool:
    """Whether a line of a history is whole, and of before a run went on from step ``after``."""
    try:
        row = json.loads(line)
        evaluation = any(name.startswith("eval/") for name in row)
        return line.endswith(b"\n") and row["step"] <= after - evaluation
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def tensorboard(folder: Path) -> Sink:
    """Scalars for TensorBoard under ``folder``. Raises ``InputError`` where it is not installed."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        raise InputError(
            "tensorboard is not installed: pip install 'jax-klrlhf[logging]', or leave it out."
        ) from None
    # Generated code, whose members no type checker sees.
    event, proto = cast(Any, event_pb2), cast(Any, summary_pb2)
    writer = EventFileWriter(str(folder))

    def sink(step: int, metrics: Mapping[str, Metric]) -> None:
        values = [proto.Summary.Value(tag=k, simple_value=m.value) for k, m in metrics.items()]
        summary = proto.Summary(value=values)
        writer.add_event(event.Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    return sink


def wandb(folder: Path, *, project: str, config: Any) -> Sink:
    """A Weights & Biases run. Raises ``InputError`` where it is not installed."""
    try:
        import wandb as client  # pyright: ignore[reportMissingImports] (an optional extra)
    except ImportError:
        raise InputError(
            "wandb is not installed: pip install 'jax-klrlhf[logging]', or leave it out."
        ) from None
    run = client.init(project=project, dir=str(folder), config=config)

    def sink(step: int, metrics: Mapping[str, Metric]) -> None:
        run.log({name: metric.value for name, metric in metrics.items()}, step=step)

    return sink
