"""Between K ranked responses and pairs: how a source's comparisons become rows.

Losses on pairs read the first two responses of a row. These functions, handed to
:func:`prepare.build` as ``arrange=``, turn ranked responses into pairs, and pairs that share their
prompt into one row whose prompt is computed once.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import TypeAlias

from jax_klrlhf.data.examples import Content, Example

Arrangement: TypeAlias = Callable[[Iterable[Example]], Iterator[Example]]


def as_is(examples: Iterable[Example]) -> Iterator[Example]:
    """Every example as one row."""
    yield from examples


def best_worst(examples: Iterable[Example]) -> Iterator[Example]:
    """The best response against the worst: one pair for each prompt.

    Examples whose responses all have one score, and those with fewer than two, give nothing.
    """
    for example in examples:
        if len(example.responses) > 1 and example.scores[0] > example.scores[-1]:
            yield _pair(example, 0, -1)


def all_pairs(examples: Iterable[Example]) -> Iterator[Example]:
    """Every better response against every worse one; equal scores make no pair."""
    for example in examples:
        for first, second in combinations(range(len(example.responses)), 2):
            if example.scores[first] > example.scores[second]:
                yield _pair(example, first, second)


def grouped(examples: Iterable[Example]) -> Iterator[Example]:
    """All responses to one prompt in one row, scored by comparisons won less comparisons lost.

    Where the pairs come from one ranking of the responses, the score orders them by it. Prompts
    come in the order of their first appearance; all examples are held in memory. Examples with an
    implicit prompt stay as they are; a group's label is 1 and its weight the mean of its pairs'.
    """
    groups: dict[str, list[Example]] = {}
    for number, example in enumerate(examples):
        key = json.dumps(example.prompt) if example.prompt is not None else f"implicit {number}"
        groups.setdefault(key, []).append(example)
    for members in groups.values():
        yield members[0] if len(members) == 1 else _group(members)


def _group(members: list[Example]) -> Example:
    score: dict[str, float] = {}
    content: dict[str, Content] = {}
    for example in members:
        keys = [json.dumps(response) for response in example.responses]
        content.update(zip(keys, example.responses, strict=True))
        for key in keys:
            score.setdefault(key, 0.0)
        for first, second in combinations(range(len(keys)), 2):
            if example.scores[first] > example.scores[second]:
                score[keys[first]] += 1.0
                score[keys[second]] -= 1.0
    order = sorted(score, key=lambda key: -score[key])
    return members[0]._replace(
        responses=[content[key] for key in order],
        scores=[score[key] for key in order],
        label=1.0,
        weight=sum(example.weight for example in members) / len(members),
    )


def _pair(example: Example, first: int, second: int) -> Example:
    return example._replace(
        responses=[example.responses[first], example.responses[second]],
        scores=[example.scores[first], example.scores[second]],
    )
