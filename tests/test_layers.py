"""Imports point downwards only, and the core imports jax alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "jax_klrlhf"

# What each layer may import of the library, besides itself. Leaves: `errors`, `folders`, `results`,
# `placement`, `columns`, `defaults`; what is not listed (`plan`, `cli`) is on top: it may import
# all, and nothing listed imports it.
ALLOWED = {
    "core": set(),
    "errors": set(),
    "folders": {"errors"},
    "placement": {"errors"},
    "results": {"errors"},
    "labelling": {"errors", "results"},
    "bandit": {"core", "errors"},
    "models": {"core", "errors", "folders", "placement"},
    "columns": set(),
    "defaults": {"models"},
    "data": {"core", "models", "columns", "errors", "folders", "placement", "results"},
    "training": {"core", "models", "errors", "folders", "labelling", "placement", "results"},
}
# What the core may import from outside, besides the standard library.
CORE_OUTSIDE = {"jax", "jaxtyping", "numpy"}
# Nothing in the library may import what stands above it.
ABOVE = {"colab", "experiments", "tests"}


def imported_modules(source: str, module: str) -> set[str]:
    """Absolute dotted names that a module imports, at any depth, `TYPE_CHECKING` included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, base] if base else parent)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> str | None:
    """The layer of a module of the library; None for the package itself and for others."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def violations(source: str, module: str) -> list[str]:
    """Every import of the module that the rules forbid."""
    own, bad = layer(module), []
    for name in sorted(imported_modules(source, module)):
        top, other = name.split(".")[0], layer(name)
        upward = own in ALLOWED and other not in {None, own} | ALLOWED[own]
        outside = (
            own == "core"
            and top not in CORE_OUTSIDE | {PACKAGE}
            and top not in sys.stdlib_module_names
        )
        if top in ABOVE or upward or outside:
            bad.append(f"{module} imports {name}")
    return bad


def library_modules():
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        # A package's own file gets a last part, so that its relative imports resolve alike.
        yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_no_import_points_upwards():
    modules = list(library_modules())
    assert {layer(name) for _, name in modules} >= {"core", "bandit", "models", "data", "training"}
    found = [bad for path, name in modules for bad in violations(path.read_text(), name)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jax_klrlhf.core.gibbs", "import flax"),
        ("jax_klrlhf.core.gibbs", "from jax_klrlhf.models import base"),
        ("jax_klrlhf.core.gibbs", "from ..models import base"),
        ("jax_klrlhf.core.gibbs", "from .. import bandit"),
        ("jax_klrlhf.bandit.problem", "from jax_klrlhf.models.base import Prefix"),
        ("jax_klrlhf.models.base", "def f():\n    import jax_klrlhf.bandit.problem"),
        ("jax_klrlhf.models.base", "from jax_klrlhf.training import step"),
        ("jax_klrlhf.data.batch", "from jax_klrlhf import training"),
        ("jax_klrlhf.training.step", "from jax_klrlhf import cli"),
        ("jax_klrlhf.cli", "from experiments.quickstart import run"),
    ],
)
def test_the_walk_sees_each_kind_of_forbidden_import(module, source):
    assert violations(source, module)


def defined(name: str) -> list[str]:
    """Where the library's modules define a class, a function or an alias of a type of that name."""
    found = []
    for path, module in library_modules():
        for node in ast.parse(path.read_text()).body:
            names = [getattr(node, "name", None)]
            if isinstance(node, ast.Assign):
                names = [getattr(target, "id", None) for target in node.targets]
            found += [module] * (name in names)
    return found


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("Batch", "models.batch"),
        ("Choices", "core.choices"),
        ("Comparisons", "training.rounds.parts"),
        ("Enhancer", "core.enhancer"),
        ("Fit", "core.estimation"),
        ("GroupLoss", "core.group_losses"),
        ("Loss", "core.scores"),
        ("PackedBatch", "models.batch"),
        ("PairRule", "core.pairs"),
        ("RewardClass", "core.reward_class"),
        ("Saddle", "core.saddle"),
        ("Scored", "training.rounds.parts"),
        ("Scores", "core.scores"),
        ("Setting", "bandit.problem"),
        ("Target", "core.targets"),
        ("descend", "core.descent"),
        ("ball_minimum", "core.linalg"),
        ("preference", "training.tasks"),
    ],
)
def test_what_both_worlds_share_has_one_name_for_one_thing(name, where):
    assert defined(name) == [f"jax_klrlhf.{where}"]


# What only `placement` may ask: who this process is, and how arrays get from one to another.
PROCESSES = {
    "process_index", "process_count", "local_devices", "local_device_count", "process_allgather",
    "broadcast_one_to_all", "sync_global_devices", "multihost_utils",
    "make_array_from_process_local_data", "make_array_from_callback",
}  # fmt: skip


def of_processes(source: str) -> set[str]:
    """Names of :data:`PROCESSES` that a module uses: read, called, imported or handed in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.keyword | ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add(node.name.rpartition(".")[2])
    return found & PROCESSES


def test_only_placement_knows_of_processes():
    found = {name: of_processes(path.read_text()) for path, name in library_modules()}
    assert len(found.pop(f"{PACKAGE}.placement")) > 3
    # Each host reads its own slices of the weights: bytes, not rows.
    assert found.pop(f"{PACKAGE}.models.pretrained") <= {
        "make_array_from_callback",
        "local_devices",
    }
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        "import jax\nif jax.process_index() == 0: pass",
        "from jax import process_count as n",
        "from jax.experimental import multihost_utils",
        "Loader(process_index=0)",
    ],
)
def test_the_walk_sees_each_question_about_processes(source):
    assert of_processes(source)


def test_importing_the_core_brings_none_of_the_heavy_packages():
    heavy = ["flax", "transformers", "tensorflow_datasets", "orbax", "optax", "torch", "grain"]
    program = (
        f"import sys, jax_klrlhf.core\nprint(*sorted({heavy!r} & sys.modules.keys()))".replace(
            "[", "{"
        ).replace("]", "}")
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
