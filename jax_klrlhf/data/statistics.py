"""What is in a data set, before any compute is spent on it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jax_klrlhf.data import arrange, facts, prepare, tokenize
from jax_klrlhf.data.examples import Columns
from jax_klrlhf.data.facts import Description, LengthSummary, describe, length_summary
from jax_klrlhf.data.prepare import Prepared

__all__ = ["DataConfig", "Description", "LengthSummary", "describe", "describe_prepared"]
__all__ += ["length_summary", "main", "table"]


def describe_prepared(prepared: Prepared) -> Description:
    """:func:`describe` for one split of a prepared folder, as it was counted when it was made."""
    return facts.from_json(prepared.manifest["facts"][prepared.split])


def table(prepared: Mapping[str, Prepared]) -> Table:
    """The splits of a prepared folder side by side, and what the preparation dropped and cut."""
    found = {name: describe_prepared(split) for name, split in prepared.items()}
    manifest = next(iter(prepared.values())).manifest
    columns = list(found.values())
    # Names of files are a user's: nothing in them is read as markup.
    result = Table(title=escape(f"{manifest['source']}, tokens of {manifest['tokenizer']}"))
    result.add_column("", overflow="fold")
    for name in found:
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
        where = f"{entry['count']} (first: {entry['first'][0]})"
        result.add_row(escape(f"dropped: {reason}"), escape(where))
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
    max_length: int | None = None
    """Tokens of prompt and response together; by default the context of the model, where
    --tokenizer is the folder of one."""
    control_tokens: bool = False
    """Read control tokens such as ``<|im_end|>`` in the data's text as such, not as words: for data
    that were put in a chat template before."""
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
            max_length=config.max_length or _context(config.tokenizer),
            control_tokens=config.control_tokens,
            split=config.split,
            columns=config.columns,
            arrange=getattr(arrange, config.arrange),
            test_fraction=config.test_fraction,
            split_seed=config.split_seed,
        )
        (console or Console()).print(table(splits))
    return None if config.output is None else splits


def _context(model: str) -> int | None:
    """Context of the model in a folder, None where the folder does not say."""
    path = Path(model).expanduser() / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        lengths = [found.get(name) for name in ("max_position_embeddings", "n_positions")]
    except (OSError, ValueError, AttributeError):
        return None
    return next((length for length in lengths if isinstance(length, int) and length > 1), None)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _lengths(summary: LengthSummary | None) -> str | None:
    return summary and f"{summary.mean:.1f}, " + ", ".join(str(v) for v in summary[1:])
