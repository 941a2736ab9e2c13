"""What an option says of itself where it is declared: what it is held to, and what reads it.

A *family* is what one switch chooses among, ``--belief.kind`` say. Its subclasses are the kinds:
each has the options that it reads, a tag with its name, and makes its part of a run. So Python
takes ``Linear(ridge=0.1)``, in which nothing can stand that is not read. The shell and files have
the options of all kinds side by side, ``--belief.kind linear --belief.ridge 0.1``: :func:`flat`
and :func:`choose` make that of the classes, and refuse what other kinds alone read.

Nothing heavy is imported.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, dataclass_transform, get_args, get_type_hints

from jax_klrlhf.errors import InputError


def flag(name: str) -> str:
    """An option as the shell has it."""
    return "--" + name.replace("_", "-")


class Limit:
    """Of a type: what a number is held to."""

    def __init__(self, holds: Callable[[Any], bool], said: str):
        self._holds, self._said = holds, said

    def __call__(self, name: str, value: Any) -> None:
        """Raises ``InputError`` where the option ``name`` is given, and is not so."""
        if value is not None and not self._holds(value):
            raise InputError(f"{flag(name)} is {value}; {self._said}.")


positive = Limit(lambda x: 0 < x < math.inf, "it must be positive, and finite")
not_negative = Limit(lambda x: 0 <= x < math.inf, "it is a number of at least 0")
Count = Annotated[int, positive]
Number = Annotated[float, positive]
Weight = Annotated[float, not_negative]
Finite = Annotated[float, Limit(math.isfinite, "it must be finite")]
Share = Annotated[float, Limit(lambda x: 0 <= x < 1, "it is a share in [0, 1)")]
Probability = Annotated[float, Limit(lambda x: 0 < x <= 1, "it is a probability in (0, 1]")]
Seed = Annotated[int, Limit(lambda x: 0 <= x < 2**32, "it is a whole number from 0 to 2^32 - 1")]
Port = Annotated[int, Limit(lambda x: 0 <= x < 2**16, "it is a number from 0 to 65535")]


class When:
    """Of a field: it is read where ``switch`` is one of ``values``; by default, where it is set."""

    def __init__(self, switch: str, *values: Any):
        self.switch, self.values = switch, values


class Unread(Exception):
    """An option of another kind: no ``ValueError``, which tyro would put in a frame."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Family:
    """What one switch chooses among: its subclasses, the first of which is the default.

    Each is a frozen dataclass of keywords, by being one.
    """

    switch: ClassVar[str]
    """The option that chooses, ``group.tag``."""
    called: ClassVar[str | None] = None
    """In help texts, where it has many names."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def check(self, config: Any) -> None:
        """What no type says of this part of ``config``. Raises ``InputError``."""


def family(kind: Any) -> type[Family] | None:
    """The family of a class; None where it is of none."""
    mro = getattr(kind, "__mro__", ())
    return mro[mro.index(Family) - 1] if Family in mro[1:] else None


def kinds(of: type[Family]) -> dict[str, type[Any]]:
    """The kinds of a family by their names, as they were defined."""
    found: dict[str, type[Any]] = {}
    for kind in of.__subclasses__():
        tag = inspect.get_annotations(kind).get(of.switch.rpartition(".")[2])
        found |= dict.fromkeys(get_args(tag), kind) | kinds(kind)
    return found


def choose(of: type[Family], given: Mapping[str, Any]) -> tuple[type[Any], dict[str, Any]]:
    """The kind that options are of, and those of them that no other kind alone has.

    Raises:
        Unread: where there is no such kind, or an option is of others and not as they have it.
    """
    known, (group, _, tag) = kinds(of), of.switch.rpartition(".")
    name = given.get(tag, next(iter(known)))
    if name not in list(known):
        raise Unread(f"{flag(of.switch)} is {name!r}; it is one of {', '.join(known)}.")
    own = {entry.name for entry in dataclasses.fields(known[name])}
    others = {f.name: f for kind in known.values() for f in dataclasses.fields(kind)}
    for option in sorted(others.keys() & given.keys() - own):
        if given[option] != default(others[option]):
            raise Unread(_unread(f"{group}.{option}", of.switch, name))
    return known[name], {k: v for k, v in given.items() if k in own or k not in others}


def flat() -> Any:
    """The registry with which ``tyro`` has the options of all kinds of a family side by side."""
    from tyro import constructors as tyros

    registry, single = tyros.ConstructorRegistry(), []

    @registry.struct_rule
    def rule(info: Any) -> Any:
        of = family(info.type)
        if of is None or single:  # a kind alone is any dataclass to tyro
            return None
        known, tag = kinds(of), of.switch.rpartition(".")[2]
        labels = {
            kind: kind.called or ", ".join(name for name in known if known[name] is kind)
            for kind in known.values()
        }
        options: dict[str, Any] = {}
        readers: dict[str, list[str]] = {}
        for kind, label in labels.items():
            mine = type(info.default) is kind
            given = info.default if mine else tyros.MISSING_NONPROP
            single.append(kind)
            spec: Any = registry.get_struct_spec(
                dataclasses.replace(info, type=kind, default=given)
            )
            single.pop()
            for option in spec.fields:
                readers.setdefault(option.name, []).append(label)
                if mine or option.name not in options:
                    options[option.name] = option

        def text(option: Any) -> str:
            by, said = readers[option.name], option.helptext() or ""
            return said if len(by) == len(labels) else f"{', '.join(by)}: {said}"

        def make(**given: Any) -> Any:
            kind, own = choose(of, given)
            return kind(**own)

        make.__doc__ = of.__doc__
        options[tag] = dataclasses.replace(
            options[tag],
            type=Literal[tuple(known)],  # pyright: ignore[reportArgumentType]  # a form, no class
            helptext=lambda: " ".join(f"{label}: {kind.__doc__}" for kind, label in labels.items()),
        )
        return tyros.StructConstructorSpec(
            instantiate=make,
            fields=tuple(
                option
                if name == tag
                else dataclasses.replace(option, helptext=partial(text, option))
                for name, option in options.items()
            ),
        )

    return registry


def check(config: Any) -> None:
    """See that numbers are what they are held to, and that what is given is read.

    Raises:
        InputError: naming the option.
    """
    found = list(_leaves(config))
    for name, _, value, marks in found:
        for mark in marks:
            if isinstance(mark, Limit):
                mark(name, value)
    values = {name: value for name, _, value, _ in found}
    for name, entry, value, marks in found:
        for mark in marks:
            if isinstance(mark, When) and value != default(entry):
                given = values[mark.switch]
                if not (given in mark.values if mark.values else given):
                    raise InputError(_unread(name, mark.switch, given))


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, list[Any]]]:
    """Name, field, value and marks of every option."""
    hints = get_type_hints(type(config), include_extras=True)
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, value, _marks(hints[entry.name])


def _marks(hint: Any) -> list[Any]:
    own = list(getattr(hint, "__metadata__", ()))
    return own + [mark for part in get_args(hint) for mark in _marks(part)]


def _unread(name: str, switch: str, given: Any) -> str:
    return f"{flag(name)} is read by no run with {flag(switch)} {given}; leave it out."


def default(entry: dataclasses.Field) -> Any:
    """The default of a field."""
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default
