"""One record of a source to one :class:`Example`: a prompt and K responses, best first.

Accepted shapes of a record, by the columns it has:

- ``prompt``, ``chosen``, ``rejected``: a preference pair. Without ``prompt`` the prompt is
  *implicit*: what chosen and rejected have in common.
- ``prompt``, ``responses`` and ``scores`` (higher is better) or ``ranks`` (1 is best).
- ``prompt``, ``response``: one response, for supervised training.
- ``prompt``: prompts alone, for sampling.

Text, chat messages (a list of ``{"role", "content"}``) and token ids serve everywhere. ``label``
(probability that the first response is preferred) and ``weight`` are optional.

Numbers end in float32: a score lies within 1e30 of 0; a weight is 0, or between 1e-12 and 1e12.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from jax_klrlhf.columns import Columns
from jax_klrlhf.data.messages import short
from jax_klrlhf.errors import InputError

Message: TypeAlias = Mapping[str, Any]
Content: TypeAlias = str | list[Message] | list[int]
"""Text, chat messages, or token ids."""


_SCORE = 1e30  # differences and their squares must be finite in float32
_WEIGHT = 1e12
_COLUMNS = 12  # named in a message


class Example(NamedTuple):
    """A prompt and K responses to it."""

    prompt: Content | None
    """None: implicit, the common beginning of the responses."""
    responses: list[Content]
    """Best first. In a chat each is one assistant message."""
    scores: list[float]
    """Higher is better; a pair without scores has 1 and 0, ranks count as their negatives."""
    label: float = 1.0
    weight: float = 1.0
    where: str = "example"
    """File and line, for messages."""


def parse(record: Mapping[str, Any], *, columns: Columns, where: str) -> Example:
    """One record to one example.

    Raises :class:`InputError` naming place, column and remedy where the record is not one of the
    accepted shapes.
    """
    has = {name for name, value in record.items() if value is not None}
    prompt = None
    if columns.prompt in has:
        prompt = _content(record[columns.prompt], f"{where}, column {columns.prompt!r}")
    names, scores = _responses(record, has, columns, where)
    responses = [_content(value, f"{where}, column {name!r}") for name, value in names]
    order = sorted(range(len(responses)), key=lambda k: -scores[k])
    responses, scores = [responses[k] for k in order], [scores[k] for k in order]
    if prompt is None and len(responses) < 2:
        raise InputError(
            f"{where}: no prompt: an implicit prompt is what two responses have in common, and "
            f"there are {len(responses)}; columns found: {_listed(record)}"
        )
    if _is_chat(prompt) or any(_is_chat(response) for response in responses):
        prompt, responses = _chat(prompt, responses, where)
    label = _number(record, has, columns.label, 1.0, where)
    if not 0.0 <= label <= 1.0:
        raise InputError(
            f"{where}, column {columns.label!r}: {label} is not a probability: the chance, "
            "between 0 and 1, that the first response is preferred"
        )
    weight = _number(record, has, columns.weight, 1.0, where)
    if weight < 0.0:
        raise InputError(f"{where}, column {columns.weight!r}: weight {weight} is negative")
    if weight and not 1 / _WEIGHT <= weight <= _WEIGHT:
        raise InputError(
            f"{where}, column {columns.weight!r}: weight {weight} is out of range: give 0, or "
            f"{1 / _WEIGHT:g} to {_WEIGHT:g} (only ratios of weights count)"
        )
    return Example(prompt, responses, scores, label, weight, where)


def _responses(
    record: Mapping[str, Any], has: set[str], columns: Columns, where: str
) -> tuple[list[tuple[str, Any]], list[float]]:
    """The responses' column names and values, with their scores."""
    pair = [columns.chosen, columns.rejected]
    kinds = {columns.responses, columns.response, *pair} & has
    if columns.responses in has:
        if kinds != {columns.responses}:
            raise InputError(
                f"{where}: both {columns.responses!r} and {sorted(kinds - {columns.responses})}: "
                "a record has one kind of responses; rename or remove the other"
            )
        values = _list(record[columns.responses], f"{where}, column {columns.responses!r}")
        if not values:
            raise InputError(f"{where}, column {columns.responses!r}: the list is empty")
        return [(columns.responses, v) for v in values], _scores(
            record, has, columns, len(values), where
        )
    if columns.response in has and not set(pair) & has:
        return [(columns.response, record[columns.response])], [0.0]
    if set(pair) <= has:
        return [(name, record[name]) for name in pair], [1.0, 0.0]
    missing = [name for name in pair if name not in has]
    if len(missing) == 1:
        empty = "is null" if missing[0] in record else "is missing"
        raise InputError(
            f"{where}: column {missing[0]!r} {empty} beside {pair[1 - pair.index(missing[0])]!r}; "
            f"columns found: {_listed(record)}; name yours with columns="
        )
    if columns.prompt in has:
        return [], []
    raise InputError(
        f"{where}: no column {columns.prompt!r}, {columns.chosen!r} or {columns.responses!r}; "
        f"columns found: {_listed(record)}; name yours with columns="
    )


def _scores(
    record: Mapping[str, Any], has: set[str], columns: Columns, count: int, where: str
) -> list[float]:
    given = [name for name in (columns.scores, columns.ranks) if name in has]
    if len(given) != 1:
        raise InputError(
            f"{where}: {columns.responses!r} needs exactly one of {columns.scores!r} (higher is "
            f"better) and {columns.ranks!r} (1 is best); found {given or 'neither'}"
        )
    values = _list(record[given[0]], f"{where}, column {given[0]!r}")
    if len(values) != count:
        raise InputError(
            f"{where}, column {given[0]!r}: {len(values)} values for {count} responses: one each"
        )
    for value in values:
        if not _is_number(value) or abs(value) > _SCORE:
            raise InputError(
                f"{where}, column {given[0]!r}: expected finite numbers within {_SCORE:g} of 0, "
                f"found {short(value)}"
            )
    sign = 1.0 if given[0] == columns.scores else -1.0
    return [sign * float(value) for value in values]


def _content(value: Any, place: str) -> Content:
    if isinstance(value, str):
        _check_text(value, place)
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return list(value)
        if all(isinstance(item, Mapping) for item in value):
            for item in value:
                if not isinstance(item.get("role"), str) or not isinstance(
                    item.get("content"), str
                ):
                    raise InputError(
                        f"{place}: a chat message needs text under 'role' and 'content', found "
                        f"keys {_listed(item)}"
                    )
                _check_text(item, place)
            return [dict(item) for item in value]
    raise InputError(
        f"{place}: expected text, a list of chat messages or a list of token ids, found "
        f"{short(value)}"
    )


def _check_text(value: Any, place: str) -> None:
    """Refuse half of a surrogate pair, which JSON can hold and no tokenizer reads."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{place}: character {error.start} is half of a surrogate pair "
                    f"(U+{ord(item[error.start]):04X}), which is no text: write the file anew as "
                    "UTF-8, or remove the character"
                ) from None


def _chat(
    prompt: Content | None, responses: list[Content], where: str
) -> tuple[list[Message], list[Content]]:
    """A conversation as the messages before the reply, and one assistant message per response."""
    replies: list[list[Message]] = []
    for response in responses:
        if isinstance(response, str):
            replies.append([{"role": "assistant", "content": response}])
        elif _is_chat(response):
            replies.append(list(_messages(response)))
        else:
            raise InputError(f"{where}: chat messages beside token ids: give one or the other")
    if isinstance(prompt, str):
        before: list[Message] = [{"role": "user", "content": prompt}]
    elif prompt is None:
        before = []
        last = min(len(reply) for reply in replies) - 1
        while len(before) < last and all(
            reply[len(before)] == replies[0][len(before)] for reply in replies
        ):
            before.append(replies[0][len(before)])
    elif _is_chat(prompt):
        before = list(_messages(prompt))
    else:
        raise InputError(f"{where}: chat messages beside token ids: give one or the other")
    stripped: list[Content] = []
    for reply in replies:
        rest = reply[len(before) :] if reply[: len(before)] == before else reply
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            raise InputError(
                f"{where}: each response must be one assistant message after the "
                f"{len(before)} message(s) of the prompt; found roles "
                f"{[message['role'] for message in rest]}"
            )
        stripped.append(rest)
    if not before:
        raise InputError(f"{where}: the conversation has no message before the reply")
    return before, stripped


def _messages(content: Content) -> list[Message]:
    return [item for item in content if isinstance(item, Mapping)]


def _is_chat(content: Content | None) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], Mapping)


def _number(
    record: Mapping[str, Any], has: set[str], name: str, default: float, where: str
) -> float:
    if name not in has:
        return default
    value = record[name]
    if not _is_number(value) and not isinstance(value, bool):
        raise InputError(
            f"{where}, column {name!r}: expected a finite number, found {short(value)}"
        )
    return float(value)


def _is_number(value: Any) -> bool:
    """Finite also as a float, which an integer of hundreds of digits is not."""
    try:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(float(value))
        )
    except OverflowError:
        return False


def _list(value: Any, place: str) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise InputError(f"{place}: expected a list, found {short(value)}")
    return list(value)


def _listed(record: Mapping[str, Any]) -> str:
    names = [short(name, 40) for name in record]
    more = len(names) - _COLUMNS
    return ", ".join(names[:_COLUMNS] + [f"and {more} more"] * (more > 0)) or "none"
