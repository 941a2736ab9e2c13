r"""The methods: each is one call of :func:`rounds.iterate` with other values handed in.

All fits run one compiled step. The library's improvements close over ``kl_coef`` and compile for
each; in a sweep the coefficient is an array of the batch instead, and the loss the same DPO,
:math:`-\log\sigma(\eta\,\Delta\log\pi/\pi_0)`.

Axes: ``B`` rows of a batch or prompts, ``K`` responses.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_klrlhf.core import bradley_terry, pairs
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.results import Metric
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import pairing, settings
from jax_klrlhf.training.rounds.fitting import Deal, Fitted, Fitting, Stream, comparisons_deal
from jax_klrlhf.training.rounds.improve import reference_log_prob
from jax_klrlhf.training.rounds.parts import (
    Comparisons,
    Improve,
    Improved,
    Mixture,
    Oracle,
    PairRule,
    Reward,
    Situation,
    pick,
    ragged,
)
from jax_klrlhf.training.rounds.rejection import Accepted, Learn, rejection_sampling
from jax_klrlhf.training.rounds.run import Anchor, Outcome
from jax_klrlhf.training.tasks import Batch, Task


class Rows(NamedTuple):
    """A training batch that carries the coefficient of its loss."""

    batch: Batch
    kl_coef: Float[Array, " B"]

    @property
    def prompts(self) -> Ragged:
        """The step counts their tokens."""
        return self.batch.prompts

    @property
    def responses(self) -> Ragged:
        """The same."""
        return self.batch.responses

    @property
    def weight(self) -> Float[Array, " B"]:
        """Of each row in the loss."""
        return self.batch.weight


class _Stream(Stream):
    """Batches that carry the coefficient."""

    def __init__(self, deal: Deal, key: Any, *, batch_size: int, kl_coef: float):
        super().__init__(deal, key, batch_size=batch_size)
        self._coefficient = kl_coef

    def __next__(self) -> Any:
        batch = super().__next__()
        return Rows(batch, cast(Any, np.full(len(batch.weight), self._coefficient, np.float32)))


def _with_coefficient(deal: Deal, kl_coef: float) -> Deal:
    class Carrying(Deal):
        def stream(self, key: Any, *, batch_size: int) -> Stream:
            return _Stream(self, key, batch_size=batch_size, kl_coef=kl_coef)

    return Carrying(*deal)


class Ratios(NamedTuple):
    """What the loss looks at."""

    log_ratio: Float[Array, "B K"]
    label: Float[Array, " B"]
    kl_coef: Float[Array, " B"]


class Margins(NamedTuple):
    """What is reported: the implicit margin towards the label, nats, and whether it is right."""

    margin: Float[Array, " B"]
    accuracy: Float[Array, " B"]


def dpo_task(model: LanguageModel) -> Task:
    """DPO (arXiv 2305.18290, eq. 7) with a coefficient for each row: the core's likelihood."""

    def score(params: Any, ref_params: Any, batch: Any) -> Ratios:
        del ref_params
        given = batch.batch
        log_prob = scoring.log_prob(model, params, given.prompts, given.responses)
        return Ratios(log_prob - given.ref_log_prob, given.label, batch.kl_coef)

    def margin(given: Ratios) -> Array:
        return given.kl_coef * (given.log_ratio[:, 0] - given.log_ratio[:, 1])

    def report(given: Ratios) -> Margins:
        right = jnp.sign(given.label - 0.5) * margin(given)
        return Margins(right, 0.5 + 0.5 * jnp.sign(right))

    return Task(
        score=score,
        loss=lambda given: bradley_terry.nll(margin(given), label=given.label),
        report=report,
        names={"margin": "rewards/margins", "accuracy": "rewards/accuracies"},
    )


Fit = Callable[..., Fitted]
"""``fit(key, start, situation, deal, *, kl_coef, bonus=None) -> Fitted``."""


def fitter(model: LanguageModel, fitting: Fitting, *, rows: int) -> Fit:
    """DPO on a deal of comparisons; ``bonus [N, 2]`` makes it pessimistic.

    The pessimistic margin adds the uncertainty Gamma to the implicit reward, which is DPO against
    log pi0 - Gamma / kl_coef (arXiv 2312.11456, Option II).
    """
    compiled = fitting.compile(dpo_task(model))
    reference = reference_log_prob(model, fitting, rows=rows)

    def fit(
        key: Key[Array, ""],
        start: Any,
        situation: Situation,
        deal: Deal,
        *,
        kl_coef: float,
        bonus: np.ndarray | None = None,
    ) -> Fitted:
        ref = np.asarray(reference(situation, deal))
        if bonus is not None:
            ref = ref - (bonus / kl_coef).astype(ref.dtype)
        rows = deal.rows._replace(ref_log_prob=cast(Any, ref))  # NumPy: on the host
        return compiled(
            key,
            start,
            _with_coefficient(deal._replace(rows=rows), kl_coef),
            pi0=situation.policies.reference,
            folder=situation.folder,
        )

    return fit


def dpo(fit: Fit, *, kl_coef: float) -> Improve:
    """DPO on the round's mixture."""

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        deal = comparisons_deal(situation.data)
        return Improved(*fit(key, situation.start, situation, deal, kl_coef=kl_coef))

    return improve


def pessimistic(fit: Fit, *, kl_coef: float) -> Improve:
    """DPO with a margin by uncertainty: offline GSHF, Option II."""

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        deal = comparisons_deal(situation.data)
        bonus = situation.score(deal.rows.prompts, deal.rows.responses).uncertainty
        found = fit(key, situation.start, situation, deal, kl_coef=kl_coef, bonus=bonus)
        return Improved(*found)

    return improve


def ranked(fit: Fit) -> Learn:
    """DPO on pairs of accepted responses, labelled by what is believed (RSO, arXiv 2309.06657).

    ``rejection/pairs`` counts them. Where there is none the policy stays as it was.
    """

    def learn(key: Any, params: Any, situation: Situation, accepted: Accepted) -> Fitted:
        key_pair, key_fit = jax.random.split(key)
        data = accepted_pairs(key_pair, situation.prompts, accepted)
        count = {"rejection/pairs": Metric(float(data.weight.sum()))}
        if not data.weight.any():
            return Fitted(params, count)
        deal = comparisons_deal(Mixture([data], None))
        found = fit(key_fit, params, situation, deal, kl_coef=accepted.kl_coef)
        return Fitted(found.params, {**found.metrics, **count})

    return learn


def accepted_pairs(key: Any, prompts: Ragged, accepted: Accepted) -> Comparisons:
    """Neighbours among a prompt's accepted responses, the winner drawn by Bradley-Terry, first."""
    first, second, valid = _first_round(
        key, accepted.reward, accepted.accepted, accepted.responses.ids
    )
    index = np.stack([first, second], -1)  # [B, M, 2]
    matches = index.shape[1]
    chosen = pick(accepted.responses, index.reshape(len(index), -1))
    width = chosen.ids.shape[-1]
    return Comparisons(
        ragged(np.repeat(prompts.ids, matches, 0), np.repeat(prompts.lengths, matches, 0)),
        ragged(chosen.ids.reshape(-1, 2, width), chosen.lengths.reshape(-1, 2)),
        np.ones(valid.size, np.float32),
        np.asarray(valid, np.float32).ravel(),
    )


@jax.jit
def _first_round(key: Any, reward: Array, accepted: Array, ids: Array) -> pairs.Pair:
    # Copies count once among the accepted: the first copy of all may be one that was not.
    marked = jnp.concatenate([ids, accepted[..., None].astype(ids.dtype)], -1)
    found = pairs.first_round(key, reward, where=accepted & pairs.distinct(marked))
    return jax.tree.map(lambda x: x.reshape(len(reward), -1), found)


class Parts(NamedTuple):
    """What the methods are made of: compiled once, shared by every cell."""

    pi0: Any
    reward: Reward
    """The proxy."""
    oracle: Oracle
    fit: Fit
    """One fit, from pi0."""
    short_fit: Fit
    """One fit of a multi-step chain."""
    explore: rounds.Draw
    """Of which online methods compare the best and the worst."""
    propose: rounds.Draw
    """One-step rejection sampling's proposals: all that the chain has together."""
    propose_step: rounds.Draw
    """One step's proposals of the chain."""
    chain: int
    """Steps of the chain."""
    rounds: int


class Cell(NamedTuple):
    """One method at one coefficient and seed."""

    key: Key[Array, ""]
    kl_coef: float
    train: Ragged
    """Prompts ``[B, P]``."""
    offline: Comparisons
    """Pairs of pi0's responses, as many as the label budget."""
    folder: Path
    identity: Any
    """What the cell is made of, for the folder's fingerprint."""


Run = Callable[[Parts, Cell], Outcome]


class Method(NamedTuple):
    """How a cell is run, and about how much it costs."""

    run: Run
    fits: int


def _iterate(parts: Parts, cell: Cell, improve: Improve, **settings: Any) -> Outcome:
    return rounds.iterate(
        cell.key,
        parts.pi0,
        sampler=rounds.main_agent(parts.explore),
        reward=parts.reward,
        oracle=parts.oracle,
        improve=improve,
        output=cell.folder,
        config=cell.identity,
        **{"pair_rule": pairing.by_reward(pairs.best_worst), **settings},
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
            parts, cell, dpo(parts.fit, kl_coef=cell.kl_coef),
            prompts=portions(cell.train, len(cell.offline.weight) // parts.rounds),
            rounds=parts.rounds, reference=reference, **other,
        )  # fmt: skip

    return run


def hybrid(parts: Parts, cell: Cell) -> Outcome:
    """Half of the budget on pairs of pi0, half in the rounds; each half of every batch."""
    half = len(cell.offline.weight) // 2
    return _iterate(
        parts, cell, dpo(parts.fit, kl_coef=cell.kl_coef),
        prompts=portions(cell.train, half // parts.rounds),
        rounds=parts.rounds,
        offline=jax.tree.map(lambda x: x[:half], cell.offline),
        setting=settings.hybrid(0.5),
    )  # fmt: skip


def portions(prompts: Ragged, count: int) -> Callable[[int], Ragged]:
    """``count`` prompts for each round, one round's after the other's, from the first again."""

    def at(number: int) -> Ragged:
        index = (np.arange(count) + max(number - 1, 0) * count) % len(prompts.lengths)
        return ragged(np.asarray(prompts.ids)[index], np.asarray(prompts.lengths)[index])

    return at


METHODS = {
    "offline DPO": Method(offline(lambda p, c: dpo(p.fit, kl_coef=c.kl_coef)), 1),
    "RSO": Method(
        offline(
            lambda p, c: rejection_sampling(p.propose, ranked(p.fit), kl_coef=c.kl_coef, steps=1)
        ),
        2,
    ),
    "multi-step RSO": Method(
        offline(
            lambda p, c: rejection_sampling(
                p.propose_step, ranked(p.short_fit), kl_coef=c.kl_coef, steps=p.chain
            )
        ),
        2,
    ),
    "offline GSHF": Method(offline(lambda p, c: pessimistic(p.fit, kl_coef=c.kl_coef)), 1),
    "online GSHF-DPO": Method(online(), 4),
    "hybrid GSHF-DPO": Method(hybrid, 5),
    "moving reference": Method(online(reference=rounds.previous), 4),
    # Option I of Algorithm 2 in the place of best and worst of n.
    "online GSHF-DPO, enhancer": Method(
        online(pair_rule=lambda c: pairing.enhancer(kl_coef=c.kl_coef)), 4
    ),
}
"""Methods with a coefficient, by name; pi0 and best-of-n have none and are run apart."""
DEFAULT = tuple(METHODS)
