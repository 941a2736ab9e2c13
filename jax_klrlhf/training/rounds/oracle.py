"""Who labels: a gold reward by a preference model, recorded choices, a reward model, or people.

A *judge* is any function ``(prompts, responses) -> reward [B, K]``; an oracle makes preferences of
it by a preference model, so that a learner sees labels and never the reward. Noise then swaps
a label at a known rate.

Axes: ``B`` prompts, ``K`` responses, ``N`` pairs.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jax_klrlhf import labelling, placement
from jax_klrlhf.core import preferences
from jax_klrlhf.core.preferences import PreferenceModel
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models import sampling
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import (
    Comparisons,
    Judge,
    Labels,
    Oracle,
    ragged,
    token_rows,
)

Translate = Callable[[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
"""``translate(prompt, response)``: ids of the policy's to ids of the judge's."""


def annotator(
    judge: Judge, *, preference: PreferenceModel = preferences.bradley_terry, noise: float = 0.0
) -> Oracle:
    """Draws labels of pairs from a preference model at the rewards of a judge.

    Args:
        judge: the reward that the annotator has in mind, in nats of the logit.
        preference: what a label means (:mod:`core.preferences`).
        noise: rate at which a label is then taken for its opposite, in [0, 1/2].

    Raises:
        ValueError: for a rate out of range; when called on rewards that are not finite.
    """
    _check_noise(noise)

    def oracle(key: Key[Array, ""], prompts: Ragged, responses: Ragged) -> Labels:
        margin = jnp.asarray(_margin(judge, prompts, responses))
        key_label, key_noise = jax.random.split(key)
        label = np.asarray(preference.sample(key_label, margin))
        swapped = np.asarray(jax.random.bernoulli(key_noise, noise, margin.shape))
        label = np.where(swapped, 1 - label, label)
        return Labels(label.astype(np.float32), np.ones(margin.shape, np.float32))

    return oracle


def bradley_terry(judge: Judge, *, noise: float = 0.0, tie: float = 0.0) -> Oracle:
    """:func:`annotator` by Bradley-Terry (arXiv 2312.11456, Definition 1).

    With ``tie`` > 0 by Rao and Kupper's model of that threshold: at equal rewards a tie, which is
    the label one half, has probability tanh(tie / 2).

    Raises:
        ValueError: for a rate or a threshold out of range.
    """
    if not tie >= 0:
        raise ValueError(f"tie must be at least 0, got {tie}")
    model = preferences.rao_kupper(tie) if tie else preferences.bradley_terry
    return annotator(judge, preference=model, noise=noise)


def expected(
    judge: Judge, *, preference: PreferenceModel = preferences.bradley_terry, noise: float = 0.0
) -> Oracle:
    """The mean label of each pair as a soft label: an annotator asked without end.

    Arguments as of :func:`annotator`.
    """
    _check_noise(noise)

    def oracle(key: Key[Array, ""], prompts: Ragged, responses: Ragged) -> Labels:
        del key
        wins = np.asarray(preference.mean(jnp.asarray(_margin(judge, prompts, responses))))
        label = (1 - noise) * wins + noise * (1 - wins)
        return Labels(label.astype(np.float32), np.ones(label.shape, np.float32))

    return oracle


def _check_noise(noise: float) -> None:
    if not 0 <= noise <= 0.5:
        raise ValueError(f"noise must lie in [0, 0.5], got {noise}")


def recorded(comparisons: Comparisons) -> Oracle:
    """Looks a pair up among recorded ones, in either order; abstains (weight 0) where it is new.

    A pair that was recorded several times has the weighted mean of its labels, and their weight.
    """
    sums: dict[Any, list[float]] = {}
    for asked, label, weight in zip(
        _pairs(comparisons.prompts, comparisons.responses),
        comparisons.label.tolist(),
        comparisons.weight.tolist(),
        strict=True,
    ):
        prompt, first, second = asked
        for pair, said in (((prompt, first, second), label), ((prompt, second, first), 1 - label)):
            total = sums.setdefault(pair, [0.0, 0.0])
            total[0] += weight * said
            total[1] += weight

    def oracle(key: Key[Array, ""], prompts: Ragged, responses: Ragged) -> Labels:
        del key
        found = [sums.get(pair, (0.0, 0.0)) for pair in _pairs(prompts, responses)]
        label = [total / weight if weight else 0.5 for total, weight in found]
        weights = [weight for _, weight in found]
        return Labels(np.array(label, np.float32), np.array(weights, np.float32))

    return oracle


def human(
    folder: str | os.PathLike[str],
    decode: Callable[[list[int]], str],
    *,
    each: int = 1,
    poll: float = 1.0,
    say: Callable[[int, int], None] | None = None,
) -> Oracle:
    """People: pairs wait in a folder until somebody has labelled them, on the page of
    ``klrlhf label --output FOLDER`` or otherwise (:mod:`jax_klrlhf.labelling`).

    A label is the mean over the annotators of a pair, and weighs as many as said something. What
    was labelled before, by a run that was killed say, is not asked again; a pair that was skipped,
    or whose answers are the same text, has weight 0.

    Args:
        folder: where pairs wait and labels are.
        decode: text of token ids, as :meth:`data.tokenize.Encoder.decode` makes it.
        each: how many people are asked of each pair.
        poll: seconds between two looks.
        say: ``say(labelled, pairs)``, called at first and whenever there are more.

    Raises:
        ValueError: where ``each`` is less than 1. When called, ``InputError`` where the folder
            cannot be read or written, or all pairs were skipped.
    """
    folder = Path(folder)
    if each < 1:
        raise ValueError(f"human: each must be at least 1 person, got {each}")

    def oracle(key: Key[Array, ""], prompts: Ragged, responses: Ragged) -> Labels:
        del key
        asked = [tuple(decode(list(ids)) for ids in rows) for rows in _pairs(prompts, responses)]
        pairs = [
            None if one == two else labelling.pair_of(prompt, one, two)
            for prompt, one, two in asked
        ]
        waiting = {pair.name: pair for pair, _ in filter(None, pairs)}
        count = np.zeros(2, np.int32)
        placement.lead(lambda: labelling.write_pairs(folder, waiting.values(), each=each))

        def look() -> None:
            found = labelling.votes(labelling.read_labels(folder))
            done = sum(name in found and found[name].people >= each for name in waiting)
            if say is not None and (done > count[1] or count[0] == 0):
                say(done, len(waiting))
            count[:] = 1, done

        def finished() -> bool:
            placement.lead(look)  # The first process looks, and all hear of it.
            return placement.agreed(bool(count[1] == len(waiting)))

        while not finished():
            time.sleep(poll)

        def said() -> np.ndarray:
            found = labelling.votes(labelling.read_labels(folder))
            rows = []
            for pair in pairs:
                if pair is None:
                    rows.append((0.5, 0.0))
                    continue
                vote = found[pair[0].name]
                rows.append((1 - vote.label if pair[1] else vote.label, vote.weight))
            if not any(weight for _, weight in rows):
                raise InputError(
                    f"{folder}: all {len(rows)} pairs were skipped, so that there is nothing to "
                    f"learn from; remove their lines from {labelling.LABELS} to be asked again."
                )
            return np.array(rows, np.float32)

        label, weight = placement.shared(said, jax.ShapeDtypeStruct((len(pairs), 2), np.float32)).T
        return Labels(label, weight)

    return oracle


def texts(
    reward: Callable[[Sequence[str]], Any],
    decode: Callable[[list[int]], str],
) -> Judge:
    """A judge that reads the text of a response: ``reward(texts) -> [n]``, ``decode(ids)``."""

    def judge(prompts: Ragged, responses: Ragged) -> np.ndarray:
        del prompts
        ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
        rows = zip(ids.reshape(-1, ids.shape[-1]), lengths.reshape(-1), strict=True)
        found = reward([decode(row[:length].tolist()) for row, length in rows])
        return np.asarray(found, np.float32).reshape(lengths.shape)

    return judge


def prompted(
    reward: Callable[[Sequence[str], Sequence[str]], Any],
    decode: Callable[[list[int]], str],
) -> Judge:
    """A judge that reads text: ``reward(prompts, texts) -> [n]``, one prompt to each response.

    ``decode(ids)`` makes text of token ids, as :meth:`data.tokenize.Encoder.decode` does; prompts
    are then as the model reads them, special tokens left out.

    When called, raises ``ValueError`` where the rewards are not one finite number to each response.
    """

    def judge(prompts: Ragged, responses: Ragged) -> np.ndarray:
        lengths = np.asarray(responses.lengths)
        flat = Ragged(
            np.asarray(responses.ids).reshape(lengths.size, -1),  # pyright: ignore[reportArgumentType]
            lengths.reshape(-1),  # pyright: ignore[reportArgumentType]
        )
        asked = [decode(list(row)) for row in token_rows(prompts)]
        said = [decode(list(row)) for row in token_rows(flat)]
        found = np.asarray(reward(list(np.repeat(asked, lengths.shape[1])), said), np.float32)
        if found.shape != (lengths.size,):
            raise ValueError(
                f"the reward returned shape {found.shape} for {lengths.size} prompts and as many "
                "texts; it must return one number to each."
            )
        if not np.isfinite(found).all():
            row = int(np.argmin(np.isfinite(found)))
            raise ValueError(f"the reward of text {row}, {said[row]!r}, is {found[row]}.")
        return found.reshape(lengths.shape)

    return judge


def reward_model(
    path: str | os.PathLike[str],
    *,
    pooling: Callable[[Array, Array, Array], Array] = rewards.last,
    rows: int = 64,
    mesh: Mesh | None = None,
    translate: Translate | None = None,
) -> Judge:
    """The reward model in a folder, or of a hub id, as a judge (:func:`models.reward.load`).

    It reads the policy's token ids, or, where its tokenizer is another, what ``translate`` makes of
    them (:func:`retokenized`). Raises ``InputError`` where the folder holds no reward model.
    """
    loaded = rewards.load(path, mesh=mesh)
    score = mapped(
        lambda params, prompts, responses: rewards.reward(
            loaded.model, params, prompts, responses, pooling=pooling
        ),
        rows=rows,
        mesh=mesh,
    )
    judge = lambda prompts, responses: score(loaded.params, prompts, responses)  # noqa: E731
    if translate is None:
        return judge
    return retokenized(judge, translate, longest=loaded.model.max_length)


def retokenized(judge: Judge, translate: Translate, *, longest: int) -> Judge:
    """A judge of another vocabulary: it reads the same text in its own tokens.

    A row that has more than its context of ``longest`` tokens loses the beginning of its prompt,
    and, if that is not enough, the end of its response.
    """

    def translated(prompts: Ragged, responses: Ragged) -> np.ndarray:
        shape = np.asarray(responses.lengths).shape
        ids = np.asarray(responses.ids).reshape(-1, np.asarray(responses.ids).shape[-1])
        answers = token_rows(ragged(ids, np.asarray(responses.lengths).reshape(-1)))
        asked = [row for row in token_rows(prompts) for _ in range(shape[1])]
        both = [translate(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
        then = [list(answer)[: longest - 1] for _, answer in both]
        first = [
            list(prompt)[-(longest - len(answer)) :]
            for (prompt, _), answer in zip(both, then, strict=True)
        ]
        # Each response beside its own prompt: what is cut of a prompt depends on the response.
        found = judge(_rows(first, longest), _each(_rows(then, longest)))
        return np.asarray(found, np.float32).reshape(shape)

    return translated


def _rows(rows: Sequence[Sequence[int]], longest: int) -> Ragged:
    """Rows of ids, padded to one of a few widths."""
    width = min(sampling.bucket(max(1, *map(len, rows))), longest)
    ids = [[*row, *[0] * (width - len(row))] for row in rows]
    return ragged(ids, [len(row) for row in rows])


def _each(rows: Ragged) -> Ragged:
    return ragged(np.asarray(rows.ids)[:, None], np.asarray(rows.lengths)[:, None])


def _margin(judge: Judge, prompts: Ragged, responses: Ragged) -> np.ndarray:
    reward = np.asarray(judge(prompts, responses), np.float32)
    count = np.asarray(responses.lengths).shape
    if reward.shape != count or count[-1] != 2:
        raise ValueError(
            f"the judge returned shape {reward.shape} for responses {count}; an oracle labels "
            "pairs, so both must be [N, 2]."
        )
    margin = reward[:, 0] - reward[:, 1]
    if not np.all(np.isfinite(margin)):
        row = int(np.argmin(np.isfinite(margin)))
        raise ValueError(f"the judge's rewards of pair {row} are {reward[row]}, not finite.")
    return margin


def _pairs(prompts: Ragged, responses: Ragged) -> list[tuple[Any, Any, Any]]:
    """(prompt, first, second) of each row, as tuples of ids."""
    one, two = (
        token_rows(Ragged(responses.ids[:, index], responses.lengths[:, index])) for index in (0, 1)
    )
    return list(zip(token_rows(prompts), one, two, strict=True))
