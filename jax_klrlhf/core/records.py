"""Records say what their fields are: ``help(Choices)`` shows what stands in the source.

Python describes the fields of a ``NamedTuple`` as "Alias for field number 0". The text under a
field in the source, or the comment behind it, or else its annotation, is put in that place.
"""

import ast
import inspect
import itertools
import sys
from types import ModuleType


def document(package: ModuleType | str) -> None:
    """Describe the fields of every record that a package's loaded modules define.

    Does nothing for a module whose source is not at hand.
    """
    prefix = package if isinstance(package, str) else package.__name__
    for name, module in list(sys.modules.items()):
        if name == prefix or name.startswith(prefix + "."):
            records = {
                value.__name__: value
                for value in vars(module).values()
                if isinstance(value, type)
                and issubclass(value, tuple)
                and hasattr(value, "_fields")
                and value.__module__ == name
            }
            if records:
                _describe(module, records)


def _describe(module: ModuleType, records: dict[str, type]) -> None:
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in records:
            body = [*node.body, None]
            for statement, below in itertools.pairwise(body):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    field = getattr(records[node.name], statement.target.id)
                    field.__doc__ = _text(statement, below, lines)


def _text(statement: ast.AnnAssign, below: ast.stmt | None, lines: list[str]) -> str:
    if (
        isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    ):
        return inspect.cleandoc(below.value.value)
    last = statement.end_lineno or statement.lineno
    behind = lines[last - 1][statement.end_col_offset or 0 :].partition("#")[2].strip()
    return behind or f"``{ast.unparse(statement.annotation)}``"  # its stars are no emphasis
