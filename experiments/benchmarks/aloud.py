"""What a benchmark says while it runs, and the table it leaves for a README."""

import time
from collections.abc import Callable, Mapping

import jax
from rich.console import Console

from jax_klrlhf.results import Metric


def contenders(
    console: Console, runs: Mapping[str, Callable[[], object]]
) -> dict[str, Callable[[], object]]:
    """The same runs, each of which prints its name and its seconds when it is done."""

    def said(name: str, run: Callable[[], object]) -> Callable[[], object]:
        def turn() -> object:
            begin = time.perf_counter()
            out = jax.block_until_ready(run())
            console.print(f"  {name}: {time.perf_counter() - begin:.2f} s", highlight=False)
            return out

        return turn

    return {name: said(name, run) for name, run in runs.items()}


def markdown(title: str, rows: Mapping[str, Mapping[str, Metric | str]], console: Console) -> None:
    """Print ``rows[method][metric]`` as a Markdown table, columns in order of first appearance."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    lines += [
        [name, *(str(row.get(column, "")) for column in columns)] for name, row in rows.items()
    ]
    text = ["", title, "", *("| " + " | ".join(line) + " |" for line in lines), ""]
    console.out("\n".join(text), highlight=False)
