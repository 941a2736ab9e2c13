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

from jax_klrlhf.core.group_losses import Group, Loss
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
    """Of each token under the policy that drew, as scoring gives it."""
    importance: Float[Array, "B K"] | None = None
    """Weight of each response where the sampler's law was not the scored one's."""
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
    length: Float[Array, " B"]


NAMES = {
    "reward": "reward/mean",
    "deviation": "reward/deviation",
    "log_ratio": "kl/drawn",
    "drift": "ratio/drift",
    "length": "length/drawn",
}


def group(model: LanguageModel, loss: Loss, *, chunk: int = scoring.CHUNK) -> Task:
    """Minimize a loss on groups of K responses.

    Args:
        model: the policy.
        loss: for example ``group_losses.rloo(kl_coef=0.1)``; what it needs must be in the batch,
            and a loss that misses a field says which.
        chunk: tokens projected on the vocabulary at one time.
    """

    def score(params: Any, ref_params: Any, batch: GroupBatch) -> Group:
        del ref_params
        return Group(
            token_log_prob=scoring.token_log_prob(
                model, params, batch.prompts, batch.responses, chunk=chunk
            ),
            reward=batch.reward,
            token_where=batch.responses.mask,
            ref_token_log_prob=batch.ref_log_prob,
            old_token_log_prob=batch.old_log_prob,
            importance=batch.importance,
            where=batch.where,
        )

    return Task(score=score, loss=loss, report=_report, names=NAMES)


def _report(group: Group) -> GroupReport:
    keep = jnp.ones(group.reward.shape, bool) if group.where is None else group.where
    count = jnp.maximum(jnp.sum(keep, -1), 1).astype(group.reward.dtype)

    def over(x: Array) -> Array:
        return jnp.sum(jnp.where(keep, x, 0), -1) / count

    mean = over(group.reward)
    spread = over((group.reward - mean[:, None]) ** 2)
    drift = None
    if group.old_token_log_prob is not None:
        drift = over(jnp.abs(group.log_prob - group.old_log_prob))
    log_ratio = None if group.ref_token_log_prob is None else over(group.log_ratio)
    stopped = lax.stop_gradient((log_ratio, drift))
    return GroupReport(mean, jnp.sqrt(spread), *stopped, over(group.length.astype(mean.dtype)))
