"""What is in a data set, before any compute is spent on it."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from jax_klrlhf.data import facts
from jax_klrlhf.data.facts import Description, LengthSummary, describe, length_summary
from jax_klrlhf.data.prepare import Prepared

__all__ = [
    "Description",
    "LengthSummary",
    "describe",
    "describe_prepared",
    "length_summary",
    "table",
]


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
        result.add_column(name, justify="right", overflow="fold")

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


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _lengths(summary: LengthSummary | None) -> str | None:
    return summary and f"{summary.mean:.1f}, " + ", ".join(str(v) for v in summary[1:])
