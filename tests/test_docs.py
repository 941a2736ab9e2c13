"""What the documentation says to type can be typed: commands parse, names exist, snippets run."""

import ast
import doctest
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from jax_klrlhf import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("[!_agt]*/*.md")),
    *sorted((ROOT / "experiments").glob("*/README.md")),
]


def _commands():
    """Page, line and text of every ``klrlhf`` line, continuation lines joined, comments cut."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for number, line in enumerate(text.splitlines(), 1):
            found = re.match(r"(?: {4}|\$ )(?:\S+=\S+ )*(?:klrlhf|python -m jax_klrlhf) (.+)", line)
            if found:
                yield page, number, found[1]


def _names():
    """Page and dotted path of every role that links to an object of the library."""
    for page in PAGES:
        for path in re.findall(r"\{(?:mod|class|func|meth|data)\}`~?([\w.]+)`", page.read_text()):
            yield page, path


def _snippets():
    for page in sorted((ROOT / "docs" / "howto").glob("*.md")):
        source = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
        if source:
            yield page, source


def _label(value):
    return value.name if isinstance(value, Path) else None


# pytest collects the core's own; the examples of everything else are run below.
EXAMPLES = [
    path
    for path in sorted((ROOT / "jax_klrlhf").rglob("*.py"))
    if "core" not in path.relative_to(ROOT).parts and ">>> " in path.read_text()
]
COMMANDS, NAMES, SNIPPETS = list(_commands()), sorted(set(_names())), list(_snippets())


def test_all_were_found():
    pages = {page.name for page, _, _ in COMMANDS}
    assert pages >= {"README.md", "data.md", "lora.md", "plan.md", "pods.md", "five_minutes.md"}
    assert {"pods.md", "objective.md"} <= {page.name for page, _ in NAMES}
    assert {"loss.md", "learner.md", "lora.md"} <= {page.name for page, _ in SNIPPETS}


@pytest.mark.parametrize(("page", "number", "line"), COMMANDS, ids=_label)
def test_a_command_parses(page, number, line, capsys):
    name, *arguments = shlex.split(line, comments=True)
    arguments = [word for word in arguments if word not in ("...", "[...]")]
    if name.startswith("-"):
        assert cli.main([name]) == 0
        return
    assert name in cli.COMMANDS, f"{page.name}, line {number}: no command {name!r}"
    if "..." in line:  # what the reader fills in may be required
        arguments += _required(name, arguments)
    status = 0
    try:
        cli.parse(name, arguments)
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert status == 0, f"{page.name}, line {number}: {line}\n{shown.out}{shown.err}"


def _required(name: str, given: list[str]) -> list[str]:
    asked = {
        "dpo": ("model", "data", "output"),
        "sft": ("model", "data", "output"),
        "reward": ("model", "data", "output"),
        "data": ("tokenizer", "data"),
        "iterate": ("model", "prompts", "reward", "output"),
        "plan": ("model",),
    }.get(name, ())
    return [word for option in asked if f"--{option}" not in given for word in (f"--{option}", "x")]


@pytest.mark.parametrize(("page", "path"), NAMES, ids=_label)
def test_a_name_exists(page, path):
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            assert hasattr(value, part), f"{page.name}: {path} has no {part}"
            value = getattr(value, part)
        return
    pytest.fail(f"{page.name}: there is no {path}")


def _outline(source: str) -> bool:
    """Whether something is left out; an index is not."""
    tree = ast.parse(source)
    indices = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        for inside in ast.walk(node.slice)
    }
    return any(
        isinstance(node, ast.Constant) and node.value is ... and id(node) not in indices
        for node in ast.walk(tree)
    )


LONG = {"ask.md", "measure.md", "sample.md"}
"""Pages whose programs take a quarter of a minute or more."""


@pytest.mark.parametrize(
    ("page", "source"),
    [
        pytest.param(*snippet, marks=pytest.mark.slow if snippet[0].name in LONG else ())
        for snippet in SNIPPETS
    ],
    ids=_label,
)
def test_a_snippet_runs(page, source):
    if _outline(source):
        pytest.skip("an outline: the reader fills it in")
    scope: dict = {}
    exec(compile(source, page.name, "exec"), scope)
    assert set(scope) - {"__builtins__"}


@pytest.mark.parametrize("path", EXAMPLES, ids=_label)
def test_an_example_outside_of_the_core_holds(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert found.attempted
    assert not found.failed


@pytest.fixture(scope="module")
def check():
    """``docs/check.py``, which Sphinx calls when it has built."""
    spec = importlib.util.spec_from_file_location("docs_check", ROOT / "docs" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_link_that_leads_nowhere_is_named(check, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="deep/page.html#there">1</a><a href="https://x.test/a">2</a>'
        '<a href="search.html?q=a">3</a><img src="picture.svg"><a href="deep/">4</a>'
    )
    (tmp_path / "deep" / "page.html").write_text(
        '<p id="there"><a href="../index.html#top">1</a><a href="#there">2</a><a href="#">3</a>'
    )
    (tmp_path / "deep" / "index.html").write_text("<p>")
    (tmp_path / "search.html").write_text("<p>")
    (tmp_path / "picture.svg").write_text("<svg/>")
    assert check.links(tmp_path) == []
    (tmp_path / "picture.svg").unlink()
    (tmp_path / "deep" / "page.html").write_text('<p><a href="../index.html#bottom">1</a>')
    assert check.links(tmp_path) == [
        "deep/page.html: ../index.html#bottom leads to no place in that page",
        "index.html: deep/page.html#there leads to no place in that page",
        "index.html: picture.svg leads to no file",
    ]


def test_the_browser_opens_every_page_but_those_of_source_code(check, tmp_path):
    pages = ["index.html", "api/a.b.html", "howto/x.html", "_modules/a.html", "_modules/b.html"]
    for name in [*pages, "_static/theme.html", "index.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(check.pages_of(tmp_path)) == set(pages[:-1])


def test_pages_with_formulas_and_pages_looked_for_exist(check):
    for name in (*check.TYPESET, *(f"{place}.html" for place in check.SOUGHT.values())):
        page = Path(name).with_suffix("")
        top = page.parts[0]
        if top == "api":
            assert importlib.util.find_spec(page.name), name
        elif top == "tutorials":
            assert (ROOT / "colab" / "src" / page.name).with_suffix(".py").is_file(), name
        elif top == "gallery":
            assert (ROOT / "experiments" / page.name).is_dir(), name
        elif len(page.parts) > 1:
            assert (ROOT / "docs" / page).with_suffix(".md").is_file(), name
        else:  # part of a module's name
            assert importlib.util.find_spec(f"jax_klrlhf.{page.name}"), name
