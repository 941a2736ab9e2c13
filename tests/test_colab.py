"""Notebooks are what their sources make, hold their pictures, and run at a small size."""

import ast
import re
import runpy
import sys
import types

import jax
import matplotlib.pyplot as plt
import nbformat
import pytest

from jax_klrlhf import figures

build = pytest.importorskip("colab.build", reason="jupytext and nbclient are of the test extra")
SOURCES = build.sources()
NAMES = [source.stem for source in SOURCES]


@pytest.fixture(params=SOURCES, ids=NAMES)
def source(request):
    return request.param


def test_the_notebook_is_its_source(source):
    path = build.HERE / f"{source.stem}.ipynb"
    found, made = nbformat.read(path, as_version=4), build.convert(source)
    said = lambda notebook: [(c.cell_type, c.source, c.id) for c in notebook.cells]  # noqa: E731
    assert said(found) == said(made), "build it again: python -m colab.build"
    assert path.stat().st_size < build.LARGEST
    outputs = [out for cell in found.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert not any(out.output_type == "error" for out in outputs)
    assert all(cell.execution_count for cell in found.cells if cell.cell_type == "code")


def test_the_notebook_installs_the_library_and_has_a_badge(source):
    notebook = build.convert(source)
    badge = f"github/{build.REPOSITORY}/blob/main/colab/{source.stem}.ipynb)"
    first, install = notebook.cells[:2]
    assert first.source.startswith("# ")
    assert badge in first.source.splitlines()[2]
    assert first.source.splitlines()[2].startswith("[![Open in Colab](https://")
    compile(install.source, source.name, "exec")
    assert f'REPOSITORY = "{build.REPOSITORY}"' in install.source
    # In one place: what a notebook says for itself knows of no address.
    assert "github" not in source.read_text()
    assert 'find_spec("jax_klrlhf")' not in source.read_text()


@pytest.mark.parametrize("wheel", [False, True])
def test_the_cell_that_installs_takes_a_wheel_first_and_says_that_an_address_is_missing(
    wheel, tmp_path, monkeypatch
):
    install = build.convert(SOURCES[0]).cells[1].source
    called = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda words, **given: called.append(words[-1]))
    if wheel:
        (tmp_path / "jax_klrlhf-0.1.0-py3-none-any.whl").touch()
    elif build.REPOSITORY.startswith("OWNER/"):
        with pytest.raises(SystemExit, match="OWNER is a placeholder"):
            exec(install, {})
    exec(install.replace('REPOSITORY = "OWNER/', 'REPOSITORY = "somebody/'), {})
    address = f"git+https://github.com/{build.REPOSITORY}".replace("OWNER/", "somebody/")
    assert called == ["jax_klrlhf-0.1.0-py3-none-any.whl" if wheel else address]


def test_what_is_explored_has_sliders_where_there_are_any_and_one_picture_elsewhere(monkeypatch):
    drawn, made = [], []
    ranges = {"kl_coef": (0.3, 0.05, 20.0), "ridge": (1.0, 0.1, 10.0)}
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    figures.explore(lambda **at: drawn.append(at), **ranges)
    assert drawn == [{"kl_coef": 0.3, "ridge": 1.0}]
    widgets = types.SimpleNamespace(
        FloatLogSlider=lambda value, **given: (value, 10 ** given["min"], 10 ** given["max"]),
        interact=lambda show, **sliders: made.append((show(kl_coef=2.0, ridge=3.0), sliders)),
    )
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    figures.explore(lambda **at: drawn.append(at), **ranges)
    ((shown, sliders),) = made
    assert drawn[1] == {"kl_coef": 2.0, "ridge": 3.0}
    assert shown is None
    for name, given in ranges.items():
        assert sliders[name] == pytest.approx(given)
    with pytest.raises(ValueError, match="ridge is not"):
        figures.explore(print, ridge=(0.0, 0.0, 1.0))


@pytest.mark.slow
def test_the_source_runs_at_a_small_size(source, monkeypatch, capsys):
    monkeypatch.setenv("KLRLHF_SMALL", "1")
    try:
        # Optax's own steps, which notebooks may take, rely on JAX's default.
        with jax.numpy_dtype_promotion("standard"):
            runpy.run_path(str(source))
        assert plt.get_fignums()
    finally:
        plt.close("all")
    assert "±" in capsys.readouterr().out


COSTS = {
    "rule, enhancer": ["halfway", "tempered"],
    "loss": ["with_floor"],
    "divergence": ["two_sided"],
    "preference model": ["_lapsing", "lapsing"],
    "learner, by what it deploys": ["capped"],
    "class of rewards": ["network", "mine"],
    "learner, by whom it compares": ["against_bolder", "propose"],
}
"""Rows of the table of notebook 4, and the definitions that are all there is to write for each."""


def test_what_a_piece_of_your_own_costs_is_what_the_table_says_and_both_worlds_take_it():
    """Lines of code, at most 25; and each piece is named on the bandit and on the model."""
    (path,) = [source for source in SOURCES if source.stem == "04_your_own"]
    text = path.read_text()
    lines = text.splitlines()
    table = dict(re.findall(r"^# \| ([^|]+?) \| (\d+) \|", text, re.MULTILINE))
    assert set(table) == set(COSTS)
    size = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names = [node.targets[0].id]
        else:
            continue
        own = [x for x in lines[node.lineno - 1 : node.end_lineno] if not re.match(r" *(#|$)", x)]
        size.update(dict.fromkeys(names, len(own)))
    _, on_bandit = text.split("# ## On the bandit: exact gaps")
    on_bandit, on_model = on_bandit.split("# ## On the language model: the same objects")
    for row, names in COSTS.items():
        assert int(table[row]) == sum(size[name] for name in names) <= 25, row
        piece = "its_optimum" if row == "divergence" else names[-1]
        assert re.search(rf"\b{piece}\b", on_bandit), row
        if row != "learner, by whom it compares":  # in rounds that is a pair rule
            assert re.search(rf"\b{piece}\b", on_model), row
