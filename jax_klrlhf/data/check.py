"""Whether prepared data suit what is to be done with them: asked before any compute is spent.

Each function raises :class:`InputError`, one line that names the first such row and the remedy.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jax_klrlhf.data.facts import Facts
from jax_klrlhf.data.messages import short
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError


def vocabulary(data: Prepared | Iterable[Row], *, vocab_size: int, model: str) -> None:
    """Refuse a token id that a model with `vocab_size` rows of embeddings does not have.

    Adding tokens to a tokenizer without resizing the model is how such data come about.
    """
    if isinstance(data, Prepared):
        largest = _facts(data)["largest_token"]
        token, where = int(largest["id"]), str(largest["where"])
    else:
        facts = Facts()
        for row in data:
            facts.add(row)
        token, where = facts.largest
    if token >= vocab_size:
        raise InputError(
            f"{where or 'data'}: token id {token} is beyond the vocabulary of {model}, which has "
            f"{vocab_size} tokens: the tokenizer knows tokens that the model lacks; resize the "
            "model's embeddings, or take its own tokenizer"
        )


def pairs(data: Prepared) -> None:
    """Refuse rows that hold no preference: fewer than two responses, or equal scores of all."""
    for kind, why in (
        ("no response", "a prompt without responses"),
        ("one response", "one response, where a preference has two"),
        ("tied", "responses of equal scores, which are no preference"),
    ):
        _refuse(
            data,
            kind,
            why,
            "remove such rows, or give what klrlhf data --arrange best_worst makes of them",
        )


def responses(data: Prepared) -> None:
    """Refuse rows without a response, where one is to be learned."""
    why = "a prompt without a response, and nothing to learn"
    _refuse(data, "no response", why, "remove such rows, or name yours with columns=")


def context(data: Prepared, *, max_length: int, model: str) -> None:
    """Refuse rows that are longer than a model's context (prompt and longest response)."""
    total = data.lengths.prompts + data.lengths.longest
    too_long = int((total > max_length).sum())
    if too_long:
        raise InputError(
            f"{data.folder}: {too_long} of {len(data)} rows are longer than the context of "
            f"{model}, {max_length} tokens (the longest has {int(total.max())}): prepare the data "
            f"with klrlhf data --max-length {max_length}"
        )


def options(data: Prepared, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse options of preparation that data prepared already would ignore.

    `given` and `defaults` have the same names, those of the recipe where it has them. One that is
    what the data were prepared with, or its default, is no contradiction.
    """
    recipe = data.manifest["recipe"]
    for name, value in given.items():
        if value == defaults[name] or (name in recipe and recipe[name] == value):
            continue
        flag = "--" + name.replace("_", "-")
        with_ = f" with {short(recipe[name])}" if name in recipe else ""
        raise InputError(
            f"{flag} {short(value)}: {data.folder} is prepared already{with_}: leave the option "
            "out, or prepare the data anew with it"
        )


def _facts(data: Prepared) -> Mapping[str, Any]:
    return data.manifest["facts"][data.split]


def _refuse(data: Prepared, kind: str, why: str, remedy: str) -> None:
    found = _facts(data)["rows"].get(kind)
    if found:
        raise InputError(
            f"{found['first'][0]}: {why}; {found['count']} of {len(data)} rows are so: {remedy}"
        )
