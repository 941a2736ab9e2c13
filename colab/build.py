"""Notebooks from their sources: ``python -m colab.build [names]``.

``src/*.py`` are the notebooks, in jupytext's percent format; the ``.ipynb`` beside this file are
made of them and executed, so that their pictures are inside. Change the sources and build again;
a test compares the two.
"""

import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LARGEST = 600_000
"""Bytes of a notebook."""


def sources() -> list[Path]:
    """The notebooks' sources, in order."""
    return sorted((HERE / "src").glob("*.py"))


def convert(source: Path) -> Any:
    """The notebook of a source, not executed; nothing in it depends on when or where."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({})
    return notebook


def execute(notebook: Any) -> Any:
    """The notebook with its outputs."""
    NotebookClient(notebook, timeout=3600, kernel_name="python3", record_timing=False).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # What libraries say of the machine that builds is not for a reader.
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def main(names: list[str]) -> None:
    """Build the notebooks of these names, all by default."""
    for source in sources():
        if names and source.stem not in names:
            continue
        target = HERE / f"{source.stem}.ipynb"
        text = nbformat.writes(execute(convert(source))) + "\n"
        if len(text.encode()) > LARGEST:
            raise SystemExit(f"{target.name}: {len(text.encode())} bytes; make its figures smaller")
        target.write_text(text)
        print(f"{target.name}: {len(text.encode()) // 1000} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
