r"""The training step: one mechanism for every loss.

A step minimizes the weighted mean of a loss over the rows of a batch,

.. math:: L(\theta) = \frac{\sum_i w_i \, \ell_i(\theta)}{\sum_i w_i},

where ``score(params, ref_params, batch)`` runs the model, ``loss(scores) -> [B]`` is any function of
what it returns (an objective of the core on log-ratios, or the user's own), and the weights are
the batch's. Direct preference optimization, maximum likelihood and Bradley-Terry reward models
differ in ``score`` and ``loss`` alone.

Accumulation cuts the batch into micro-batches, adds up the sums :math:`\sum w_i \nabla \ell_i` and
:math:`\sum w_i`, and divides once: the result is the full batch's, however unequal the
micro-batches are. (A mean of means is not.)

Axes: ``B`` rows of the batch (prompts), ``K`` responses to a prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core.objectives import Scores
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training import reference as references
from jax_klrlhf.training.mesh import batch_sharding, rows
from jax_klrlhf.training.state import TrainState, merge


class Batch(NamedTuple):
    """Rows of a training batch; every array's first axis is ``B``.

    Any object with these attributes serves, with further ones of a ``score`` of its own.
    """

    prompts: Ragged
    """ids ``[B, P]``."""
    responses: Ragged
    """ids ``[B, K, C]``; of a preference, chosen at index 0 and rejected at 1."""
    weights: Float[Array, " B"]
    """Weight of each row in the loss; 0 for a row that only fills the batch."""
    ref_log_prob: Float[Array, "B K"] | None = None
    """Log-probability of the responses under pi0, where it was computed before."""


class Moments(NamedTuple):
    """Weighted sums over rows, which add up over micro-batches, devices and steps."""

    total: Float[Array, ""]
    square: Float[Array, ""]
    weight: Float[Array, ""]
    weight_square: Float[Array, ""]


class Info(NamedTuple):
    """What a step reports; names for the log are given by :mod:`.metrics`."""

    loss: Moments
    report: Any
    """NamedTuple of :class:`Moments`, one per quantity of the ``report`` function."""
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    finite: Bool[Array, ""]
    """False: the loss or a gradient was not finite, and the parameters were left as they were."""
    tokens: Int[Array, ""]
    """True prompt and response tokens in the batch."""
    slots: Int[Array, ""]
    """Token slots computed on: the tokens and their padding."""


Score = Callable[[Any, Any, Any], Any]
"""``score(params, ref_params, batch)``: a NamedTuple of arrays ``[B, ...]`` (or None)."""


@dataclass(frozen=True)
class TrainStep:
    """A compiled step: ``step(state, batch) -> (state, info)``. The given state is used up."""

    jitted: Any
    mesh: Mesh | None

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Info]:
        """Take one step. ``frozen`` and ``ref_params`` of the state stay valid; the rest not."""
        carried, info = self._under_mesh(self.jitted, state, batch)
        return carried._replace(frozen=state.frozen, ref_params=state.ref_params), info

    def lower(self, state: Any, batch: Any) -> Any:
        """The step lowered for these arrays or shapes, to compile ahead of time."""
        return self._under_mesh(self.jitted.lower, state, batch)

    def _under_mesh(self, function: Any, state: Any, batch: Any) -> Any:
        # Frozen parameters and the reference pass beside the state: what is not given away
        # need not be handed back.
        carried = state._replace(frozen=None, ref_params=None)
        arguments = (carried, (state.frozen, state.ref_params), batch)
        if self.mesh is None:
            return function(*arguments)
        with jax.set_mesh(self.mesh):
            return function(*arguments)


def make_step(
    score: Score,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Any], Float[Array, " B"]],
    *,
    report: Callable[[Any], Any],
    weight: Callable[[Any], Float[Array, " B"]] | None = None,
    micro_batches: int = 1,
    compute_dtype: Any = None,
    shardings: Any = None,
) -> TrainStep:
    """Compile a step from what is scored and what is minimized.

    Args:
        score: ``score(params, ref_params, batch)`` runs the model with the policy's whole parameters.
        optimizer: any Optax transformation, as given to :func:`state.init`.
        loss: per-row loss ``[B]`` (nats) of the scores.
        report: NamedTuple of ``[B]`` quantities of the scores, averaged into ``info.report``.
        weight: a row's weight from its scores, times the batch's; 1 by default.
        micro_batches: pieces that the batch is cut into, one in memory at a time.
        compute_dtype: the parameters are cast to it before the model runs (``jnp.bfloat16``);
            the masters, their gradients and the optimizer stay as they are.
        shardings: of the state (:func:`mesh.state_shardings`); one device without.

    Raises:
        ValueError: at trace time, where rows are not a multiple of micro-batches and mesh.
    """
    if micro_batches < 1:
        raise ValueError(f"make_step: micro_batches is {micro_batches}; it must be at least 1.")
    mesh = None if shardings is None else shardings.step.mesh

    def train_step(carried: TrainState, fixed: tuple[Any, Any], batch: Any) -> Any:
        state = carried._replace(frozen=fixed[0], ref_params=fixed[1])
        parts = _cut(batch, micro_batches, 1 if mesh is None else rows(mesh))
        objective = partial(_objective, score, loss, report, weight, state, compute_dtype)
        if micro_batches == 1:
            sums, grads = _value_and_grad(objective, state.params, parts)
        else:
            sums, grads = _accumulate(objective, state.params, parts)
        # No row with weight: no gradient, rather than 0/0.
        total = jnp.where(sums.loss.weight > 0, sums.loss.weight, 1.0)
        grads = jax.tree.map(lambda g: g / total.astype(g.dtype), grads)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        # Optax mixes types and ranks freely, whatever the session is set to.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.loss.total) & jnp.isfinite(grad_norm)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        moved = carried._replace(
            step=carried.step + 1,
            params=jax.tree.map(keep, params, carried.params),
            opt_state=jax.tree.map(keep, opt_state, carried.opt_state),
        )
        info = Info(
            loss=sums.loss,
            report=sums.report,
            grad_norm=grad_norm,
            update_norm=optax.tree.norm(updates),
            finite=finite,
            tokens=_tokens(batch),
            slots=jnp.int32(batch.prompts.ids.size + batch.responses.ids.size),
        )
        return moved, info

    if shardings is None:
        return TrainStep(jax.jit(train_step, donate_argnums=0), None)
    carried = shardings._replace(frozen=None, ref_params=None)
    replicated = shardings.step
    return TrainStep(
        jax.jit(
            train_step,
            in_shardings=(
                carried,
                (shardings.frozen, shardings.ref_params),
                batch_sharding(replicated.mesh),
            ),
            out_shardings=(carried, replicated),
            donate_argnums=0,
        ),
        replicated.mesh,
    )


class PreferenceReport(NamedTuple):
    """Per-row quantities of a preference batch; TRL's names in :mod:`.metrics`.

    Rewards and the KL's first-order estimate are ``None`` for a loss without reference.
    """

    chosen_reward: Float[Array, " B"] | None
    rejected_reward: Float[Array, " B"] | None
    margin: Float[Array, " B"]
    accuracy: Float[Array, " B"]
    chosen_log_prob: Float[Array, " B"]
    rejected_log_prob: Float[Array, " B"]


def preference_report(scores: Scores, *, kl_coef: float) -> PreferenceReport:
    """Implicit rewards ``kl_coef * log_ratio`` and log-probabilities; a tie counts as one half.

    Without reference the margin is that of the log-probabilities.
    """
    chosen, rejected = scores.log_prob[..., 0], scores.log_prob[..., 1]
    if scores.ref_log_prob is None:
        rewards = (None, None)
        margin = kl_coef * (chosen - rejected)
    else:
        ratio = kl_coef * (scores.log_prob - scores.ref_log_prob)
        rewards = (ratio[..., 0], ratio[..., 1])
        margin = ratio[..., 0] - ratio[..., 1]
    return PreferenceReport(*rewards, margin, 0.5 + 0.5 * jnp.sign(margin), chosen, rejected)


def policy_scores(
    model: LanguageModel,
    *,
    reference: references.Reference = references.cached,
    chunk: int = scoring.CHUNK,
) -> Score:
    """Score function of a language model: log-probabilities of the responses under pi and pi0."""

    def log_prob(params: Any, batch: Any) -> Float[Array, "B K"]:
        return scoring.log_prob(model, params, batch.prompts, batch.responses, chunk=chunk)

    def score(params: Any, ref_params: Any, batch: Any) -> Scores:
        return Scores(
            log_prob=log_prob(params, batch),
            ref_log_prob=cast(Array, reference(log_prob, params, ref_params, batch)),
            length=batch.responses.lengths,
        )

    return score


def make_train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Scores], Float[Array, " B"]],
    *,
    reference: references.Reference = references.cached,
    kl_coef: float = 1.0,
    micro_batches: int = 1,
    compute_dtype: Any = None,
    chunk: int = scoring.CHUNK,
    shardings: Any = None,
) -> TrainStep:
    """Step of preference training with any loss on log-probabilities.

    ``loss`` is for example
    ``lambda s: objectives.sigmoid(s.chosen_log_ratio, s.rejected_log_ratio, kl_coef=0.1)``.
    ``kl_coef`` here is the scale of the *reported* rewards. Further arguments as in
    :func:`make_step`, and ``reference`` as in :mod:`.reference`.
    """
    return make_step(
        policy_scores(model, reference=reference, chunk=chunk),
        optimizer,
        loss,
        report=partial(preference_report, kl_coef=kl_coef),
        micro_batches=micro_batches,
        compute_dtype=compute_dtype,
        shardings=shardings,
    )


class _Sums(NamedTuple):
    loss: Moments
    report: Any


def moments(values: Float[Array, " B"], weights: Float[Array, " B"]) -> Moments:
    """Weighted sums of per-row values; a row of weight 0 counts for nothing, be it NaN."""
    values = jnp.where(weights > 0, values.astype(jnp.float32), 0.0)
    weights = weights.astype(jnp.float32)
    return Moments(
        total=jnp.sum(weights * values),
        square=jnp.sum(weights * values**2),
        weight=jnp.sum(weights),
        weight_square=jnp.sum(weights**2),
    )


def _objective(
    score: Score,
    loss: Callable[[Any], Array],
    report: Callable[[Any], Any],
    weight: Callable[[Any], Array] | None,
    state: TrainState,
    compute_dtype: Any,
    params: Any,
    batch: Any,
) -> tuple[Array, _Sums]:
    """Weighted sum of the loss over a micro-batch, and the sums to report."""
    whole, ref_params = merge(params, state.frozen), state.ref_params
    if compute_dtype is not None:
        lower = partial(_cast, dtype=compute_dtype)
        whole, ref_params = lower(whole), lower(ref_params)
    scores = score(whole, ref_params, batch)
    weights = batch.weights
    if weight is not None:
        weights = weights * jax.lax.stop_gradient(weight(scores))
    # A row that only fills the batch may be degenerate (an empty response): a loss must not see
    # it, or 0/0 there would reach the gradient of the others.
    scores = jax.tree.map(
        lambda x: jnp.where(jnp.expand_dims(weights > 0, range(1, x.ndim)), x, jnp.ones_like(x)),
        scores,
    )
    losses = loss(scores)
    if losses.shape != weights.shape:
        raise ValueError(
            f"the loss returned shape {losses.shape} for {weights.shape[0]} rows; it must return "
            "one number per row, [B]."
        )
    sums = _Sums(
        moments(losses, weights),
        jax.tree.map(lambda x: moments(x, weights), report(scores)),
    )
    return sums.loss.total, sums


def _value_and_grad(objective: Any, params: Any, batch: Any) -> tuple[_Sums, Any]:
    (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
    return sums, grads


def _accumulate(objective: Any, params: Any, parts: Any) -> tuple[_Sums, Any]:
    """Sums over micro-batches ``[n, ...]``, one at a time."""
    shapes = jax.eval_shape(
        partial(_value_and_grad, objective), params, jax.tree.map(lambda x: x[0], parts)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, _value_and_grad(objective, params, part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _cut(batch: Any, micro_batches: int, parts: int) -> Any:
    """``[B, ...]`` to ``[n, B / n, ...]``; the batch itself where n is 1.

    Micro-batch m takes every n-th row from the m-th on: each device keeps its own rows.
    """
    count = batch.weights.shape[0]
    if count % (micro_batches * parts):
        raise ValueError(
            f"a batch of {count} rows does not divide into {micro_batches} micro-batches on "
            f"{parts} parts of the mesh; make it a multiple of {micro_batches * parts} "
            "(rows of weight 0 may fill it)."
        )
    if micro_batches == 1:
        return batch
    return jax.tree.map(
        lambda x: jnp.moveaxis(
            x.reshape(count // micro_batches, micro_batches, *x.shape[1:]), 1, 0
        ),
        batch,
    )


def _cast(tree: Any, *, dtype: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _tokens(batch: Any) -> Int[Array, ""]:
    prompts = jnp.sum(batch.prompts.lengths, dtype=jnp.int32)
    return prompts + jnp.sum(batch.responses.lengths, dtype=jnp.int32)
