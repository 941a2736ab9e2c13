"""What every run leaves behind: ``results.json``, and the same numbers as a table.

``metrics`` is a flat map from ``panel/method/metric`` to ``{"value", "stderr", "n"}``, so that two
runs are compared by joining on a string.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jax_klrlhf.errors import InputError

_PACKAGES = ("jax-klrlhf", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


class Metric(NamedTuple):
    """A number with its standard error; ``n`` counts the independent units behind both."""

    value: float
    stderr: float | None = None
    n: int | None = None

    def __str__(self) -> str:
        """``value ± stderr`` at three decimals."""
        text = f"{self.value:.3f}"
        return text if self.stderr is None else f"{text} ± {self.stderr:.3f}"


def mean(values: ArrayLike) -> Metric:
    """Mean of independent ``values [n]`` with its standard error (sample deviation over sqrt n).

    Dependent draws must be averaged first (all responses to one prompt, say), or the standard
    error is too small.
    """
    flat = np.asarray(values, np.float64).ravel()
    if flat.size == 0:
        raise ValueError("mean: no values; average at least one number.")
    stderr = float(flat.std(ddof=1) / math.sqrt(flat.size)) if flat.size > 1 else None
    return Metric(float(flat.mean()), stderr, flat.size)


def proportion(hits: ArrayLike, *, z: float = 1.96) -> tuple[Metric, tuple[float, float]]:
    """Share of True among independent ``hits [n]``, and its Wilson interval at ``z`` deviations."""
    flat = np.asarray(hits, bool).ravel()
    if flat.size == 0:
        raise ValueError("proportion: no values; count at least one trial.")
    n, share = flat.size, float(flat.mean())
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    stderr = math.sqrt(share * (1 - share) / n)
    # The bounds are exactly 0 and 1 at share 0 and 1; rounding must not push them past.
    return Metric(share, stderr, n), (max(0.0, centre - half), min(1.0, centre + half))


def output_folder(path: str | Path) -> Path:
    """Make ``path`` a folder that can be written, before any compute is spent.

    Raises:
        InputError: when it is a file or a bucket's address, or cannot be made or written.
    """
    folder = Path(path)
    remote = re.match(r"(\w{2,}):/+(.*)", str(path))  # A Path has one slash of the two left.
    if remote is not None:
        raise InputError(
            f"{remote[1]}://{remote[2]}: not a folder of this machine; give a path on a disk, or "
            "where the bucket is mounted (gcsfuse)."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder}: a file is in the way; name another --output.") from None
    except OSError as error:
        raise InputError(
            f"{folder}: cannot make this folder ({error.strerror}); name another --output."
        ) from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: not writable; change its permissions or name another.")
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON in one step: a reader sees the old file or the new, never half.

    Raises:
        InputError: where it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(plain(content), indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); make room, or move what is there."
        ) from None


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; ``remedy`` says what to do where there is none.

    Raises:
        InputError: naming the file, where it cannot be read, is cut, or holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}.") from None
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:100]
        raise InputError(f"{path}: damaged, not JSON ({text}); {remedy}.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: damaged, no object with keys; {remedy}.")
    return found


def write_results(
    folder: str | Path,
    *,
    name: str,
    config: Any,
    seeds: Sequence[int],
    seconds: float,
    metrics: Mapping[str, Metric],
) -> Path:
    """Write ``folder/results.json`` and return its path.

    ``config`` is a dataclass or a mapping. Versions and the device are recorded here. A value that
    is not finite is written as null: JSON has no NaN.
    """
    path = output_folder(folder) / "results.json"
    write_json(
        path,
        {
            "name": name,
            "config": config,
            "seeds": list(seeds),
            "versions": _versions(),
            "device": _device(),
            "seconds": round(seconds, 2),
            "metrics": {key: metric._asdict() for key, metric in metrics.items()},
        },
    )
    return path


def print_table(
    title: str,
    rows: Mapping[str, Mapping[str, Metric | str]],
    *,
    console: Console | None = None,
    caption: str | None = None,
) -> None:
    """Print ``rows[method][metric]`` as a table, columns in order of first appearance.

    Names may be a user's: nothing in them is read as markup.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(
        title=escape(title),
        caption=None if caption is None else escape(caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("method")
    for column in columns:
        table.add_column(escape(column), justify="right")
    for method, row in rows.items():
        table.add_row(escape(method), *(escape(str(row.get(column, ""))) for column in columns))
    (console or Console()).print(table)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _device() -> dict[str, Any]:
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def plain(value: Any) -> Any:
    """JSON's own types, from dataclasses, paths, numpy scalars and arrays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)
