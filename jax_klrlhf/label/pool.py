"""Prompts with several answers each, and features of the answers that a linear reward reads.

Axes: ``B`` prompts, ``K`` answers (fewer at some prompts), ``A`` all answers, ``D`` features.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jax_klrlhf.data.examples import Columns, Content
from jax_klrlhf.data.sources import open_source
from jax_klrlhf.errors import InputError
from jax_klrlhf.labelling import Pair

Features = Callable[[Sequence[tuple[Content, str]]], Float[np.ndarray, "A D"]]
"""``features(answers)`` of ``(prompt, text)``: any numbers; they are centred and scaled after."""

_WORD = re.compile(r"\w+")
_ANSWERS = ("answers", "responses", "response", "chosen", "rejected", "policy", "reference", "text")
"""Columns that answers are read from: of preferences, of `klrlhf generate` and `klrlhf eval`."""


@dataclass(frozen=True)
class Pool:
    """Prompts, the different answers to each, and features ``[A, D]`` of all answers in order.

    Features lie in the unit ball around their mean, as the theory has them: every norm of a
    difference is at most 2.
    """

    prompts: Sequence[Content]
    answers: Sequence[Sequence[str]]
    features: Float[np.ndarray, "A D"]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Content],
        answers: Sequence[Sequence[str]],
        *,
        features: Features | None = None,
    ) -> "Pool":
        """A pool; copies of an answer are one, and prompts with fewer than two are left out.

        ``features`` are :func:`word_features` by default, or :func:`model_features`.

        Raises:
            ValueError: where prompts and answers differ in number, or no prompt has two answers,
                or features are not one finite row for each answer.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"Pool: {len(prompts)} prompts, {len(answers)} lists of answers.")
        kept = [
            (prompt, different)
            for prompt, some in zip(prompts, answers, strict=True)
            if len(different := list(dict.fromkeys(some))) > 1
        ]
        if not kept:
            raise ValueError("Pool: no prompt has two different answers; there is nothing to ask.")
        flat = [(prompt, text) for prompt, some in kept for text in some]
        found = np.asarray((features or word_features)(flat), np.float32)
        if found.ndim != 2 or len(found) != len(flat) or not np.isfinite(found).all():
            raise ValueError(
                f"Pool: features have shape {found.shape} for {len(flat)} answers, or are not "
                "finite; give one row to each."
            )
        found = found - found.mean(0)
        largest = float(np.linalg.norm(found, axis=-1).max())
        return cls(
            [prompt for prompt, _ in kept],
            [some for _, some in kept],
            found / (largest or 1.0),
        )

    @classmethod
    def read(
        cls,
        source: str | Path,
        *,
        columns: Columns | None = None,
        split: str | None = None,
        count: int | None = None,
        features: Features | None = None,
    ) -> "Pool":
        """A pool from a file, folder, or hub id of prompts and answers.

        A prompt's answers may stand in one record or in several: in a column of responses, in
        ``chosen`` and ``rejected``, in what ``klrlhf generate`` or ``klrlhf eval`` wrote to its
        ``--output``. ``count`` keeps the first so many prompts.

        Raises:
            InputError: naming file, line and column, or where no prompt has two answers.
        """
        found: dict[str, tuple[Content, list[str]]] = {}
        for where, record in open_source(source, split=split).records():
            prompt, texts = _answers(record, columns or Columns(), where)
            if repr(prompt) not in found and count is not None and len(found) == count:
                continue
            found.setdefault(repr(prompt), (prompt, []))[1].extend(texts)
        try:
            return cls.of(
                [prompt for prompt, _ in found.values()],
                [texts for _, texts in found.values()],
                features=features,
            )
        except ValueError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def of_pairs(cls, pairs: Iterable[Pair], *, features: Features | None = None) -> "Pool":
        """The pool of pairs that somebody else has chosen. Raises as :meth:`of`."""
        found: dict[str, tuple[Content, list[str]]] = {}
        for pair in pairs:
            of_prompt = found.setdefault(repr(pair.prompt), (pair.prompt, []))
            of_prompt[1].extend((pair.first, pair.second))
        values = found.values()
        return cls.of([p for p, _ in values], [texts for _, texts in values], features=features)

    def rows(self) -> dict[tuple[str, str], int]:
        """Row of the features of each ``(repr(prompt), text)``."""
        flat = (
            (repr(prompt), text)
            for prompt, some in zip(self.prompts, self.answers, strict=True)
            for text in some
        )
        return {key: row for row, key in enumerate(flat)}


def word_features(
    answers: Sequence[tuple[Content, str]], *, dim: int = 32, words: int = 4000
) -> Float[np.ndarray, "A D"]:
    """Principal components of the answers' words, and their length: features without a model.

    The ``words`` most frequent words are counted as log(1 + count), each answer scaled to norm 1,
    and the ``dim`` leading principal components kept; beside them stands the standardized log of
    the number of words, at the size of the largest component.
    """
    counted = [Counter(_WORD.findall(text.lower())) for _, text in answers]
    total: Counter[str] = Counter()
    for counts in counted:
        total.update(counts)
    column = {word: number for number, (word, _) in enumerate(total.most_common(words))}
    table = np.zeros((len(answers), max(len(column), 1)))
    for row, counts in enumerate(counted):
        for word, count in counts.items():
            if word in column:
                table[row, column[word]] = np.log1p(count)
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    table -= table.mean(0)
    # Of the smaller of the two Gram matrices: its eigenvectors give the components.
    if table.shape[0] <= table.shape[1]:
        values, vectors = np.linalg.eigh(table @ table.T)
        parts = vectors[:, ::-1][:, :dim] * np.sqrt(np.maximum(values[::-1][:dim], 0))
    else:
        _, vectors = np.linalg.eigh(table.T @ table)
        parts = table @ vectors[:, ::-1][:, :dim]
    length = np.log1p([counts.total() for counts in counted])
    spread = float(length.std())
    size = float(parts.std(0).max()) or 1.0
    length = size * (length - length.mean()) / spread if spread > 0 else 0 * length
    return np.concatenate([parts, length[:, None]], 1)


def model_features(model: str, *, rows: int = 16, length: int = 1024) -> Features:
    """Mean hidden states of a model over each answer, as ``klrlhf iterate`` has them.

    Args:
        model: folder or hub id; it needs a tokenizer.
        rows: answers at one time.
        length: tokens of prompt and answer that are read at most.

    Raises:
        InputError: where there is no such model, or no tokenizer with it.
    """
    from jax_klrlhf import models
    from jax_klrlhf.data import tokenize
    from jax_klrlhf.data.texts import batch_of_texts
    from jax_klrlhf.models import reward as rewards
    from jax_klrlhf.training.rounds.compute import mapped
    from jax_klrlhf.training.rounds.parts import ragged

    loaded = models.load(model)
    if loaded.tokenizer is None:
        raise InputError(f"{model}: the folder has no tokenizer, which answers need.")
    encoder = tokenize.encoder(loaded.tokenizer)
    most = min(length, loaded.model.max_length)

    def pooled(params: Any, prompts: Any, responses: Any) -> Any:
        return rewards.features(loaded.model, params, prompts, responses, pooling=rewards.mean)

    program = mapped(pooled, rows=rows)

    def features(answers: Sequence[tuple[Content, str]]) -> Float[np.ndarray, "A D"]:
        batch = batch_of_texts(
            encoder,
            [prompt for prompt, _ in answers],
            [
                [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]]
                for prompt, text in answers
            ],
            max_prompt_length=most // 2,
            max_response_length=most // 2,
        )
        found = program(loaded.params, ragged(*batch.prompts), ragged(*batch.responses))
        return np.asarray(found, np.float32)[:, 0]

    return features


def _answers(record: Mapping[str, Any], columns: Columns, where: str) -> tuple[Content, list[str]]:
    if record.get(columns.prompt) is None:
        raise InputError(
            f"{where}: no column {columns.prompt!r}; there are {', '.join(map(str, record))}; name "
            "yours with --columns.prompt."
        )
    prompt: Any = record[columns.prompt]
    if not isinstance(prompt, str):
        prompt = list(prompt)
        if not all(isinstance(x, Mapping) and {"role", "content"} <= x.keys() for x in prompt):
            raise InputError(f"{where}, column {columns.prompt!r}: neither text nor a chat.")
        prompt = [{"role": str(x["role"]), "content": str(x["content"])} for x in prompt]
    names = (columns.responses, columns.response, columns.chosen, columns.rejected, *_ANSWERS)
    texts: list[str] = []
    for name in dict.fromkeys(names):
        # `klrlhf generate` says which model answered; a policy's name is no answer.
        if record.get(name) is None or (name == "policy" and isinstance(record[name], str)):
            continue
        value = record[name]
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        chat = listed and value and isinstance(value[0], Mapping)
        for item in [value] if chat or not listed else value:
            texts.append(_text(item, f"{where}, column {name!r}"))
    if not texts:
        raise InputError(
            f"{where}: no answer; columns found: {', '.join(map(str, record))}; name yours with "
            "--columns.responses, --columns.chosen, ..."
        )
    return prompt, texts


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[-1], Mapping):
        value = value[-1]
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return value["content"]
    raise InputError(f"{where}: an answer must be text or a message, found {str(value)[:60]!r}.")
