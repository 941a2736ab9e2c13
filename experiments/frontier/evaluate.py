"""What a policy is judged by, on prompts it did not learn from: gold, proxy, KL, and its manner.

Everything is per prompt, averaged over its responses: prompts are the independent units. pi0's own
responses to the same prompts are the yardstick of gains and wins, the same ones for every method.

Axes: ``B`` prompts, ``K`` responses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from experiments.frontier.world import Place
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training.evaluate import kl_along
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import Scored, pick, ragged, token_rows
from jax_klrlhf.training.rounds.samplers import Draw

Score = Callable[[Ragged, Ragged], Scored]


class Judged(NamedTuple):
    """One policy on one set of prompts."""

    gold: Float[np.ndarray, " B"]
    """Gold reward, nats."""
    gold_gain: Float[np.ndarray, " B"]
    """Less that of pi0's responses to the prompt."""
    second_gain: Float[np.ndarray, " B"]
    """The same by the second judge; NaN where there is none."""
    proxy_gain: Float[np.ndarray, " B"]
    """The same of the reward that the method believed in at the end."""
    kl: Float[np.ndarray, " B"]
    """KL(pi || pi0) of a response, nats; of best-of-n its bound log n - (n - 1) / n."""
    wins: Float[np.ndarray, " B"]
    """Share of comparisons with pi0's responses won by gold; a tie counts one half."""
    length: Float[np.ndarray, " B"]
    """Tokens."""
    entropy: Float[np.ndarray, " B"]
    """Of the law of responses, nats; NaN where the law is not known (best-of-n)."""
    distinct_1: Float[np.ndarray, " B"]
    """Share of the tokens of a prompt's K responses that are different."""
    distinct_2: Float[np.ndarray, " B"]
    """The same of pairs of neighbouring tokens."""


Answer = Callable[[Key[Array, ""], Ragged], Ragged]
"""``answer(key, prompts) -> responses [B, K, C]``."""
Measure = Callable[[Any, Ragged, Ragged], tuple[np.ndarray, np.ndarray]]
"""``measure((params, pi0), prompts, responses) -> KL and entropy [B, K]``."""


def measure(model: LanguageModel, *, rows: int) -> Measure:
    """Compile the exact conditional divergence and entropy, summed over a response's tokens.

    Averaged over a policy's own responses they are unbiased for KL(pi || pi0) and the entropy.
    """

    def both(params: Any, prompts: Ragged, responses: Ragged) -> tuple[Array, Array]:
        policy, base = params
        found = kl_along(model, policy, prompts, responses, reference=(model, base))
        return found.kl.sum(-1), found.entropy.sum(-1)

    return mapped(both, rows=rows)


def judge(
    key: Key[Array, ""],
    place: Place,
    prompts: Ragged,
    *,
    answer: Answer,
    law: Callable[[Ragged], tuple[np.ndarray, np.ndarray]],
    score: Score,
    base: Ragged,
) -> Judged:
    """Draw responses and judge them.

    Args:
        key: of the draw; the same for every method of a seed.
        place: who judges.
        prompts: ``[B, P]``.
        answer: the policy.
        law: KL and entropy of drawn responses, ``[B, K]``.
        score: what the method believes of responses.
        base: pi0's responses ``[B, K, C]``.
    """
    drawn = answer(key, prompts)
    gold, usual = place.judge(prompts, drawn), place.judge(prompts, base)
    believed = score(prompts, drawn).reward.mean(1) - score(prompts, base).reward.mean(1)
    kl, entropy = law(drawn)
    return Judged(
        gold=gold.mean(1),
        gold_gain=gold.mean(1) - usual.mean(1),
        second_gain=place.judge_again(prompts, drawn).mean(1)
        - place.judge_again(prompts, base).mean(1),
        proxy_gain=np.asarray(believed),
        kl=np.asarray(kl).mean(1),
        wins=(0.5 + 0.5 * np.sign(gold[:, :, None] - usual[:, None, :])).mean((1, 2)),
        length=np.asarray(drawn.lengths, np.float64).mean(1),
        entropy=np.asarray(entropy).mean(1),
        distinct_1=distinct(drawn, 1),
        distinct_2=distinct(drawn, 2),
    )


def distinct(responses: Ragged, n: int) -> Float[np.ndarray, " B"]:
    """Share of the n-grams of a prompt's responses that are different; 0 where there are none."""
    found = []
    for ids, lengths in zip(np.asarray(responses.ids), np.asarray(responses.lengths), strict=True):
        rows = token_rows(ragged(ids, lengths))
        grams = [row[i : i + n] for row in rows for i in range(len(row) - n + 1)]
        found.append(len(set(grams)) / max(len(grams), 1))
    return np.array(found)


def best_of(draw: Draw, params: Any, score: Score, *, n: int) -> Answer:
    """K answers that are each the best of n by ``score``, drawn K at a time.

    ``rounds.best_of_n`` gives one answer to a prompt and compiles for each n; this draws with the
    program that every policy is judged by.
    """

    def answer(key: Key[Array, ""], prompts: Ragged) -> Ragged:
        kept = draw(jax.random.fold_in(key, 0), params, prompts)
        best = score(prompts, kept).reward
        for number in range(1, n):
            fresh = draw(jax.random.fold_in(key, number), params, prompts)
            reward = score(prompts, fresh).reward
            better = reward > best
            index = np.arange(best.shape[1])[None] + np.where(better, best.shape[1], 0)
            both = ragged(
                np.concatenate([kept.ids, fresh.ids], 1),
                np.concatenate([kept.lengths, fresh.lengths], 1),
            )
            kept, best = pick(both, index), np.where(better, reward, best)
        return kept

    return answer


def agreement(gold: Float[np.ndarray, "B K"], believed: Float[np.ndarray, "B K"]) -> float:
    """Correlation of two rewards among the responses of a prompt, pooled over prompts."""
    one, two = (x - x.mean(1, keepdims=True) for x in (gold, believed))
    return float((one * two).sum() / max(np.sqrt((one**2).sum() * (two**2).sum()), 1e-12))
