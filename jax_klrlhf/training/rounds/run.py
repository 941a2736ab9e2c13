r"""Iterative preference learning: sample, score, pair, label, fit, and again.

.. math:: \pi_{t} = \mathcal{O}(D_{1:t}, \pi_0, \eta), \qquad
          D_t = \{(x, a^1, a^2, y)\}, \quad a^1, a^2 \sim \pi_{t-1} \text{ and its enhancer}

(arXiv 2312.11456, Algorithm 2 and section 5). Every part is a value handed in (:mod:`.parts`), and
every phase's result is left on disk (:mod:`.journal`). The reference of the KL is pi0, the policy
handed in, in every round; :func:`previous` makes it the last iterate, which 2409.02392 shows to
solve the problem without regularization: a named ablation.

Round 0 has offline data, if there are any, and no sampling: its fit is offline learning. The
rounds after it are online or, with the offline data in their batches, hybrid.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key
from rich.console import Console

from jax_klrlhf import placement
from jax_klrlhf.core.pairs import PairRule
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.results import Metric, mean
from jax_klrlhf.training.metrics import Metrics
from jax_klrlhf.training.rounds import journal as journals
from jax_klrlhf.training.rounds import pairing, settings
from jax_klrlhf.training.rounds.journal import ANY, Journal
from jax_klrlhf.training.rounds.parts import (
    Chosen,
    Comparisons,
    DataRule,
    Drawn,
    Improve,
    Oracle,
    Policies,
    Reward,
    Sampler,
    Scored,
    Situation,
    pick,
    ragged,
)

Anchor = Callable[[Any, Any], Any]
"""``anchor(pi0, previous) -> params``: the policy that something is taken from."""

_ROWS = Ragged(ANY, ANY)  # pyright: ignore[reportArgumentType]  # A template, no arrays.
_DRAWN = Drawn(_ROWS, _ROWS, ANY)  # pyright: ignore[reportArgumentType]
_SCORED = Scored(ANY, ANY, ANY)  # pyright: ignore[reportArgumentType]
_CHOSEN = Chosen(ANY, ANY, ANY)  # pyright: ignore[reportArgumentType]
_COMPARISONS = Comparisons(_ROWS, _ROWS, ANY, ANY)  # pyright: ignore[reportArgumentType]


class Outcome(NamedTuple):
    """What a run came to."""

    policy: Any
    """Parameters of the last policy."""
    policies: Sequence[Any]
    """pi0 and every round's policy, the offline one (if any) first; read from disk on demand."""
    comparisons: Sequence[Comparisons]
    """Every round's labelled pairs."""
    belief: Any
    """The belief after the last round."""
    score: Callable[[Ragged, Ragged], Scored]
    """What is believed, after the last round, of ``(prompts, responses)``."""
    metrics: Sequence[Metrics]
    """Of every round, the offline one (if any) first."""
    computed: Sequence[str]
    """Phases ``round/phase`` that were computed, not read, by this call."""

    def judge(self, prompts: Ragged, responses: Ragged) -> np.ndarray:
        """The believed reward ``[B, K]``, as a judge (for :func:`best_of_n`)."""
        return self.score(prompts, responses).reward


def pi0(base: Any, previous: Any) -> Any:
    """The policy that the run was handed: the reference of arXiv 2312.11456."""
    del previous
    return base


def previous(base: Any, previous: Any) -> Any:
    """The policy of the round before: the ablation, whose KL budget grows with the rounds."""
    del base
    return previous


def iterate(
    key: Key[Array, ""],
    policy: Any,
    *,
    prompts: Ragged | Callable[[int], Ragged],
    sampler: Sampler,
    reward: Reward,
    pair_rule: PairRule,
    oracle: Oracle,
    improve: Improve,
    rounds: int,
    reference: Anchor = pi0,
    start: Anchor | None = None,
    setting: DataRule = settings.everything,
    offline: Comparisons | None = None,
    output: str | Path | None = None,
    config: Any = None,
    console: Console | None = None,
    report: Callable[[int, Metrics], None] | None = None,
) -> Outcome:
    """Run ``rounds`` rounds of preference learning from ``policy``, which is pi0.

    Args:
        key: typed root key; every phase of every round folds its own from it.
        policy: pi0's parameters.
        prompts: ids ``[B, P]``, or ``prompts(round)`` with rounds counted from 1 (0: offline).
        sampler: who answers (:mod:`.samplers`).
        reward: what the learner believes (:mod:`.beliefs`, :mod:`.features`).
        pair_rule: which two responses are compared, ``rule(key, choices)`` (:mod:`core.pairs`).
        oracle: who prefers (:mod:`.oracle`).
        improve: from comparisons to the next policy (:mod:`.improve`, :mod:`.rejection`).
        rounds: how many; 0 with offline data is offline learning.
        reference: of the KL: :func:`pi0`, or :func:`previous`.
        start: where each fit begins; by default where its reference is.
        setting: which data a round learns from (:mod:`.settings`).
        offline: comparisons that were there before; learned from in round 0.
        output: folder of the phases' results; started again with it, a run goes on. None: memory.
        config: whatever JSON holds that identifies the parts; a folder of another is refused.
        console: where a line per round is printed; by default the terminal of the first process,
            and ``Console(quiet=True)`` for none.
        report: ``report(round, metrics)``, called after each round, also one read from disk.

    Raises:
        ValueError: for no rounds without offline data.
        InputError: where the folder holds another run, or is damaged.
    """
    if rounds < 0 or (rounds == 0 and offline is None):
        raise ValueError(f"rounds={rounds} without offline data: there is nothing to learn from.")
    ask = (lambda number: prompts) if isinstance(prompts, Ragged) else prompts
    console = console or Console(quiet=not placement.leader())
    journal = Journal(output, _identity(key, policy, ask, offline, config))
    first = 0 if offline is not None else 1
    policies = journals.Stored(journal, policy, first=first)
    current, belief = policy, reward.init
    history: list[Comparisons] = []
    reports: list[Metrics] = []
    for number in range(first, rounds + 1):
        keys = partial(jax.random.fold_in, jax.random.fold_in(key, number))
        asked = ragged(*ask(number))
        journal.fold(asked)
        hand = Policies(current, policy, reference(policy, current), policies)
        metrics: dict[str, Metric] = {}
        phase = partial(_phase, journal, number, metrics)
        if number > 0:
            drawn = phase("sample", partial(_sample, sampler, keys(1), hand, asked), _DRAWN)
            scored = phase("score", partial(_score, reward, belief, hand, drawn), _SCORED)
            chosen = phase("pair", partial(_pair, pair_rule, keys(2), drawn, scored), _CHOSEN)
            labelled = phase("label", partial(_label, oracle, keys(3), drawn, chosen), _COMPARISONS)
            history.append(labelled)
        known = [*([] if offline is None else [offline]), *history]
        belief = phase(
            "believe", partial(_believe, reward, keys(4), belief, known, hand), reward.init
        )
        folder = None if output is None else journals.round_folder(Path(output), number) / "fits"
        situation = Situation(
            policies=hand,
            start=(start or reference)(policy, current),
            data=setting(offline, history),
            prompts=asked,
            score=partial(reward.score, belief, hand),
            folder=folder,
        )
        current = phase("fit", partial(_improve, improve, keys(5), situation), policy)
        if folder is not None and placement.leader():
            # What a fit went on from is of no use once it is done.
            shutil.rmtree(folder, ignore_errors=True)
        policies.append(current)
        reports.append(metrics)
        if report is not None:
            report(number, metrics)
        console.print(f"round {number}/{rounds}  {_line(metrics)}", highlight=False)
    hand = Policies(current, policy, reference(policy, current), policies)
    return Outcome(
        policy=current,
        policies=policies,
        comparisons=history,
        belief=belief,
        score=partial(reward.score, belief, hand),
        metrics=reports,
        computed=journal.computed,
    )


def collect(
    key: Key[Array, ""],
    policy: Any,
    *,
    prompts: Ragged,
    sampler: Sampler,
    reward: Reward,
    pair_rule: PairRule,
    oracle: Oracle,
) -> Comparisons:
    """Labelled pairs of one policy's responses: offline data, made rather than given.

    The same four phases as a round's, with ``policy`` as every policy there is.
    """
    hand = Policies(policy, policy, policy, (policy,))
    drawn, _ = _sample(sampler, jax.random.fold_in(key, 1), hand, ragged(*prompts))
    scored, _ = _score(reward, reward.init, hand, drawn)
    chosen, _ = _pair(pair_rule, jax.random.fold_in(key, 2), drawn, scored)
    return _label(oracle, jax.random.fold_in(key, 3), drawn, chosen)[0]


def _phase(
    journal: Journal, number: int, metrics: dict[str, Metric], name: str, compute: Any, like: Any
) -> Any:
    value, found = journal.phase(number, name, compute, like=like)
    metrics.update(found)
    return value


def _sample(
    sampler: Sampler, key: Key[Array, ""], policies: Policies, prompts: Ragged
) -> tuple[Drawn, Metrics]:
    drawn = sampler(key, policies, prompts)
    tokens = np.asarray(drawn.responses.lengths, np.float64).mean(1)
    return drawn, {"length/sampled": mean(tokens)}


def _score(reward: Reward, belief: Any, policies: Policies, drawn: Drawn) -> tuple[Scored, Metrics]:
    scored = reward.score(belief, policies, drawn.prompts, drawn.responses)
    finite = np.isfinite(scored.reward)
    if not finite.all():
        row, response = np.argwhere(~finite)[0]
        raise ValueError(
            f"the believed reward of prompt {row}, response {response} is "
            f"{scored.reward[row, response]}; rewards must be finite."
        )
    of_main = scored.reward[:, drawn.agent[0] == 0].mean(1)
    return scored, {"reward/believed": mean(of_main)}


def _pair(
    pair_rule: PairRule, key: Key[Array, ""], drawn: Drawn, scored: Scored
) -> tuple[Chosen, Metrics]:
    chosen = pairing.choose(key, pair_rule, drawn, scored)
    if not np.any(chosen.valid):
        raise ValueError(
            "no pair could be made: at every prompt all responses are alike, or the belief ranks "
            "none above another. Draw more samples, at a higher temperature, or say what then: "
            "pair_rule=pairs.otherwise(rule, pairs.sampled)."
        )
    return chosen, {"pairs/valid": mean(chosen.valid.astype(np.float64).mean(1))}


def _label(
    oracle: Oracle, key: Key[Array, ""], drawn: Drawn, chosen: Chosen
) -> tuple[Comparisons, Metrics]:
    """The valid pairs, labelled; what the oracle abstains from is left out."""
    row, match = np.nonzero(chosen.valid)
    index = np.stack([chosen.first[row, match], chosen.second[row, match]], 1)
    prompts = ragged(np.asarray(drawn.prompts.ids)[row], np.asarray(drawn.prompts.lengths)[row])
    at_row = ragged(np.asarray(drawn.responses.ids)[row], np.asarray(drawn.responses.lengths)[row])
    responses = pick(at_row, index)
    said = oracle(key, prompts, responses)
    keep = said.weight > 0
    if not keep.any():
        raise ValueError(f"the oracle abstained from all {keep.size} pairs: nothing was learned.")
    found = Comparisons(
        ragged(np.asarray(prompts.ids)[keep], np.asarray(prompts.lengths)[keep]),
        ragged(np.asarray(responses.ids)[keep], np.asarray(responses.lengths)[keep]),
        np.asarray(said.label, np.float32)[keep],
        np.asarray(said.weight, np.float32)[keep],
    )
    return found, {
        "labels/count": Metric(float(keep.sum())),
        "labels/ties": mean((found.label == 0.5).astype(np.float64)),
    }


def _believe(
    reward: Reward,
    key: Key[Array, ""],
    belief: Any,
    comparisons: Sequence[Comparisons],
    policies: Policies,
) -> tuple[Any, Metrics]:
    return reward.fit(key, belief, comparisons, policies), {}


def _improve(improve: Improve, key: Key[Array, ""], situation: Situation) -> tuple[Any, Metrics]:
    improved = improve(key, situation)
    # Speeds are of this process and this moment: a run that was killed has others.
    kept = {name: m for name, m in improved.metrics.items() if not name.startswith("perf/")}
    return improved.params, kept


def _identity(
    key: Any, policy: Any, ask: Callable[[int], Ragged], offline: Any, config: Any
) -> dict[str, str]:
    """What a run is made of, by name. The parts are functions: ``config`` speaks for them."""
    return {
        "key": journals.digest(np.asarray(jax.random.key_data(key)))[:16],
        "pi0": journals.digest(policy)[:16],
        "prompts": journals.digest(ragged(*ask(1)))[:16],
        "offline data": "none" if offline is None else journals.digest(offline)[:16],
        "config": json.dumps(config, sort_keys=True, default=str),
    }


def _line(metrics: Metrics) -> str:
    shown = ("reward/believed", "pairs/valid", "labels/count", "loss", "rewards/accuracies")
    return "  ".join(f"{name} {metrics[name]}" for name in shown if name in metrics)
