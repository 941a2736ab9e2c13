r"""Preference losses whose coefficient is data: a sweep or a chain of coefficients is one program.

The coefficient stands in the rows beside the batch, so that a step compiled once fits at any.

Axes: ``B`` rows of a batch, ``K`` responses, ``N`` rows of a training set.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from jax_klrlhf.core import objectives
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.scores import Loss
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.training import tasks
from jax_klrlhf.training.rounds.fitting import Deal
from jax_klrlhf.training.tasks import Preference, Task

LossAt = Callable[[Scalar], Loss]
"""``loss(kl_coef)(scores) -> [B]``, with ``kl_coef [B]`` traced: every loss of
:mod:`core.objectives` takes it so, with :func:`functools.partial`."""


class RowsAt(NamedTuple):
    """Rows to train on, and the coefficient of each one's loss."""

    batch: Batch
    kl_coef: Float[Array, " B"]

    @property
    def prompts(self) -> Ragged:
        """ids ``[B, P]``."""
        return self.batch.prompts

    @property
    def responses(self) -> Ragged:
        """ids ``[B, K, C]``."""
        return self.batch.responses

    @property
    def weight(self) -> Any:  # NumPy's on the host
        """Of each row in the loss, ``[B]``."""
        return self.batch.weight


class ScoredAt(NamedTuple):
    """What the loss looks at."""

    preference: Preference
    kl_coef: Float[Array, " B"]


def at(deal: Deal, kl_coef: float) -> Deal:
    """A training set whose rows carry ``kl_coef``."""
    carried = np.full(len(deal.rows.weight), kl_coef, np.float32)
    return deal._replace(rows=RowsAt(deal.rows, carried))  # pyright: ignore[reportArgumentType]


def task(model: LanguageModel, loss: LossAt) -> Task:
    """:func:`tasks.preference` on :class:`RowsAt`, against the log-probabilities that they hold.

    The reported rewards are those of the rows' coefficient.
    """

    def of(kl_coef: Scalar) -> Task:
        return tasks.preference(model, loss(kl_coef))

    def score(params: Any, ref_params: Any, rows: Any) -> ScoredAt:
        found = of(1.0).score(params, ref_params, rows.batch)
        return ScoredAt(found, rows.kl_coef)

    def report(given: ScoredAt) -> Any:
        found = of(1.0).report(given.preference)  # at 1: log-ratios
        scale = lambda x: given.kl_coef.astype(x.dtype) * x  # noqa: E731
        return found._replace(
            chosen_reward=scale(found.chosen_reward),
            rejected_reward=scale(found.rejected_reward),
            margin=scale(found.margin),
        )

    return Task(
        score=score,
        loss=lambda given: of(given.kl_coef).loss(given.preference),
        report=report,
        names=of(1.0).names,
    )


def sigmoid(kl_coef: Scalar) -> Loss:
    """The DPO loss (arXiv 2305.18290, eq. 7)."""
    return partial(objectives.sigmoid, kl_coef=kl_coef)
