r"""What differs between preference training, maximum likelihood and reward models: one record.

A :class:`Task` says how a batch is scored, what is minimized, how rows are weighted and what is
reported. The training step and the evaluation are written once, for any task.

Axes: ``B`` rows of the batch (prompts), ``K`` responses to a prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_klrlhf.core import sequence
from jax_klrlhf.core.numerics import check_between, check_positive
from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry
from jax_klrlhf.core.scores import Loss, Scores
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import packed as packing
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.batch import PackedBatch
from jax_klrlhf.training import reference as references


def slots(batch: Any) -> int:
    """Token slots that a model computes on for a batch: the true tokens and their padding."""
    if isinstance(batch, PackedBatch):
        return batch.packed.stream.size
    return batch.prompts.ids.size + batch.responses.ids.size


def log_prob(
    model: LanguageModel, params: Any, batch: Any, *, chunk: int = scoring.CHUNK
) -> Float[Array, "B K"]:
    """Log-probability of a batch's responses, padded or packed."""
    if isinstance(batch, PackedBatch):
        return packing.log_prob(model, params, batch.packed, chunk=chunk)
    return scoring.log_prob(model, params, batch.prompts, batch.responses, chunk=chunk)


@dataclass(frozen=True, kw_only=True)
class Task:
    """How to score, what to minimize, what to report.

    ``loss`` and ``report`` take what ``score`` returned, a NamedTuple of arrays ``[B, ...]``.
    """

    score: Callable[[Any, Any, Any], Any]
    """``score(params, ref_params, batch)`` runs the model with the policy's whole parameters."""
    loss: Callable[[Any], Float[Array, " B"]]
    """Per-row loss (nats)."""
    report: Callable[[Any], Any]
    """NamedTuple of ``[B]`` quantities; a field may be None."""
    names: Mapping[str, str]
    """What each field of the report is called in the log."""
    weight: Callable[[Any], Float[Array, " B"]] | None = None
    """A row's weight from its scores, times the batch's own; None is 1."""


class Preference(NamedTuple):
    """Scores of preference pairs with their labels."""

    scores: Scores
    label: Float[Array, " B"] | None


class PreferenceReport(NamedTuple):
    """Per-row quantities of a preference batch, in nats."""

    chosen_reward: Float[Array, " B"] | None
    """Implicit rewards ``report_coef * log_ratio``; None without reference."""
    rejected_reward: Float[Array, " B"] | None
    margin: Float[Array, " B"]
    accuracy: Float[Array, " B"]
    """1 where the margin is positive; a tie counts one half."""
    chosen_log_prob: Float[Array, " B"]
    rejected_log_prob: Float[Array, " B"]
    chosen_log_ratio: Float[Array, " B"] | None
    """To the reference; None without it."""


# TRL's names, so that runs can be laid beside each other; the last is ours.
PREFERENCE_NAMES = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "chosen_log_prob": "logps/chosen",
    "rejected_log_prob": "logps/rejected",
    "chosen_log_ratio": "log_ratio/chosen",
}


def preference(
    model: LanguageModel,
    loss: Loss,
    *,
    reference: references.Reference = references.cached,
    report_coef: float = 1.0,
    explores: int | None = None,
    preference: PreferenceModel = bradley_terry,
    tail: float | None = None,
    chunk: int = scoring.CHUNK,
) -> Task:
    r"""Preference training with any loss on log-probabilities.

    A soft label weighs the loss of the pair and of the pair reversed,
    :math:`y\,\ell(w, l) + (1 - y)\,\ell(l, w)`: the expectation of the loss under the label. So a
    half label is half a win and half a loss; to the likelihood of Bradley-Terry that is no tie, and
    draws the policy to pi0: for ties, name a model that has them.

    Args:
        model: the policy.
        loss: for example ``functools.partial(objectives.sigmoid, kl_coef=0.1)``.
        reference: where pi0's log-probabilities come from (:mod:`.reference`).
        report_coef: of the reported rewards, usually the loss's ``kl_coef``; it trains nothing.
        explores: the number of the response that explored, for ``objectives.exploratory`` (XPO,
            SELM): 1 where it is the second of the pair, 2 where it is a third one.
        preference: what labels mean, the loss's own model (``objectives.sigmoid(preference=..)``).
            Where it doesn't average labels (``merges``), the loss is given them as they are.
        tail: LD-DPO's weight of the tokens beyond the shorter response's length, of the policy and
            of the reference (:func:`core.sequence.length_desensitized`), in padded batches.
        chunk: tokens projected on the vocabulary at one time.

    Raises:
        ValueError: on a ``report_coef`` that isn't positive, a ``tail`` outside of [0, 1], and
            where ``tail`` meets a cached reference (of whole sums) or a packed batch.
    """
    check_positive("report_coef", report_coef)
    if tail is not None:
        check_between("tail", tail, 0, 1)
        if reference is references.cached:
            raise ValueError(
                "tail weighs tokens by the pair's shorter length, and a cached reference holds "
                "whole sums: give reference=reference.live"
            )

    def scored(params: Any, batch: Any) -> Float[Array, "B K"]:
        if tail is None:
            return log_prob(model, params, batch, chunk=chunk)
        if isinstance(batch, PackedBatch):
            raise ValueError("tail needs padded batches: a packed one has sums alone")
        token = scoring.token_log_prob(model, params, batch.prompts, batch.responses, chunk=chunk)
        return sequence.length_desensitized(token, batch.responses.lengths, tail=tail)

    def score(params: Any, ref_params: Any, batch: Any) -> Preference:
        scores = Scores(
            log_prob=scored(params, batch),
            ref_log_prob=cast(Array, reference(scored, params, ref_params, batch)),
            length=batch.responses.lengths,
            reward=batch.scores,
        )
        return Preference(_explored(scores, explores), batch.label)

    def labelled(given: Preference) -> Array:
        if given.label is not None and not preference.merges:
            return loss(given.scores._replace(label=given.label))
        first = loss(given.scores)
        if given.label is None:
            return first
        return jnp.where(
            given.label < 1,
            given.label * first + (1 - given.label) * loss(given.scores.swapped()),
            first,
        )

    return Task(
        score=score,
        loss=labelled,
        report=lambda given: _preference_report(_winner_first(given), report_coef),
        names=PREFERENCE_NAMES,
    )


def _explored(scores: Scores, explores: int | None) -> Scores:
    """Pairs, with what the response of that number, one of them or one more, explored."""
    if explores is None:
        return scores
    if not 0 <= explores < scores.log_prob.shape[1]:
        raise ValueError(
            f"preference: explores={explores}, and a row has {scores.log_prob.shape[1]} responses"
        )
    pairs = jax.tree.map(lambda x: x[:, :2], scores)
    return pairs._replace(exploration_log_prob=scores.log_prob[:, explores])


def _winner_first(given: Preference) -> Scores:
    """Pairs whose label says that the second won are turned, for what is reported as chosen."""
    if given.label is None:
        return given.scores
    turn = given.label < 0.5
    return jax.tree.map(
        lambda other, x: jnp.where(turn if x.ndim == 1 else turn[:, None], other, x),
        given.scores.swapped(),
        given.scores,
    )


def _preference_report(scores: Scores, coef: float) -> PreferenceReport:
    if scores.ref_log_prob is None:
        reward, shown, ratio = coef * scores.log_prob, (None, None), None
    else:
        ratio = scores.log_prob - scores.ref_log_prob
        reward = coef * ratio
        shown, ratio = (reward[:, 0], reward[:, 1]), ratio[:, 0]
    margin = reward[:, 0] - reward[:, 1]
    return PreferenceReport(
        *shown,
        margin,
        _accuracy(margin),
        scores.log_prob[:, 0],
        scores.log_prob[:, 1],
        ratio,
    )


class LikelihoodReport(NamedTuple):
    """Per-row quantities of maximum likelihood."""

    nll: Float[Array, " B"]
    """Per token, in nats."""
    log_prob: Float[Array, " B"]
    length: Float[Array, " B"]


def likelihood(model: LanguageModel, *, chunk: int = scoring.CHUNK) -> Task:
    """Supervised fine-tuning: negative log-likelihood of the first response, a mean over tokens.

    A row's loss is its mean over tokens and its weight the number of them, so that the batch's
    weighted mean is the mean over all tokens.
    """

    def score(params: Any, ref_params: Any, batch: Any) -> Scores:
        del ref_params
        if not isinstance(batch, PackedBatch):
            batch = batch._replace(responses=jax.tree.map(lambda x: x[:, :1], batch.responses))
        # The streams of a packed batch are what they are: all their responses are scored.
        first = log_prob(model, params, batch, chunk=chunk)[:, :1]
        return Scores(first, cast(Array, None), batch.responses.lengths[:, :1])

    def tokens(scores: Scores) -> Float[Array, " B"]:
        return scores.chosen_length.astype(scores.log_prob.dtype)

    def loss(scores: Scores) -> Float[Array, " B"]:
        return -scores.chosen_log_prob / jnp.maximum(tokens(scores), 1)

    return Task(
        score=score,
        loss=loss,
        report=lambda s: LikelihoodReport(loss(s), s.chosen_log_prob, tokens(s)),
        names={"nll": "nll", "log_prob": "logps/chosen", "length": "length/chosen"},
        weight=tokens,
    )


class Rewarded(NamedTuple):
    """Rewards of the responses to each prompt, with what was said of them."""

    reward: Float[Array, "B K"]
    label: Float[Array, " B"] | None
    scores: Float[Array, "B K"] | None
    length: Int[Array, "B K"]


class RewardReport(NamedTuple):
    """Per-row quantities of a reward model."""

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    margin: Float[Array, " B"]
    accuracy: Float[Array, " B"]


def bradley_terry_reward(
    reward: Callable[[Any, Ragged, Ragged], Float[Array, "B K"]],
    *,
    margin_coef: float = 0.0,
    centring: float = 0.0,
    preference: PreferenceModel = bradley_terry,
) -> Task:
    r"""Reward model on pairs, by maximum likelihood of a preference model.

    .. math:: -\log \sigma(r_w - r_l - m\,(s_w - s_l)) + c\,(r_w + r_l)^2

    Args:
        reward: ``reward(params, prompts, responses) -> [B, K]``.
        margin_coef: m: how far apart two responses are asked to be for one point of difference in
            the data's ``scores`` (arXiv 2307.09288, eq. 2). With it the rewards are no longer the
            maximum-likelihood ones, nor calibrated.
        centring: c: pulls the sum of a pair's rewards to 0, which the likelihood leaves free
            (arXiv 2312.09244, eq. 2; 0.01 there).
        preference: what labels mean; of Bradley-Terry the loss is the one above.
    """

    def score(params: Any, ref_params: Any, batch: Any) -> Rewarded:
        del ref_params
        if margin_coef and batch.scores is None:
            raise ValueError("bradley_terry_reward: margin_coef needs the batch's scores.")
        rewards = reward(params, batch.prompts, batch.responses)
        return Rewarded(
            rewards,
            batch.label,
            batch.scores if margin_coef else None,
            batch.responses.lengths,
        )

    def loss(given: Rewarded) -> Float[Array, " B"]:
        margin = given.reward[:, 0] - given.reward[:, 1]
        if given.scores is not None:
            margin = margin - margin_coef * (given.scores[:, 0] - given.scores[:, 1])
        label = 1.0 if given.label is None else given.label
        total = given.reward[:, 0] + given.reward[:, 1]
        return preference.nll(margin, label=label) + centring * jnp.square(total)

    def report(given: Rewarded) -> RewardReport:
        margin = given.reward[:, 0] - given.reward[:, 1]
        return RewardReport(given.reward[:, 0], given.reward[:, 1], margin, _accuracy(margin))

    return Task(
        score=score,
        loss=loss,
        report=report,
        names={
            "chosen": "rewards/chosen",
            "rejected": "rewards/rejected",
            "margin": "rewards/margins",
            "accuracy": "rewards/accuracies",
        },
    )


def _accuracy(margin: Float[Array, " B"]) -> Float[Array, " B"]:
    return 0.5 + 0.5 * jnp.sign(margin)
