"""The methods: each is one call of :func:`rounds.iterate` with other values handed in.

Improvements that are made of one ``Fitting`` share one compiled step at every coefficient.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key
from rich.console import Console

from jax_klrlhf.core import enhancer, pairs
from jax_klrlhf.core.pairs import PairRule
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import settings
from jax_klrlhf.training.rounds.parts import Comparisons, Improve, Oracle, Reward, ragged
from jax_klrlhf.training.rounds.run import Anchor, Outcome


class Parts(NamedTuple):
    """What the methods are made of: compiled once, shared by every cell."""

    model: LanguageModel
    pi0: Any
    reward: Reward
    """The proxy."""
    oracle: Oracle
    fitting: rounds.Fitting
    """One fit, from pi0."""
    short_fitting: rounds.Fitting
    """One fit of a multi-step chain."""
    rows: int
    """Comparisons that pi0 scores at one time."""
    explore: rounds.Draw
    """Of which online methods compare the best and the worst."""
    propose: rounds.Draw
    """One-step rejection sampling's proposals: all that the chain has together."""
    propose_step: rounds.Draw
    """One step's proposals of the chain."""
    chain: int
    """Steps of the chain."""
    labelling: rounds.rejection.Labelling
    """Of what rejection sampling accepts."""
    rounds: int


class Cell(NamedTuple):
    """One method at one coefficient and seed."""

    key: Key[Array, ""]
    kl_coef: float
    train: Ragged
    """Prompts ``[B, P]``."""
    offline: Comparisons
    """Pairs of pi0's responses, as many as the label budget."""
    folder: Path | None
    """Of its phases; None: they stay in memory, and a killed cell begins again."""
    identity: Any
    """What the cell is made of, for the folder's fingerprint."""


Run = Callable[[Parts, Cell], Outcome]


class Method(NamedTuple):
    """How a cell is run, and about how much it costs."""

    run: Run
    fits: int
    uncertainty: bool = False
    """Whether it asks the proxy how sure it is."""


def dpo(parts: Parts, cell: Cell) -> Improve:
    """DPO at the cell's coefficient."""
    return rounds.dpo(parts.model, kl_coef=cell.kl_coef, fitting=parts.fitting, rows=parts.rows)


def pessimistic(parts: Parts, cell: Cell) -> Improve:
    """DPO with a margin by uncertainty: offline GSHF, Option II."""
    return rounds.pessimistic_dpo(
        parts.model, kl_coef=cell.kl_coef, fitting=parts.fitting, rows=parts.rows
    )


def rso(parts: Parts, cell: Cell) -> Improve:
    """One step of rejection sampling: all proposals of the chain at once."""
    return rounds.rso(
        parts.model,
        parts.propose,
        kl_coef=cell.kl_coef,
        fitting=parts.fitting,
        labelling=parts.labelling,
        rows=parts.rows,
    )


def multi_step_rso(parts: Parts, cell: Cell) -> Improve:
    """A chain of steps, the proposals and optimizer steps of one step divided among them."""
    return rounds.rso(
        parts.model,
        parts.propose_step,
        kl_coef=cell.kl_coef,
        fitting=parts.short_fitting,
        steps=parts.chain,
        labelling=parts.labelling,
        rows=parts.rows,
    )


def _iterate(parts: Parts, cell: Cell, improve: Improve, **settings: Any) -> Outcome:
    return rounds.iterate(
        cell.key,
        parts.pi0,
        reward=parts.reward,
        oracle=parts.oracle,
        improve=improve,
        output=cell.folder,
        config=cell.identity,
        console=Console(quiet=True),
        **{
            "sampler": rounds.main_agent(parts.explore),
            "pair_rule": pairs.otherwise(pairs.best_worst, pairs.sampled),
            **settings,
        },
    )


def offline(improve: Callable[[Parts, Cell], Improve]) -> Run:
    """The whole label budget on pairs of pi0; no further label."""

    def run(parts: Parts, cell: Cell) -> Outcome:
        return _iterate(
            parts, cell, improve(parts, cell),
            prompts=cell.train, rounds=0, offline=cell.offline,
        )  # fmt: skip

    return run


def online(
    *, reference: Anchor = rounds.pi0, pair_rule: Callable[[Cell], PairRule] | None = None
) -> Run:
    """An equal part of the budget in each round, on the current policy's best and worst of n."""

    def run(parts: Parts, cell: Cell) -> Outcome:
        other = {} if pair_rule is None else {"pair_rule": pair_rule(cell)}
        return _iterate(
            parts, cell, dpo(parts, cell),
            prompts=portions(cell.train, len(cell.offline.weight) // parts.rounds),
            rounds=parts.rounds, reference=reference, **other,
        )  # fmt: skip

    return run


def hybrid(parts: Parts, cell: Cell) -> Outcome:
    """Half of the budget on pairs of pi0, half in the rounds; each half of every batch."""
    half = len(cell.offline.weight) // 2
    return _iterate(
        parts, cell, dpo(parts, cell),
        prompts=portions(cell.train, half // parts.rounds),
        rounds=parts.rounds,
        offline=jax.tree.map(lambda x: x[:half], cell.offline),
        setting=settings.hybrid(0.5),
    )  # fmt: skip


def selected(parts: Parts, cell: Cell) -> Outcome:
    """Offline with the online methods' selection: half of the budget on random pairs of pi0, which
    teach the proxy, half on the best and the worst by it of n responses of pi0; one fit on all.

    What online methods gain over this is owed to whom they sample from, not to which pairs they
    show.
    """
    half = len(cell.offline.weight) // 2
    return _iterate(
        parts, cell, dpo(parts, cell),
        prompts=portions(cell.train, len(cell.offline.weight) - half),
        rounds=1,
        sampler=rounds.mixture(rounds.Agent(policy=rounds.base, draw=parts.explore)),
        offline=jax.tree.map(lambda x: x[:half], cell.offline),
    )  # fmt: skip


def portions(prompts: Ragged, count: int) -> Callable[[int], Ragged]:
    """``count`` prompts for each round, one round's after the other's, from the first again."""

    def at(number: int) -> Ragged:
        index = (np.arange(count) + max(number - 1, 0) * count) % len(prompts.lengths)
        return ragged(np.asarray(prompts.ids)[index], np.asarray(prompts.lengths)[index])

    return at


METHODS = {
    "offline DPO": Method(offline(dpo), 1),
    "offline DPO, best and worst": Method(selected, 3),
    "RSO": Method(offline(rso), 2),
    "multi-step RSO": Method(offline(multi_step_rso), 2),
    "offline GSHF": Method(offline(pessimistic), 1, uncertainty=True),
    "online GSHF-DPO": Method(online(), 4),
    "hybrid GSHF-DPO": Method(hybrid, 5),
    "moving reference": Method(online(reference=rounds.previous), 4),
    # Option I of Algorithm 2 in the place of best and worst of n.
    "online GSHF-DPO, enhancer": Method(
        online(pair_rule=lambda c: pairs.enhancer(kl_coef=c.kl_coef, option=enhancer.best_of_n)),
        4,
        uncertainty=True,
    ),
}
"""Methods with a coefficient, by name; pi0 and best-of-n have none and are run apart."""
DEFAULT = tuple(METHODS)
