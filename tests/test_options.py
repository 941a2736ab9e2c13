"""Options that come in kinds: one class says what a kind reads, shell and files follow from it."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pytest
import tyro

from jax_klrlhf import cli
from jax_klrlhf.core import catalogue
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs import belief_config, config, improvement_config, iterate_config, options
from jax_klrlhf.programs.options import Count, Family, Number, Share, When


class Fruit(Family):
    """What is eaten."""

    switch: ClassVar = "fruit.kind"
    kind: str
    ripe: bool = True
    """Whether it is ripe."""


class Sweet(Fruit):
    """Not a kind itself: it has no name."""

    sugar: Number = 0.5
    """Grams."""


class Apple(Sweet):
    """Grows on trees."""

    kind: Literal["apple"] = "apple"
    worms: Annotated[int, When("fruit.sugar", 0.5)] = 0


class Citrus(Sweet):
    """Grows in the south."""

    called: ClassVar = "from the south"
    kind: Literal["lemon", "orange"]
    peel: Share = 0.25
    """Thickness."""


@dataclass(frozen=True, kw_only=True)
class Meal:
    """A meal."""

    fruit: Fruit = dataclasses.field(default_factory=Apple)
    count: Count = 1
    knife: bool = False
    edge: Annotated[str, When("knife")] = "dull"


def parse(*words, default=None):
    given = {} if default is None else {"default": default}
    return tyro.cli(Meal, args=words, registry=options.flat(), **given)


def test_a_class_is_a_kind_in_the_shell():
    assert parse() == Meal(fruit=Apple())
    found = parse("--fruit.kind", "orange", "--fruit.peel", "0.5", "--fruit.no-ripe")
    assert found.fruit == Citrus(kind="orange", peel=0.5, ripe=False)
    # A file's values stay unless the shell has others, and go with their kind.
    lemon = Meal(fruit=Citrus(kind="lemon", peel=0.5, sugar=0.1))
    assert parse("--fruit.sugar", "2", default=lemon).fruit == Citrus(
        kind="lemon", peel=0.5, sugar=2.0
    )
    assert parse("--fruit.kind", "orange", default=lemon).fruit == Citrus(
        kind="orange", peel=0.5, sugar=0.1
    )
    with pytest.raises(options.Unread, match=r"--fruit.peel is read by no run with --fruit.kind a"):
        parse("--fruit.kind", "apple", default=lemon)


def test_help_says_of_each_option_who_reads_it(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "{apple,lemon,orange}" in said
    assert "apple: Grows on trees. from the south: Grows in the south. (default: apple)" in said
    assert "from the south: Thickness. (default: 0.25)" in said
    assert "--fruit.sugar FLOAT Grams." in said  # all of them read it
    assert "What is eaten." in said


@pytest.mark.parametrize("of", [belief_config.Belief, improvement_config.Improvement])
def test_no_option_of_another_kind_can_be_given(of):
    known = options.kinds(of)
    group, _, tag = of.switch.rpartition(".")
    every = {f.name: f for kind in known.values() for f in dataclasses.fields(kind)}
    refused = 0
    for name, kind in known.items():
        own = {f.name for f in dataclasses.fields(kind)}
        # As older files have them: of other kinds too, but as these have them by default.
        usual = {option: options.default(f) for option, f in every.items()} | {tag: name}
        found, given = options.choose(of, usual)
        assert (found, given.keys()) == (kind, own)
        kind(**given)
        for option in every.keys() - own:
            flag = options.flag(f"{group}.{option}")
            with pytest.raises(
                options.Unread, match=f"^{flag} is read by no run with --{of.switch}"
            ):
                options.choose(of, {tag: name, option: "other"})
            with pytest.raises(TypeError, match=option):
                kind(**{tag: name, option: "other"})
            refused += 1
        for option in own - {tag}:
            assert options.choose(of, {tag: name, option: "other"})[1][option] == "other"
    assert refused > 40


def test_kinds_of_one_name_for_an_option_agree_on_it():
    """The shell has one of each: its default is one value, whatever kind is chosen."""
    for of in (belief_config.Belief, improvement_config.Improvement):
        seen = {}
        for kind in options.kinds(of).values():
            for f in dataclasses.fields(kind):
                if f.name != of.switch.rpartition(".")[2]:
                    said = (f.type, repr(options.default(f)))
                    assert seen.setdefault(f.name, said) == said


def test_every_loss_on_groups_is_a_method():
    names = tuple(options.kinds(improvement_config.Improvement))
    assert names[5:] == tuple(catalogue.METHODS)


def test_files_have_kinds_too(tmp_path):
    path = tmp_path / "run.json"
    must = {"model": "m", "reward": "r", "prompts": "p", "output": "o"}

    def read(**more):
        path.write_text(json.dumps(must | more))
        return config.read(path, iterate_config.IterateConfig)

    assert read() == read(belief={}, improve={"objective": "sigmoid"})
    assert read(belief={"kind": "linear", "ridge": 2}).belief == belief_config.Linear(ridge=2.0)
    old = {"kind": "linear", "members": 3, "model": None}
    assert read(belief=old).belief == belief_config.Linear()
    for belief, message in (
        ({"kind": "linear", "members": 4}, "belief: --belief.members is read by no run with"),
        ({"kind": "liner"}, "--belief.kind is 'liner'; it is one of reward-model, ensemble"),
        ({"kind": "linear", "rigde": 1}, "unknown key 'rigde'; there are .*did you mean ridge"),
        ({"kind": "linear", "ridge": "x"}, "belief: ridge: expected float, found 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            read(belief=belief)
    words = ["--config", str(path), "--belief.kind", "given", "--belief.model", "judge"]
    path.write_text(json.dumps(must))
    assert cli.parse("iterate", words).belief == belief_config.Given(model="judge")


@pytest.mark.parametrize(
    ("meal", "message"),
    [
        (Meal(count=0), "--count is 0; it must be positive"),
        (Meal(fruit=Citrus(kind="lemon", peel=1.0)), "--fruit.peel is 1.0; it is a share in"),
        (Meal(fruit=Apple(sugar=float("nan"))), "--fruit.sugar is nan; it must be positive"),
        (Meal(edge="sharp"), "--edge is read by no run with --knife False; leave it out"),
        (
            Meal(fruit=Apple(sugar=0.25, worms=1)),
            "--fruit.worms is read by no run with --fruit.sugar 0.25; leave it out",
        ),
    ],
)
def test_what_an_option_is_held_to_stands_where_it_is_declared(meal, message):
    with pytest.raises(InputError, match=message):
        options.check(meal)
    options.check(Meal(knife=True, edge="sharp", fruit=Apple(worms=1)))
