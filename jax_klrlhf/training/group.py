"""Training on groups: K responses to a prompt, their rewards, and a loss on all of them at once.

The task beside :func:`.tasks.preference` for regression on rewards and policy gradients: any
``loss(group) -> [B]`` of :mod:`core.group_losses`, which is the function that a bandit is fitted
by. What the loss may look at, other than the policy's own log-probabilities, is in the batch:
rewards, and log-probabilities token by token under the reference and under the policy that drew.

Axes: ``B`` rows (prompts), ``K`` responses to a prompt, ``P`` prompt and ``C`` response positions.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core import policy_gradient
from jax_klrlhf.core.group_losses import Group, GroupLoss
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training.tasks import Task


class GroupBatch(NamedTuple):
    """Rows of a training batch; every array's first axis is ``B``."""

    prompts: Ragged
    """ids ``[B, P]``."""
    responses: Ragged
    """ids ``[B, K, C]``."""
    weight: Float[Array, " B"]
    """Weight of each row in the loss; 0 for a row that only fills the batch."""
    reward: Float[Array, "B K"]
    ref_log_prob: Float[Array, "B K C"] | None = None
    """Of each token under the reference."""
    old_log_prob: Float[Array, "B K C"] | None = None
    """Of each token under the policy that drew, as scoring gives it; None beside
    ``sampled_log_prob``: the policy that drew is the one that is scored."""
    sampled_log_prob: Float[Array, "B K"] | None = None
    """Of each response, as the sampler gave it."""
    where: Bool[Array, "B K"] | None = None
    """True at the responses that count."""


class GroupReport(NamedTuple):
    """Per-row quantities of a batch of groups; nats where they are of probabilities."""

    reward: Float[Array, " B"]
    deviation: Float[Array, " B"]
    log_ratio: Float[Array, " B"] | None
    """Mean log-ratio to the reference: on the policy's own draws an estimate of the KL (k1)."""
    drift: Float[Array, " B"] | None
    """Mean distance of a response's log-probability from that under the policy that drew."""
    mismatch: Float[Array, " B"] | None
    """Mean distance of the sampler's log-probability of a response from scoring's at the draw."""
    length: Float[Array, " B"]


NAMES = {
    "reward": "reward/mean",
    "deviation": "reward/deviation",
    "log_ratio": "kl/drawn",
    "drift": "ratio/drift",
    "mismatch": "drawn/sampler_scorer_mismatch",
    "length": "length/drawn",
}


class _Scored(NamedTuple):
    """What the loss is of, and what is reported beside."""

    group: Group
    sampled: Float[Array, "B K"] | None


def group(
    model: LanguageModel,
    loss: GroupLoss,
    *,
    importance_limit: float | None = None,
    chunk: int = scoring.CHUNK,
) -> Task:
    """Minimize a loss on groups of K responses.

    Args:
        model: the policy.
        loss: for example ``group_losses.rloo(kl_coef=0.1)``; what it needs must be in the batch,
            and a loss that misses a field says which.
        importance_limit: where the batch has ``sampled_log_prob``, weigh each response by its
            scored over its sampled probability, at most this.
        chunk: tokens projected on the vocabulary at one time.
    """

    def score(params: Any, ref_params: Any, batch: GroupBatch) -> _Scored:
        del ref_params
        token = scoring.token_log_prob(model, params, batch.prompts, batch.responses, chunk=chunk)
        old, sampled, importance = batch.old_log_prob, batch.sampled_log_prob, None
        if sampled is not None:
            # At the first step after a draw another forward pass would say the same again.
            old = lax.stop_gradient(token) if old is None else old
            if importance_limit is not None:
                ratio = policy_gradient.ratio(old.sum(-1), sampled)
                importance = policy_gradient.truncated(ratio, limit=importance_limit)
        made = Group(
            token_log_prob=token,
            reward=batch.reward,
            token_where=batch.responses.mask,
            ref_token_log_prob=batch.ref_log_prob,
            old_token_log_prob=old,
            importance=importance,
            where=batch.where,
        )
        return _Scored(made, sampled)

    def of_group(scored: _Scored) -> Array:
        return loss(scored.group)

    return Task(score=score, loss=of_group, report=_report, names=NAMES)


def _report(scored: _Scored) -> GroupReport:
    group = scored.group
    keep = jnp.ones(group.reward.shape, bool) if group.where is None else group.where
    count = jnp.maximum(jnp.sum(keep, -1), 1).astype(group.reward.dtype)

    def over(x: Array) -> Array:
        return jnp.sum(jnp.where(keep, x, 0), -1) / count

    mean = over(group.reward)
    spread = over((group.reward - mean[:, None]) ** 2)
    drift = None
    if group.old_token_log_prob is not None:
        drift = over(jnp.abs(group.log_prob - group.old_log_prob))
    mismatch = None
    if scored.sampled is not None:
        mismatch = over(jnp.abs(group.old_log_prob - scored.sampled))
    log_ratio = None if group.ref_token_log_prob is None else over(group.log_ratio)
    stopped = lax.stop_gradient((log_ratio, drift, mismatch))
    return GroupReport(mean, jnp.sqrt(spread), *stopped, over(group.length.astype(mean.dtype)))
