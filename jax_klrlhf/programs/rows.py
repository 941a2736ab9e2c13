"""Prompts and preferences of a source as ``klrlhf iterate`` takes them."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jax_klrlhf.core import sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import examples, tokenize
from jax_klrlhf.data.rows import Dropped, Row, encode
from jax_klrlhf.data.sources import lines, open_source
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.iterate_config import IterateConfig
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.parts import Comparisons, Sampler, ragged

WIDTH = 8
"""Rows of tokens are as wide as a multiple of this."""


def read_rows(
    source: str, config: IterateConfig, encoder: tokenize.Encoder, *, split: str | None
) -> list[Row]:
    """A source of prompts or preferences in token ids; bad and empty rows are left out.

    Raises:
        InputError: naming file, line and column, or where nothing is left.
    """
    found = read_examples(source, config, split=split)
    rows, dropped = [], None
    for row in encode(
        encoder,
        found,
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
    ):
        if isinstance(row, Dropped):
            dropped = row
        else:
            rows.append(row)
    if not rows:
        why = "no line in it" if dropped is None else f"{dropped.where}: {dropped.reason}"
        raise InputError(f"{source}: no row left to use ({why}).")
    return rows


def read_examples(source: str, config: Any, *, split: str | None) -> Iterator[examples.Example]:
    """A source of prompts or preferences: lines of a text file, or anything that data come in.

    Raises:
        InputError: naming file, line and column.
    """
    path = Path(source).expanduser()
    if path.suffix == ".txt":
        found = (
            examples.Example(line, [], [], where=f"{path}, line {number}")
            for number, line in lines(path)
        )
    else:
        found = open_source(source, split=split).examples(columns=config.columns)
    return (_as_chat(example) for example in found) if config.chat else iter(found)


def _as_chat(example: examples.Example) -> examples.Example:
    if not isinstance(example.prompt, str):
        return example
    replies: Any = [
        [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        for text in example.responses
    ]
    return example._replace(prompt=[{"role": "user", "content": example.prompt}], responses=replies)


def distinct_prompts(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """Prompts in the order of their first appearance."""
    return list(dict.fromkeys(tuple(row.prompt) for row in rows))


def padded(prompts: Sequence[Sequence[int]], *, width: int | None = None) -> Ragged:
    """Prompts ``[B, P]`` on the host."""
    longest = width or max(len(prompt) for prompt in prompts)
    return ragged(*sequence.pad(prompts, length=-(-longest // WIDTH) * WIDTH))


def as_comparisons(rows: Sequence[Row], name: str) -> Comparisons:
    """Every better response against every worse one of its row.

    Raises:
        InputError: where there is no pair.
    """
    found = [
        (row, (row.responses[i], row.responses[j]))
        for row in rows
        for i, j in combinations(range(len(row.responses)), 2)
        if row.scores[i] > row.scores[j] and row.responses[i] != row.responses[j]
    ]
    if not found:
        raise InputError(f"{name}: no two responses of different worth to one prompt.")
    width = max(len(response) for _, pair in found for response in pair)
    responses = sequence.pad([r for _, pair in found for r in pair], length=width)
    return Comparisons(
        padded([row.prompt for row, _ in found]),
        ragged(
            np.asarray(responses.ids).reshape(-1, 2, width),
            np.asarray(responses.lengths).reshape(-1, 2),
        ),
        np.array([row.label for row, _ in found], np.float32),
        np.array([row.weight for row, _ in found], np.float32),
    )


def recorded_pool(rows: Sequence[Row], prompts: Sequence[tuple[int, ...]]) -> Sampler:
    """All responses recorded for each of ``prompts``; where there are fewer, the first again."""
    known: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {p: {} for p in prompts}
    for row in rows:
        if tuple(row.prompt) in known:
            known[tuple(row.prompt)].update(dict.fromkeys(map(tuple, row.responses)))
    most = max(len(responses) for responses in known.values())
    filled = []
    for responses in known.values():
        first = next(iter(responses))
        filled += [*responses, *[first] * (most - len(responses))]
    found = sequence.pad(filled)
    return rounds.pool(
        padded(prompts),
        ragged(
            np.asarray(found.ids).reshape(len(prompts), most, -1),
            np.asarray(found.lengths).reshape(len(prompts), most),
        ),
    )
