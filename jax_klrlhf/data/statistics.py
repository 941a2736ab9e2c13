"""What is in a data set, before any compute is spent on it.

>>> print(length_summary([1, 2, 3, 4]))
LengthSummary(mean=2.5, median=2, p90=4, p99=4, max=4)
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from jax_klrlhf.data import arrange, prepare, tokenize
from jax_klrlhf.data.examples import Columns
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.data.rows import Row

_CHUNK = 1000


class LengthSummary(NamedTuple):
    """Lengths in tokens."""

    mean: float
    median: int
    p90: int
    p99: int
    max: int


class Description(NamedTuple):
    """Facts about rows. Shares are in [0, 1]; None where there is nothing to count."""

    rows: int
    prompts: int
    """Different prompts."""
    responses: Mapping[int, int]
    """Number of responses -> rows that have it."""
    duplicates: int
    """Rows whose prompt and responses all repeat an earlier row's."""
    contradictions: int
    """Rows whose first two responses stand the other way round in another row of the prompt."""
    ties: int
    """Rows whose first two responses have equal scores."""
    prompt_length: LengthSummary | None
    first_length: LengthSummary | None
    """Of the first (chosen) response."""
    other_length: LengthSummary | None
    """Of all other responses."""
    first_longer: float | None
    """Share of rows whose first response is longer than the second."""
    first_shorter: float | None


def length_summary(lengths: Sequence[int] | np.ndarray) -> LengthSummary | None:
    """Mean and quantiles; None of no lengths."""
    values = np.asarray(lengths)
    if not values.size:
        return None
    median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99], method="inverted_cdf").tolist()
    return LengthSummary(float(values.mean()), int(median), int(p90), int(p99), int(values.max()))


def describe(rows: Iterable[Row]) -> Description:
    """Count, measure and compare rows; reads each once, keeps hashes and lengths only."""
    prompts: set[bytes] = set()
    contents: set[bytes] = set()
    pairs: Counter[tuple[bytes, bytes, bytes]] = Counter()
    prompt_lengths: list[int] = []
    first: list[int] = []
    other: list[int] = []
    longer: list[int] = []
    responses: Counter[int] = Counter()
    duplicates = ties = 0
    for row in rows:
        prompt = _digest(row.prompt)
        each = [_digest(response) for response in row.responses]
        content = b"".join([prompt, *each])
        duplicates += content in contents
        contents.add(content)
        prompts.add(prompt)
        responses[len(each)] += 1
        prompt_lengths.append(len(row.prompt))
        first.extend(len(response) for response in row.responses[:1])
        other.extend(len(response) for response in row.responses[1:])
        if len(each) > 1:
            pairs[prompt, each[0], each[1]] += 1
            longer.append(len(row.responses[0]) - len(row.responses[1]))
            ties += row.scores[0] == row.scores[1]
    return Description(
        rows=len(prompt_lengths),
        prompts=len(prompts),
        responses=dict(sorted(responses.items())),
        duplicates=duplicates,
        contradictions=sum(n for (x, a, b), n in pairs.items() if (x, b, a) in pairs),
        ties=ties,
        prompt_length=length_summary(prompt_lengths),
        first_length=length_summary(first),
        other_length=length_summary(other),
        first_longer=float(np.mean(np.array(longer) > 0)) if longer else None,
        first_shorter=float(np.mean(np.array(longer) < 0)) if longer else None,
    )


def describe_prepared(prepared: Prepared) -> Description:
    """:func:`describe` for one split of a prepared folder."""

    def rows() -> Iterator[Row]:
        for start in range(0, len(prepared), _CHUNK):
            yield from prepared.fetch(range(start, min(start + _CHUNK, len(prepared))))

    return describe(rows())


def table(prepared: Mapping[str, Prepared]) -> Table:
    """The splits of a prepared folder side by side, and what the preparation dropped and cut."""
    facts = {name: describe_prepared(split) for name, split in prepared.items()}
    manifest = next(iter(prepared.values())).manifest
    columns = list(facts.values())
    result = Table(title=f"{manifest['source']}, tokens of {manifest['tokenizer']}")
    result.add_column("")
    for name in facts:
        result.add_column(name, justify="right")

    def add(label: str, value: Callable[[Description], Any]) -> None:
        result.add_row(label, *(_text(value(column)) for column in columns))

    add("rows", lambda d: d.rows)
    add("different prompts", lambda d: d.prompts)
    add("responses to a prompt", lambda d: ", ".join(f"{k} (x{n})" for k, n in d.responses.items()))
    add("duplicate rows", lambda d: d.duplicates)
    add("contradicted by another row", lambda d: d.contradictions)
    add("first two tied in score", lambda d: d.ties)
    add("chosen longer", lambda d: d.first_longer)
    add("chosen shorter", lambda d: d.first_shorter)
    lengths: list[tuple[str, Callable[[Description], LengthSummary | None]]] = [
        ("prompt tokens", lambda d: d.prompt_length),
        ("chosen tokens", lambda d: d.first_length),
        ("other tokens", lambda d: d.other_length),
    ]
    for label, summary in lengths:
        add(f"{label}: mean, median, 90 %, 99 %, max", lambda d, of=summary: _lengths(of(d)))
    result.add_section()
    result.add_row("examples read", str(manifest["examples"]))
    for what, number in manifest["rows_with_cut"].items():
        result.add_row(f"rows with cut {what}", str(number))
    for reason, entry in manifest["dropped"].items():
        result.add_row(f"dropped: {reason}", f"{entry['count']} (first: {entry['first'][0]})")
    return result


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prepare a preference data set and say what is in it, before any training."""

    data: str
    """File, folder, hub id, or tfds:name."""
    tokenizer: str
    """Folder or hub id of the model whose tokens count."""
    output: Path | None = None
    """Folder that keeps the prepared data; none: it is only described."""
    split: str | None = None
    """Split of the source, where it has several."""
    max_prompt_length: int = 512
    """Tokens; a longer prompt loses its beginning."""
    max_response_length: int = 512
    """Tokens; a longer response loses its end."""
    test_fraction: float = 0.0
    """Share of the prompts to hold out as the split `test`."""
    split_seed: int = 0
    """Another seed holds out other prompts."""
    columns: Columns = field(default_factory=Columns)
    """What the columns are called."""
    arrange: Literal["as_is", "best_worst", "all_pairs", "grouped"] = "as_is"
    """Ranked responses to pairs (best_worst, all_pairs), or pairs of one prompt to one row."""


def main(config: DataConfig, *, console: Console | None = None) -> dict[str, Prepared] | None:
    """Prepare, and print the table. Returns the splits where they were kept."""
    tokenizer = tokenize.load(config.tokenizer)
    with TemporaryDirectory() as temporary:
        splits = prepare.build(
            config.data,
            tokenizer,
            config.output or Path(temporary) / "prepared",
            max_prompt_length=config.max_prompt_length,
            max_response_length=config.max_response_length,
            split=config.split,
            columns=config.columns,
            arrange=getattr(arrange, config.arrange),
            test_fraction=config.test_fraction,
            split_seed=config.split_seed,
        )
        (console or Console()).print(table(splits))
    return None if config.output is None else splits


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _lengths(summary: LengthSummary | None) -> str | None:
    return summary and f"{summary.mean:.1f}, " + ", ".join(str(v) for v in summary[1:])
