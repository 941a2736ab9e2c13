"""Who calls the core: every public function of it, and from which world it is reached.

``python -m tests.callers`` prints the table. A function is *reached* from a world where a file of
that world names it, or names a function of the core that does, and so on (transitively). The
bandit's files are `jax_klrlhf/bandit` and what imports it: experiments, notebooks, the snippets of
the documentation (which tests run). The language model's are `models`, `training`, `programs`,
`data` and what imports those. An experiment that imports neither computes on enumerated actions: it
is the bandit's. What the conformance suite runs in both worlds counts for both: a rule or a target
is a value that a user hands over, and those tests are the ones who hand it.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = "jax_klrlhf.core"
BANDIT, LANGUAGE = "bandit", "language model"
LANGUAGE_PARTS = ("models", "training", "programs", "data", "cli")


def modules() -> dict[str, ast.Module]:
    """The core's modules by name."""
    return {
        path.stem: ast.parse(path.read_text())
        for path in sorted((ROOT / "jax_klrlhf" / "core").glob("*.py"))
        if path.stem != "__init__"
    }


def public(trees: dict[str, ast.Module]) -> list[str]:
    """``module.function`` of all of them, in order."""
    return [
        f"{module}.{node.name}"
        for module, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


@functools.cache
def _imported(tree: ast.AST) -> tuple[dict[str, str], dict[str, str]]:
    """Names by which a file has modules of the core, and things of theirs."""
    aliases, direct = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                used = alias.asname or alias.name
                if node.module == CORE:
                    aliases[used] = alias.name
                elif node.module.startswith(CORE + "."):
                    direct[used] = f"{node.module.rsplit('.', 1)[1]}.{alias.name}"
    return aliases, direct


def names(tree: ast.AST, imports: ast.AST, module: str | None) -> Iterator[str]:
    """``module.name`` of everything of the core that `tree` names; `imports` is its whole file."""
    aliases, direct = _imported(imports)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases:
                yield f"{aliases[node.value.id]}.{node.attr}"
        elif isinstance(node, ast.Name):
            if node.id in direct:
                yield direct[node.id]
            elif module is not None:
                yield f"{module}.{node.id}"


def graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """What each definition of the core names, private ones and values included."""
    found: dict[str, set[str]] = {}
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                to = node.targets if isinstance(node, ast.Assign) else [node.target]
                own = [t.id for t in to if isinstance(t, ast.Name)]
            else:
                continue
            for name in own:
                found.setdefault(f"{module}.{name}", set()).update(names(node, tree, module))
    return found


def users() -> Iterator[tuple[Path, ast.Module]]:
    """Every file outside of the core that may call it, with what it says."""
    for folder in ("jax_klrlhf", "experiments", "colab/src", "tests/conformance"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parts[-2] != "core":
                yield path, ast.parse(path.read_text())
    for path in sorted((ROOT / "docs" / "howto").glob("*.md")):
        snippets = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        yield path, ast.parse("\n".join(snippets))


def worlds(path: Path, tree: ast.Module) -> set[str]:
    """To which worlds a file belongs."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "jax_klrlhf":
        part = parts[1].removesuffix(".py")
        return {BANDIT} if part == "bandit" else {LANGUAGE} if part in LANGUAGE_PARTS else set()
    if parts[:2] == ("tests", "conformance"):
        return {BANDIT, LANGUAGE}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    found = set()
    for name in imported:
        second = name.split(".")[1] if name.startswith("jax_klrlhf.") else ""
        found |= {BANDIT} if second == "bandit" else set()
        found |= {LANGUAGE} if second in LANGUAGE_PARTS else set()
    return found


def _of_folder(path: Path) -> set[str]:
    """An experiment's file that imports neither world serves those of the files beside it."""
    if path.relative_to(ROOT).parts[0] != "experiments" or path.parent.name == "experiments":
        return set()
    beside = [p for p in path.parent.glob("*.py") if p != path]
    found = set().union(*(worlds(p, ast.parse(p.read_text())) for p in beside))
    return found or {BANDIT}


def reached() -> dict[str, set[str]]:
    """Of every public function of the core, the worlds from which it is reached."""
    trees = modules()
    edges, functions = graph(trees), public(trees)
    found: dict[str, set[str]] = {name: set() for name in functions}
    roots: dict[str, set[str]] = {BANDIT: set(), LANGUAGE: set()}
    for path, tree in users():
        for world in worlds(path, tree) or _of_folder(path):
            roots[world] |= set(names(tree, tree, None))
    for world, waiting in roots.items():
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting |= edges.get(name, set()) - seen
        for name in functions:
            found[name] |= {world} if name in seen else set()
    return found


def main() -> None:
    """Print the table and the counts."""
    found = reached()
    for name, by in found.items():
        print(
            f"{name:<40} {BANDIT if BANDIT in by else '':<8} {LANGUAGE if LANGUAGE in by else ''}"
        )
    both = sum(len(by) == 2 for by in found.values())
    one = {world: sum(by == {world} for by in found.values()) for world in (BANDIT, LANGUAGE)}
    print(
        f"\n{len(found)} public functions: {both} reached from both worlds, {one[BANDIT]} from the "
        f"bandit alone, {one[LANGUAGE]} from the language model alone, "
        f"{sum(not by for by in found.values())} from neither"
    )


if __name__ == "__main__":
    sys.exit(main())
