"""Every field of a public record says what it is, in `help()` as in the source."""

import importlib

import pytest

from jax_klrlhf.core import records
from jax_klrlhf.core.choices import Choices

PACKAGES = ("jax_klrlhf.core", "jax_klrlhf.bandit", "jax_klrlhf.training.rounds")


@pytest.mark.parametrize("name", PACKAGES)
def test_no_field_is_an_alias(name):
    package = importlib.import_module(name)
    found = 0
    for public in package.__all__:
        value = getattr(package, public)
        for record in [value, *getattr(value, "__dict__", {}).values()]:
            own = getattr(record, "__module__", "").startswith(name)
            if own and isinstance(record, type) and hasattr(record, "_fields"):
                for field in record._fields:
                    found += 1
                    text = getattr(record, field).__doc__
                    assert text and "Alias for field" not in text, f"{record.__name__}.{field}"  # noqa: PT018
    assert found > 5


def test_text_comment_and_annotation():
    assert Choices.where.__doc__.startswith("True: may be chosen.")
    statement, below = records.ast.parse("x: int  # a count\n'''Text.'''").body
    assert records._text(statement, below, ["x: int  # a count"]) == "Text."
    assert records._text(statement, None, ["x: int  # a count"]) == "a count"
    assert records._text(statement, None, ["x: int"]) == "``int``"
