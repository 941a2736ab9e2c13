"""What answers are judged by: gold, proxy, exact KL, wins over pi0, length, refusals, diversity.

Everything is per prompt, averaged over its answers; prompts are the independent units. The KL is
the sum over an answer's tokens of the exact conditional divergence, unbiased for KL(pi || pi0).

Axes: ``B`` prompts, ``K`` answers, ``C`` tokens, ``N`` draws of which the best is taken.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from experiments.frontier.evaluate import distinct
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training.evaluate import kl_along
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import Judge, token_rows

_REFUSAL = re.compile(
    r"\b(i'?m sorry|i am sorry|i can'?t|i cannot|i'?m (not able|unable)|i won'?t|as an ai|"
    r"not (appropriate|comfortable)|i'?m not sure)\b",
    re.IGNORECASE,
)
Measure = Callable[[Any, Ragged, Ragged], np.ndarray]
"""``measure((params, pi0), prompts, responses) -> KL of each token [B, K, C]``, nats."""


class Judged(NamedTuple):
    """One policy on one set of prompts."""

    gold: Float[np.ndarray, " B"]
    gold_gain: Float[np.ndarray, " B"]
    """Less that of pi0's answers to the prompt."""
    proxy_gain: Float[np.ndarray, " B"]
    """The same of the proxies' mean."""
    kl: Float[np.ndarray, " B"]
    wins: Float[np.ndarray, " B"]
    """Share of comparisons with pi0's answers won by gold; a tie counts one half."""
    length: Float[np.ndarray, " B"]
    refusals: Float[np.ndarray, " B"]
    distinct_2: Float[np.ndarray, " B"]
    """Share of the pairs of neighbouring tokens of a prompt's answers that are different."""


class Answer(NamedTuple):
    """For people to read."""

    prompt: int
    ids: list[int]
    gold: float
    proxy: float
    token_kl: list[float]


def measure(model: LanguageModel, *, rows: int) -> Measure:
    """Compile the exact conditional divergence of every token."""

    def one(params: Any, prompts: Ragged, responses: Ragged) -> jax.Array:
        policy, base = params
        return kl_along(model, policy, prompts, responses, reference=(model, base)).kl

    return mapped(one, rows=rows)


def refuses(text: str) -> bool:
    """Whether an answer begins by declining, by words that such answers have."""
    return bool(_REFUSAL.search(text[:120].replace("’", "'")))


def judge(
    prompts: Ragged,
    drawn: Ragged,
    base: Ragged,
    kl: Float[np.ndarray, "B K C"],
    *,
    gold: Judge,
    proxy: Judge,
    decode: Callable[[Sequence[int]], str],
) -> tuple[Judged, list[Answer]]:
    """Judge a policy's answers beside pi0's; of each prompt the first answer is kept to read."""
    ours, usual = gold(prompts, drawn), gold(prompts, base)
    believed, believed_base = proxy(prompts, drawn), proxy(prompts, base)
    samples = ours.shape[1]
    rows = token_rows(
        Ragged(
            np.asarray(drawn.ids).reshape(ours.size, -1),  # pyright: ignore[reportArgumentType]
            np.asarray(drawn.lengths).reshape(-1),  # pyright: ignore[reportArgumentType]
        )
    )
    declined = np.array([refuses(decode(row)) for row in rows]).reshape(ours.shape)
    judged = Judged(
        gold=ours.mean(1),
        gold_gain=ours.mean(1) - usual.mean(1),
        proxy_gain=believed.mean(1) - believed_base.mean(1),
        kl=kl.sum(-1).mean(1),
        wins=(0.5 + 0.5 * np.sign(ours[:, :, None] - usual[:, None, :])).mean((1, 2)),
        length=np.asarray(drawn.lengths, np.float64).mean(1),
        refusals=declined.mean(1),
        distinct_2=distinct(drawn, 2),
    )
    answers = [
        Answer(
            number,
            [int(token) for token in rows[number * samples]],
            float(ours[number, 0]),
            float(believed[number, 0]),
            [round(float(x), 4) for x in kl[number, 0, : len(rows[number * samples])]],
        )
        for number in range(len(ours))
    ]
    return judged, answers


def best_of(
    believed: Float[np.ndarray, "B N"], gold: Float[np.ndarray, "B N"], n: int
) -> Float[np.ndarray, " B"]:
    r"""Expected gold of the best of n by what is believed, from N draws, without bias.

    Averaged over all subsets of n of the N: the one of rank i from below is best of
    :math:`\binom{i - 1}{n - 1}` of them.

    >>> best_of(np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, 0.0, 6.0]]), 2).tolist()  # 0, 6, 6
    [4.0]
    """
    draws = believed.shape[1]
    weight = np.array([math.comb(i, n - 1) for i in range(draws)], np.float64)
    order = np.argsort(believed, axis=1, kind="stable")
    return np.take_along_axis(gold, order, 1) @ (weight / math.comb(draws, n))


def best_of_kl(n: int) -> float:
    """log n - (n - 1) / n, the KL of best-of-n where no two rewards are equal, nats."""
    return math.log(n) - (n - 1) / n
