"""Notebooks from their sources: ``python -m colab.build [names]``.

``src/*.py`` are the notebooks, in jupytext's percent format; the ``.ipynb`` beside this file are
made of them and executed, so that their pictures are inside. Change the sources and build again;
a test compares the two. What all have in common, the badge and the cell that installs, is put in
here.
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
REPOSITORY = "OWNER/jax_klrlhf"
"""On GitHub. A placeholder: the repository has no public address yet. Put it here, and build."""
_BADGE = """

[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]\
(https://colab.research.google.com/github/{repository}/blob/main/colab/{name}.ipynb)"""
_INSTALL = """\
import glob
import importlib.util
import subprocess
import sys

REPOSITORY = "{repository}"
if importlib.util.find_spec("jax_klrlhf") is None:
    # A wheel beside this notebook comes first: in a clone, `pip wheel --no-deps .` makes one.
    wheels = sorted(glob.glob("jax_klrlhf-*.whl"))
    if not wheels and REPOSITORY.startswith("OWNER/"):
        raise SystemExit(
            "OWNER is a placeholder: set REPOSITORY to the address of the repository on GitHub, or "
            "upload a wheel beside this notebook (in a clone: pip wheel --no-deps .)"
        )
    source = wheels[-1] if wheels else f"git+https://github.com/{{REPOSITORY}}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)"""


def sources() -> list[Path]:
    """The notebooks' sources, in order."""
    return sorted((HERE / "src").glob("*.py"))


def convert(source: Path) -> Any:
    """The notebook of a source, not executed; nothing in it depends on when or where."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    here = {"repository": REPOSITORY, "name": source.stem}
    title, line, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = title + _BADGE.replace("\\\n", "").format(**here) + line + rest
    notebook.cells.insert(1, nbformat.v4.new_code_cell(_INSTALL.format(**here)))
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
