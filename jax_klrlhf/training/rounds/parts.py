"""What passes between the parts of an iterative run, and what each part is: a value handed in.

A round is six phases, and each part is a function of what the phases before it left:

========= ============================================================ =====================
phase     part                                                         leaves
========= ============================================================ =====================
sample    ``sampler(key, policies, prompts)``                          :class:`Drawn`
score     ``reward.score(belief, policies, prompts, responses)``       :class:`Scored`
pair      ``pair_rule(key, choices)`` (:mod:`core.pairs`)               :class:`Chosen`
label     ``oracle(key, prompts, responses)``                          :class:`Comparisons`
believe   ``reward.fit(key, belief, comparisons, policies)``           the belief (a pytree)
fit       ``improve(key, situation)``                                  the next policy
========= ============================================================ =====================

What is left is NumPy on the host, the same on every process; parameters stay where they are.

Axes: ``B`` prompts, ``K`` responses to a prompt, ``P`` prompt and ``C`` response positions, ``D``
features, ``N`` comparisons, ``M`` pairs made of one prompt's responses.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.results import Metric


class Policies(NamedTuple):
    """Parameters that a part may look at."""

    current: Any
    """The main agent's: the last policy fitted."""
    base: Any
    """pi0's."""
    reference: Any
    """Of the policy that the KL is taken to: pi0's, unless the run is the named ablation."""
    earlier: Sequence[Any]
    """Every policy so far, pi0 first and the current one last; read from disk on demand."""


class Drawn(NamedTuple):
    """Responses to prompts, and who gave them."""

    prompts: Ragged
    """ids ``[B, P]``."""
    responses: Ragged
    """ids ``[B, K, C]``."""
    agent: Int[np.ndarray, "B K"]
    """Which of the sampler's agents drew each response; 0 is the main agent."""


class Scored(NamedTuple):
    """What the learner believes of each response."""

    reward: Float[np.ndarray, "B K"]
    """In nats of the Bradley-Terry logit."""
    uncertainty: Float[np.ndarray, "B K"]
    """Of the reward, in the same unit; 0 where the belief has none."""
    features: Float[np.ndarray, "B K D"] | None = None
    """In coordinates in which the Euclidean norm of a difference is its uncertainty."""


class Chosen(NamedTuple):
    """Pairs of response numbers, ``[B, M]``; ``valid`` is False where none could be made."""

    first: Int[np.ndarray, "B M"]
    second: Int[np.ndarray, "B M"]
    valid: Bool[np.ndarray, "B M"]


class Labels(NamedTuple):
    """What an oracle says of pairs."""

    label: Float[np.ndarray, " N"]
    """Probability that the first is preferred: 1, 0, a half for a tie, or soft."""
    weight: Float[np.ndarray, " N"]
    """How much the label counts; 0: the oracle abstains."""


class Comparisons(NamedTuple):
    """Labelled pairs."""

    prompts: Ragged
    """ids ``[N, P]``."""
    responses: Ragged
    """ids ``[N, 2, C]``."""
    label: Float[np.ndarray, " N"]
    weight: Float[np.ndarray, " N"]


class Mixture(NamedTuple):
    """Data sets to learn from, and the share of every batch that each is given."""

    sources: Sequence[Comparisons]
    shares: Sequence[float] | None
    """None: all rows alike, whichever source they are in."""


class Situation(NamedTuple):
    """What policy improvement has to go by."""

    policies: Policies
    start: Any
    """Parameters that the fit begins from."""
    data: Mixture
    prompts: Ragged
    """This round's, for an improvement that draws for itself; ids ``[B, P]``."""
    score: Callable[[Ragged, Ragged], Scored]
    """What is believed, this round's labels included, of ``(prompts, responses)``."""
    folder: Path | None
    """Where a fit may keep checkpoints of its own."""


class Improved(NamedTuple):
    """The next policy, and what there is to say of how it was found."""

    params: Any
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What the learner believes of responses: a state, how it learns, and how it scores.

    The state is a pytree of arrays whose structure and shapes do not change, so that it can be
    left on disk.
    """

    init: Any
    """Belief before any comparison; ``()`` where nothing is learned."""
    fit: Callable[[Any, Any, Sequence[Comparisons], Policies], Any]
    """``fit(key, belief, comparisons, policies) -> belief``, from all comparisons so far."""
    score: Callable[[Any, Policies, Ragged, Ragged], Scored]
    """``score(belief, policies, prompts, responses) -> Scored``."""


Judge = Callable[[Ragged, Ragged], Any]
"""``judge(prompts [B, P], responses [B, K, C]) -> reward [B, K]``, on the host."""
Sampler = Callable[[Any, Policies, Ragged], Drawn]
Oracle = Callable[[Any, Ragged, Ragged], Labels]
Improve = Callable[[Any, Situation], Improved]
DataRule = Callable[[Comparisons | None, Sequence[Comparisons]], Mixture]
"""``setting(offline, history) -> Mixture``: which data a round learns from."""


def ragged(ids: Any, lengths: Any) -> Ragged:
    """Token rows on the host."""
    ids, lengths = np.asarray(ids, np.int32), np.asarray(lengths, np.int32)
    return Ragged(ids, lengths)  # pyright: ignore[reportArgumentType]  # NumPy: on the host


def token_rows(rows: Ragged) -> list[tuple[int, ...]]:
    """Token rows ``[N, L]`` without their padding."""
    pairs = zip(np.asarray(rows.ids), np.asarray(rows.lengths), strict=True)
    return [tuple(ids[:length].tolist()) for ids, length in pairs]


def widen(rows: Ragged, width: int) -> Ragged:
    """Rows padded with id 0 to at least ``width`` positions."""
    ids = np.asarray(rows.ids)
    pad = [(0, 0)] * (ids.ndim - 1) + [(0, max(0, width - ids.shape[-1]))]
    return ragged(np.pad(ids, pad), rows.lengths)


def pick(responses: Ragged, index: Int[np.ndarray, "B M"]) -> Ragged:
    """Responses ``[B, M, C]`` by their number at each prompt."""
    ids = np.take_along_axis(np.asarray(responses.ids), index[..., None], 1)
    return ragged(ids, np.take_along_axis(np.asarray(responses.lengths), index, 1))


def recorded(batches: Iterable[Any]) -> Comparisons:
    """Recorded choices as comparisons: offline data, or what :func:`.oracle.recorded` looks up.

    ``batches`` have ``prompts [B, P]``, ``responses [B, 2, C]``, ``label`` and ``weight`` (a
    ``data.Loader``'s, one epoch of them); rows of weight 0 are left out.

    Raises:
        ValueError: where a row has another number of responses than two.
    """
    found = []
    for batch in batches:
        ids = np.asarray(batch.responses.ids)
        if ids.ndim != 3 or ids.shape[1] != 2:
            raise ValueError(
                f"recorded: responses have shape {ids.shape}; a comparison has two, [B, 2, C]. "
                "Take pairs of ranked responses first (data.arrange)."
            )
        keep = np.asarray(batch.weight) > 0
        label = np.ones(keep.shape) if batch.label is None else np.asarray(batch.label)
        found.append(
            Comparisons(
                ragged(
                    np.asarray(batch.prompts.ids)[keep], np.asarray(batch.prompts.lengths)[keep]
                ),
                ragged(ids[keep], np.asarray(batch.responses.lengths)[keep]),
                label[keep].astype(np.float32),
                np.asarray(batch.weight, np.float32)[keep],
            )
        )
    return join(found)


def join(sets: Sequence[Comparisons]) -> Comparisons:
    """One set of several, widened to the longest.

    Raises:
        ValueError: where there is none.
    """
    if not sets:
        raise ValueError("join: no comparisons; give at least one set.")
    prompt = max(s.prompts.ids.shape[-1] for s in sets)
    response = max(s.responses.ids.shape[-1] for s in sets)
    wide = [
        s._replace(prompts=widen(s.prompts, prompt), responses=widen(s.responses, response))
        for s in sets
    ]
    return _concatenate(wide)


def _concatenate(parts: Sequence[Comparisons]) -> Comparisons:
    at = lambda get: np.concatenate([np.asarray(get(part)) for part in parts])  # noqa: E731
    return Comparisons(
        ragged(at(lambda s: s.prompts.ids), at(lambda s: s.prompts.lengths)),
        ragged(at(lambda s: s.responses.ids), at(lambda s: s.responses.lengths)),
        at(lambda s: s.label).astype(np.float32),
        at(lambda s: s.weight).astype(np.float32),
    )
