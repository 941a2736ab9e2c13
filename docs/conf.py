"""Sphinx: built by ``make docs``, offline, with warnings as errors."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util import logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # of the kernels that run the pages

project = "jax_klrlhf"
copyright = "the authors of jax_klrlhf; Apache-2.0"
author = "the authors of jax_klrlhf"

extensions = [
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
    "myst_nb",
]

# API pages are written from the packages themselves, so a new module has its page at once.
apidoc_modules = [
    {
        "path": str(ROOT / "jax_klrlhf"),
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "max_depth": 3,
        "automodule_options": {"members", "show-inheritance"},
        "exclude_patterns": ["**/programs/*", "**/__main__.py"],
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes stand in the signatures' strings; the docstrings say the rest
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 88

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
# Tutorials are shown as they were built, at full size; that they run is seen at a small one, below.
nb_execution_excludepatterns = ["tutorials/*"]
nb_merge_streams = True

templates_path: list[str] = []
exclude_patterns = ["_build", "_generated", "*.py", "**/.ipynb_checkpoints", "api/modules.rst"]
html_theme = "sphinx_book_theme"
html_title = "jax_klrlhf"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_favicon = "_static/worlds.svg"  # else every browser asks for one that is not there
html_context = {"default_mode": "auto"}  # else the theme complains in the console
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
# An object has its source at its own module; a package's page would send the way back astray.
viewcode_follow_imported_members = False
# A short name in a docstring (`loss`, `Rows`) may be several objects: the first is linked.
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]


def _notebooks() -> None:
    """The notebooks of ``colab/``, with the outputs they were built with.

    Less the badge: its picture is on another host, and a page here asks none.
    """
    target = HERE / "tutorials"
    target.mkdir(exist_ok=True)
    for path in sorted((ROOT / "colab").glob("*.ipynb")):
        text = re.sub(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)", "", path.read_text())
        (target / path.name).write_text(text)


def _readmes() -> None:
    """The README of every experiment as a page of the gallery, with the figures that it shows.

    Links into the tree stay text.
    """
    target = HERE / "gallery"
    target.mkdir(exist_ok=True)
    names = []
    for path in sorted((ROOT / "experiments").glob("*/README.md")):
        text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", path.read_text())
        for figure in re.findall(r"!\[[^\]]+\]\((?!https?:)([^)]+)\)", text):
            shutil.copy(path.parent / figure, target / figure)
        (target / f"{path.parent.name}.md").write_text(text)
        names.append(path.parent.name)
    head = (
        "# Gallery\n\nEvery experiment: its command, what it measures, and what was found, with "
        "spread, machine and date.\n\n```{toctree}\n:maxdepth: 1\n\n"
    )
    (target / "index.md").write_text(head + "\n".join(names) + "\n```\n")
    shutil.copy(ROOT / "CHANGELOG.md", HERE / "changelog.md")


def _objectives() -> None:
    """The table of objectives, from the registry."""
    from jax_klrlhf.core import catalogue

    target = HERE / "_generated"
    target.mkdir(exist_ok=True)
    (target / "objectives.md").write_text(catalogue.table())


def _atlas() -> None:
    """The page of claims, from the numbers that are committed beside the experiment."""
    from experiments.atlas import page, run

    (HERE / "atlas.md").write_text(page.document(run.SECTIONS))


_notebooks()
_readmes()
_objectives()
_atlas()


def _skip(app, what, name, found, skip, options):
    """The function ``bandit.simulate`` has its module's name: it is described there, once."""
    return True if what == "module" and name == "simulate" and callable(found) else None


def _tutorials_run(app):
    """Execute every tutorial at a small size; one that does not run ends the build.

    ``-D run_tutorials=0`` leaves that out: it takes most of the build.
    """
    if not app.config.run_tutorials or app.builder.name != "html":
        return
    # Compiling is what it costs, and unpolished programs compile faster.
    small = os.environ | {
        "KLRLHF_SMALL": "1", "MPLBACKEND": "Agg",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }  # fmt: skip
    for source in sorted((ROOT / "colab" / "src").glob("*.py")):
        LOG.info("executing %s at a small size", source.name)
        done = subprocess.run(
            [sys.executable, str(source)], env=small, cwd=HERE, capture_output=True, text=True
        )
        if done.returncode:
            raise ExtensionError(f"{source.name} does not run:\n{done.stderr[-2000:]}")


def _look(app, error):
    """Follow every link of what was built, and open its pages in a browser."""
    if error is not None or app.builder.name != "html":
        return
    import check

    folder = Path(app.outdir)
    wrong = check.links(folder)
    try:
        wrong += check.browse(folder)
        print("pages, formulas and search were tried in a browser")
    except check.NoBrowser as reason:
        print(f"not looked at in a browser: {reason}")
    for line in wrong:
        LOG.warning("%s", line)


LOG = logging.getLogger(__name__)
sys.path.insert(0, str(HERE))


def setup(app):
    """Sphinx calls this."""
    app.add_config_value("run_tutorials", True, "")
    app.connect("autodoc-skip-member", _skip)
    app.connect("builder-inited", _tutorials_run)
    app.connect("build-finished", _look)
