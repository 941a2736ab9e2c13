"""Examples to rows of token ids, by the rules of :mod:`jax_klrlhf.data.tokenize`."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jax_klrlhf.data.examples import Content, Example
from jax_klrlhf.data.tokenize import Encoder, begun, ended
from jax_klrlhf.errors import InputError

_CHUNK = 1024  # examples handed to the tokenizer's threads at a time


class Row(NamedTuple):
    """One example in token ids: a prompt and K responses, best first where they are ordered."""

    prompt: list[int]
    responses: list[list[int]]
    scores: list[float]
    label: float
    weight: float
    number: int
    """Place in the source, counted from 0, dropped examples counted too."""
    lost: tuple[int, int] = (0, 0)
    """Tokens that the cuts took from the prompt, and from all responses together."""
    cut_to_context: bool = False
    """Whether prompt and longest response together were longer than the context."""
    where: str = ""
    """File and line, for messages; records do not keep it."""


class Dropped(NamedTuple):
    """An example that has no row, and why."""

    reason: str
    where: str


def encode(
    encoder: Encoder,
    examples: Iterable[Example],
    *,
    max_prompt_length: int,
    max_response_length: int,
    max_length: int | None = None,
) -> Iterator[Row | Dropped]:
    """Examples to rows of ids, in order, cut to the two lengths (both in tokens).

    `max_length`: of prompt and longest response together, by :func:`cut_to_context`.

    Every example gives one item: its :class:`Row`, or :class:`Dropped` with the reason. Raises
    :class:`InputError` with the example's place where its content cannot be tokenized.
    """
    if max_prompt_length < 1 or max_response_length < 1:
        raise InputError(
            f"lengths of prompt and response must be at least 1 token, not {max_prompt_length} "
            f"and {max_response_length}"
        )
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length {max_length}: a prompt and a response have 2 tokens at least")
    iterator = iter(examples)
    number = 0
    while chunk := list(islice(iterator, _CHUNK)):
        for example, (prompt, responses, text) in zip(chunk, assemble(encoder, chunk), strict=True):
            reason = _reason_to_drop(encoder, prompt, responses, text)
            uncut = len(prompt), sum(map(len, responses))
            prompt = cut_prompt(prompt, max_prompt_length, begin=encoder.begin)
            responses = [cut_response(response, max_response_length) for response in responses]
            total = len(prompt) + max(map(len, responses), default=0)
            beyond = False
            if max_length is not None and total > max_length:
                beyond = True
                prompt, responses = cut_to_context(
                    prompt, responses, max_length, begin=encoder.begin
                )
            lost = uncut[0] - len(prompt), uncut[1] - sum(map(len, responses))
            if reason is None and lost[1] and len(responses) > 1 and _all_equal(responses):
                reason = "identical responses after the cut"
            if reason is None:
                yield Row(
                    prompt=prompt,
                    responses=responses,
                    scores=list(example.scores),
                    label=example.label,
                    weight=example.weight,
                    number=number,
                    lost=lost,
                    cut_to_context=beyond,
                    where=example.where,
                )
            else:
                yield Dropped(reason, example.where)
            number += 1


def assemble(
    encoder: Encoder, examples: Sequence[Example]
) -> Iterator[tuple[list[int], list[list[int]], "Texts"]]:
    """Ids of prompt and responses of each example, uncut; all texts are tokenized at one time."""
    texts = [_placed_texts(encoder, example) for example in examples]
    opened = iter(encoder.ids([t for e in texts for t in e.opening]))
    continued = iter(encoder.ids([t for e in texts for t in e.continuing], continuing=True))
    for example, text in zip(examples, texts, strict=True):
        prompt, responses = _assemble(
            encoder,
            example,
            text,
            list(islice(opened, len(text.opening))),
            list(islice(continued, len(text.continuing))),
        )
        yield prompt, responses, text


def cut_prompt(ids: Sequence[int], max_length: int, *, begin: int | None) -> list[int]:
    """Keep a prompt's end, and its begin token in front of it (rule 4).

    >>> cut_prompt([1, 5, 6, 7, 8], 3, begin=1)
    [1, 7, 8]
    >>> cut_prompt([5, 6, 7, 8], 3, begin=None)
    [6, 7, 8]
    """
    if len(ids) <= max_length:
        return list(ids)
    if begin is not None and ids[0] == begin and max_length > 1:
        return [begin, *ids[len(ids) - max_length + 1 :]]
    return list(ids[len(ids) - max_length :])


def cut_response(ids: Sequence[int], max_length: int) -> list[int]:
    """Keep a response's beginning (rule 5).

    >>> cut_response([5, 6, 7, 2], 3)
    [5, 6, 7]
    """
    return list(ids[:max_length])


def cut_to_context(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], max_length: int, *, begin: int | None
) -> tuple[list[int], list[list[int]]]:
    """Prompt and responses of `max_length` tokens together at most, the longest response counted.

    The prompt gives first, down to half of the length; then the responses.

    >>> cut_to_context([1, 5, 6, 7, 8, 9], [[5, 6, 7, 8, 9, 2], [5, 2]], 8, begin=1)
    ([1, 7, 8, 9], [[5, 6, 7, 8], [5, 2]])
    """
    longest = max(map(len, responses), default=0)
    kept = cut_prompt(prompt, max(max_length - longest, max_length // 2), begin=begin)
    return kept, [cut_response(response, max_length - len(kept)) for response in responses]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of token rows.

    >>> common_prefix([[1, 5, 6, 7], [1, 5, 8]])
    2
    """
    shortest = min(len(row) for row in rows)
    table = np.asarray([row[:shortest] for row in rows])
    different = np.flatnonzero(np.any(table != table[:1], axis=0))
    return int(different[0]) if different.size else shortest


class Texts(NamedTuple):
    """What of an example the tokenizer has to read; ids given by the user bypass it."""

    opening: list[str]
    continuing: list[str]
    chat: bool
    replies: list[str]
    """The words of each chat reply alone: empty where the reply is."""


def _placed_texts(encoder: Encoder, example: Example) -> Texts:
    try:
        return _texts(encoder, example)
    except InputError as error:
        raise InputError(f"{example.where}: {error}") from error


def _texts(encoder: Encoder, example: Example) -> Texts:
    if example.prompt is None:
        return Texts([r for r in example.responses if isinstance(r, str)], [], False, [])
    if _is_chat(example.prompt):
        messages: Any = example.prompt
        prompt = encoder.framed(messages, add_generation_prompt=True)
        continuing, replies = [], []
        for response in example.responses:
            reply: Any = response
            text = encoder.framed([*messages, *reply], add_generation_prompt=False)
            if not text.startswith(prompt):
                raise InputError(
                    f"the chat template of {encoder.tokenizer.name_or_path!r} "
                    "does not write the reply after its generation prompt, so the reply's tokens "
                    "cannot be told apart: use a template whose generation prompt begins the turn"
                )
            continuing.append(text[len(prompt) :].rstrip())
            replies.append("".join(message["content"] for message in reply))
        return Texts([prompt], continuing, True, replies)
    opening = [example.prompt] if isinstance(example.prompt, str) else []
    return Texts(opening, [r for r in example.responses if isinstance(r, str)], False, [])


def _assemble(
    encoder: Encoder,
    example: Example,
    text: Texts,
    opened: list[list[int]],
    continued: list[list[int]],
) -> tuple[list[int], list[list[int]]]:
    """Ids of prompt and responses, uncut, with begin and end where they belong."""
    if example.prompt is None:
        texts = iter(opened)
        full = [
            ended(begun(next(texts), encoder.begin), encoder.end)
            if isinstance(response, str)
            else _checked(encoder, response, example.where)
            for response in example.responses
        ]
        shared = common_prefix(full)
        return full[0][:shared], [row[shared:] for row in full]
    if text.chat:
        return opened[0], [_closed(encoder, ids) for ids in continued]
    if isinstance(example.prompt, str):
        prompt = begun(opened[0], encoder.begin)
    else:
        prompt = _checked(encoder, example.prompt, example.where)
    texts = iter(continued)
    responses = [
        ended(next(texts), encoder.end)
        if isinstance(response, str)
        else _checked(encoder, response, example.where)
        for response in example.responses
    ]
    return prompt, responses


def _reason_to_drop(
    encoder: Encoder, prompt: list[int], responses: list[list[int]], text: Texts
) -> str | None:
    if len(responses) > 1 and _all_equal(responses):
        return "identical responses"
    if any(not reply.strip() for reply in text.replies):
        return "empty response"
    if any(not ids or ids == [encoder.end] for ids in responses):
        return "empty response"
    if not prompt:
        return "empty prompt"
    return None


def _all_equal(rows: Sequence[list[int]]) -> bool:
    return all(row == rows[0] for row in rows)


def _closed(encoder: Encoder, ids: list[int]) -> list[int]:
    """A chat reply with the token that closes the turn: the template's own, else the end token."""
    added = encoder.tokenizer.added_tokens_decoder
    closed = bool(ids) and ids[-1] in added and added[ids[-1]].special
    return ids if closed else [*ids, encoder.end]


def _checked(encoder: Encoder, content: Content, where: str) -> list[int]:
    """Ids as the user gave them, refused where the vocabulary does not have them."""
    ids: Any = content
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise InputError(f"{where}: expected token ids, found {token!r}: give integers or text")
        if not 0 <= token < encoder.vocab_size:
            raise InputError(
                f"{where}: token id {token} is outside the vocabulary of "
                f"{encoder.tokenizer.name_or_path!r} ({encoder.vocab_size} tokens): the ids come "
                "from another tokenizer"
            )
    return [int(token) for token in ids]


def _is_chat(content: Content | None) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)
