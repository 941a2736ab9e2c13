"""The wheel: everything that lies in the package is in it, and what is in it works by itself."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the commands of README show or read, besides the code.
DATA = {
    "py.typed", "report/common.js", "report/common.css", "report/run.js", "report/run.css",
    "report/side_by_side.js", "report/side_by_side.css", "label/label.html", "label/label.js",
    "label/label.css",
}  # fmt: skip


def in_package() -> set[str]:
    """Of the folder: what is no left-over of running it."""
    package = ROOT / "jax_klrlhf"
    return {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_package_has_what_its_pages_are_made_of():
    assert in_package() >= DATA
    others = {name for name in in_package() if not name.endswith(".py")}
    assert others == DATA  # a new one is named here, and so looked for in the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as a user's pip does it: this needs its build backend, from the registry or here."""
    target = tmp_path_factory.mktemp("wheel")
    try:
        import hatchling  # noqa: F401
    except ImportError:
        more = []
    else:
        more = ["--no-build-isolation"]
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(target), *more, "."],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if made.returncode and not more:
        pytest.skip(f"no wheel without hatchling and a registry: {made.stderr.strip()[-200:]}")
    assert made.returncode == 0, made.stderr
    (path,) = target.glob("jax_klrlhf-*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    of_package = {name.partition("/")[2] for name in names if name.startswith("jax_klrlhf/")}
    assert of_package == in_package()
    rest = {name.partition("/")[0] for name in names} - {"jax_klrlhf"}
    assert len(rest) == 1  # no experiments, no tests
    assert rest.pop().endswith(".dist-info")


@pytest.mark.slow
def test_what_readme_shows_of_commands_runs_from_the_wheel_alone(wheel, tmp_path):
    place, folder = tmp_path / "site", tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
    folder.mkdir()
    (folder / "answers.jsonl").write_text(
        '{"prompt": "p", "model": "a", "answers": ["x", "y"], "tokens": [1, 1]}\n'
    )
    script = (
        "import jax_klrlhf, sys; from jax_klrlhf import cli, label, toy\n"
        f"assert jax_klrlhf.__file__.startswith({str(place)!r})\n"
        "assert cli.main(['report', 'answers.jsonl']) == 0\n"
        "pool = label.Pool.of(['p'], [['x', 'y']])\n"
        "with label.serve(label.Session('labels', pool=pool)) as served: assert served.port\n"
        "assert toy.decode([1, 4]) == 'Ana laughed'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(place)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "answers side by side" in done.stdout
    assert "textContent" in (folder / "answers.html").read_text()
