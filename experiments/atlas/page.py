"""The atlas as a page: tables made of the committed numbers, never typed."""

from collections.abc import Mapping, Sequence

from experiments.atlas import rows
from experiments.atlas.rows import Row
from jax_klrlhf.results import Metric

HEAD = ("system", "claim", "function", "verdict", "over", "effect", "control", "command")
TITLES = {"rewards": "Rewards and preference models", "policies": "Policies and objectives"}


def cells(row: Row, metrics: Mapping[str, Metric]) -> tuple[str, ...]:
    """One row, a string for each of :data:`HEAD`."""
    effects = rows.effects_of(row, metrics)
    tally = rows.tally(effects)
    over = f"{tally} {row.axis}: {_range(row)}" if row.settings else str(tally)
    control = ""
    if row.control:
        control = f"{row.control}: {_ends(rows.effects_of(row, metrics, 'control'), row)}"
    return (
        row.system, row.claim, row.function, tally.verdict, over, _ends(effects, row), control,
        f"`{row.command}`",
    )  # fmt: skip


def _range(row: Row) -> str:
    return f"{row.labels[0]} to {row.labels[-1]}"


def _ends(effects: Sequence[Metric], row: Row) -> str:
    """The least and the largest effect over the axis, each with its interval and setting."""
    count = len(effects)
    places = sorted(range(count), key=lambda k: effects[k].value)
    shown = [places[0]] if count == 1 else [places[0], places[-1]]
    text = []
    for k in shown:
        low, high = rows.interval(effects[k], settings=count)
        at = f" at {row.labels[k]}" if row.settings else ""
        text.append(f"{effects[k].value:+.3f} [{low:+.3f}, {high:+.3f}]{at}")
    return "; ".join(text)


def table(shown: Sequence[Row], metrics: Mapping[str, Metric]) -> str:
    """As Markdown."""
    lines = (HEAD, ("---",) * len(HEAD), *(cells(row, metrics) for row in shown))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def by_setting(row: Row, metrics: Mapping[str, Metric]) -> str:
    """Every setting of a row, as Markdown."""
    lines = [f"| {row.axis or 'setting'} | effect | control |\n| --- | --- | --- |\n"]
    controls = rows.effects_of(row, metrics, "control") if row.control else [None] * len(row.labels)
    effects = rows.effects_of(row, metrics)
    for label, effect, control in zip(row.labels, effects, controls, strict=True):
        low, high = rows.interval(effect, settings=len(effects))
        own = "" if control is None else f"{control.value:+.4f}"
        lines.append(f"| {label} | {effect.value:+.4f} [{low:+.4f}, {high:+.4f}] | {own} |\n")
    return "".join(lines)


def summary(shown: Sequence[Row], metrics: Mapping[str, Metric]) -> str:
    """How many rows have which verdict."""
    found = [rows.tally(rows.effects_of(row, metrics)).verdict for row in shown]
    kinds = ("held", "in part", "not held", "undecided")
    return f"{len(shown)} claims: " + ", ".join(f"{found.count(kind)} {kind}" for kind in kinds)


def document(sections: Mapping[str, Sequence[Row]]) -> str:
    """The page of the documentation, of every section that has committed numbers."""
    text = [INTRODUCTION]
    for name, shown in sections.items():
        metrics = rows.recorded(name)
        text.append(f"\n## {TITLES[name]}\n\n{summary(shown, metrics)}.\n\n")
        text.append(table(shown, metrics))
        text.append("\n### Every setting\n")
        for row in shown:
            text.append(f"\n**{row.system}**: {row.claim} (`{row.function}`; control: ")
            text.append(f"{row.control or 'none'})\n\n{by_setting(row, metrics)}")
    return "".join(text)


INTRODUCTION = """# Atlas of claims

One row for each system: its claim in our words, the function of the library, and what an exact
check on small random worlds says. Effects above 0 speak for the claim. Each claim is measured at
every setting of an axis, over the same worlds; intervals hold at 95 % for all settings of a row
together (Bonferroni, Student's t over worlds).

* **held**: above 0 at every setting; **not held**: above 0 at none, below at one or more;
  **in part**: above 0 at some; **undecided**: the rest.
* *over*: how many settings are above 0, and in brackets the interval of how many truly are.
* *effect*: the least and the largest over the axis. *control*: the same measurement where the idea
  must not work, or where the claim is empty.

Worlds and sizes are ours: they show direction, not a paper's size. This page is made of the
numbers that the commands wrote; no one types it.
"""


def readme(text: str, sections: Mapping[str, Sequence[Row]]) -> str:
    """The README with its tables made anew."""
    before, rest = text.split("<!-- table -->\n")
    after = rest.split("<!-- end -->\n")[1]
    parts = []
    for name, shown in sections.items():
        metrics = rows.recorded(name)
        parts.append(f"**{TITLES[name]}**, {summary(shown, metrics)}.\n\n{table(shown, metrics)}")
    return before + "<!-- table -->\n" + "\n".join(parts) + "<!-- end -->\n" + after


if __name__ == "__main__":
    from experiments.atlas.run import SECTIONS

    place = rows.HERE / "README.md"
    place.write_text(readme(place.read_text(), SECTIONS))
