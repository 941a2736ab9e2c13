"""Notebooks are what their sources make, hold their pictures, and run at a small size."""

import runpy

import matplotlib.pyplot as plt
import nbformat
import pytest

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
    text = source.read_text()
    assert f"blob/main/colab/{source.stem}.ipynb" in text
    assert "colab-badge.svg" in text
    assert "jax-klrlhf @ git+https://" in text


@pytest.mark.slow
def test_the_source_runs_at_a_small_size(source, monkeypatch, capsys):
    monkeypatch.setenv("KLRLHF_SMALL", "1")
    try:
        runpy.run_path(str(source))
        assert plt.get_fignums()
    finally:
        plt.close("all")
    assert "±" in capsys.readouterr().out
