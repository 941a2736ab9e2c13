r"""The training step: one mechanism for every loss.

A step minimizes the weighted mean of a loss over the rows of a batch,

.. math:: L(\theta) = \frac{\sum_i w_i \, \ell_i(\theta)}{\sum_i w_i},

where a :class:`~.tasks.Task` says how the model is run and what is minimized: any function of
log-probabilities (an objective of the core, or the user's own), and the weights are the batch's.
Preference training, maximum likelihood and reward models differ in their task alone.

Accumulation cuts the batch into micro-batches, adds up the sums :math:`\sum w_i \nabla \ell_i` and
:math:`\sum w_i`, and divides once: the result is the full batch's, however unequal the
micro-batches are. (A mean of means is not.)

Axes: ``B`` rows of the batch (prompts), ``K`` responses to a prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core.scores import Scores
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.batch import PackedBatch
from jax_klrlhf.training import compiler, tasks
from jax_klrlhf.training import reference as references
from jax_klrlhf.training.mesh import batch_sharding, rows
from jax_klrlhf.training.state import TrainState, cast_floating, merge
from jax_klrlhf.training.tasks import Task


class Moments(NamedTuple):
    """Weighted sums over rows, which add up over micro-batches, devices and steps."""

    total: Float[Array, ""]
    square: Float[Array, ""]
    weight: Float[Array, ""]
    weight_square: Float[Array, ""]

    def __repr__(self) -> str:
        """What they say: mean and standard error; the sums where they are no numbers (yet)."""
        from jax_klrlhf.training import metrics  # which names them, and so knows of them

        try:
            return f"Moments({metrics.mean(self)})"
        except TypeError:  # traced, stacked, or shapes
            return f"Moments{tuple(self)!r}"


class Info(NamedTuple):
    """What a step reports; names for the log are given by :mod:`.metrics`."""

    loss: Moments
    report: Any
    """NamedTuple of :class:`Moments`, one per quantity of the task's report."""
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    finite: Bool[Array, ""]
    """False: the loss or a gradient was not finite, and the parameters were left as they were."""
    tokens: Int[Array, ""]
    """True prompt and response tokens in the batch."""
    slots: Int[Array, ""]
    """Token slots computed on: the tokens and their padding."""


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
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    compute_dtype: Any = None,
    shardings: Any = None,
) -> TrainStep:
    """Compile the step of a task.

    Args:
        task: what is scored, minimized and reported (:mod:`.tasks`).
        optimizer: any Optax transformation, as given to :func:`state.init`.
        micro_batches: pieces that the batch is cut into, one in memory at a time.
        compute_dtype: the parameters are cast to it before the model runs (``jnp.bfloat16``);
            the masters, their gradients and the optimizer stay as they are.
        shardings: of the state, from :func:`mesh.init`; one device without.

    Raises:
        ValueError: at trace time, where rows are not a multiple of micro-batches and mesh.
    """
    if micro_batches < 1:
        raise ValueError(f"make_step: micro_batches is {micro_batches}; it must be at least 1.")
    mesh = None if shardings is None else shardings.step.mesh

    def train_step(carried: TrainState, fixed: tuple[Any, Any], batch: Any) -> Any:
        state = carried._replace(frozen=fixed[0], ref_params=fixed[1])
        parts = _cut(batch, micro_batches, 1 if mesh is None else rows(mesh))
        objective = partial(weighted_sums, task, state, compute_dtype)

        def differentiate(params: Any, part: Any) -> tuple[Sums, Any]:
            with jax.named_scope("loss"):
                (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, part)
            if shardings is not None:
                # Whatever the optimizer does: each device keeps its part of the sum alone.
                grads = jax.lax.with_sharding_constraint(grads, shardings.params)
            return sums, grads

        if micro_batches == 1:
            sums, grads = differentiate(state.params, parts)
        else:
            sums, grads = _accumulate(differentiate, state.params, parts)
        # No row with weight: no gradient, rather than 0/0.
        total = jnp.where(sums.loss.weight > 0, sums.loss.weight, 1.0)
        grads = jax.tree.map(lambda g: g / total.astype(g.dtype), grads)
        # Optax mixes types and ranks freely, whatever the session is set to.
        mixed = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        with mixed[0], mixed[1], jax.named_scope("optimizer"):
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
            slots=jnp.int32(tasks.slots(batch)),
        )
        return moved, info

    if shardings is None:
        alone = jax.jit(train_step, donate_argnums=0, compiler_options=compiler.options(None))
        return TrainStep(alone, None)
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
            compiler_options=compiler.options(replicated.mesh),
        ),
        replicated.mesh,
    )


def make_train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Scores], Float[Array, " B"]],
    *,
    reference: references.Reference = references.cached,
    report_coef: float = 1.0,
    chunk: int = scoring.CHUNK,
    micro_batches: int = 1,
    compute_dtype: Any = None,
    shardings: Any = None,
) -> TrainStep:
    """Step of preference training: :func:`make_step` of :func:`tasks.preference`.

    ``loss`` is for example
    ``functools.partial(objectives.sigmoid, kl_coef=0.1)``;
    ``report_coef`` is the scale of the *reported* rewards, and trains nothing.
    """
    return make_step(
        tasks.preference(model, loss, reference=reference, report_coef=report_coef, chunk=chunk),
        optimizer,
        micro_batches=micro_batches,
        compute_dtype=compute_dtype,
        shardings=shardings,
    )


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


class Sums(NamedTuple):
    """Weighted sums of the loss and of what is reported."""

    loss: Moments
    report: Any


def weighted_sums(
    task: Task, state: TrainState, compute_dtype: Any, params: Any, batch: Any
) -> tuple[Float[Array, ""], Sums]:
    """Weighted sum of the loss over a batch, and the sums to report.

    ``params`` are the trained ones, given apart from the state to be differentiated.
    """
    losses, report, weights = per_row(
        task, merge(params, state.frozen), state.ref_params, batch, compute_dtype=compute_dtype
    )
    sums = Sums(moments(losses, weights), jax.tree.map(lambda x: moments(x, weights), report))
    return sums.loss.total, sums


def per_row(
    task: Task, params: Any, ref_params: Any, batch: Any, *, compute_dtype: Any = None
) -> tuple[Float[Array, " B"], Any, Float[Array, " B"]]:
    """Loss, report and weight of each row, in ``compute_dtype``."""
    params = cast_floating(params, compute_dtype)
    ref_params = cast_floating(ref_params, compute_dtype)
    scores = task.score(params, ref_params, batch)
    weights = batch.weight
    if task.weight is not None:
        weights = weights * jax.lax.stop_gradient(task.weight(scores))
    # A row that only fills the batch may be degenerate (an empty response): a loss must not see
    # it, or 0/0 there would reach the gradient of the others.
    scores = jax.tree.map(
        lambda x: jnp.where(jnp.expand_dims(weights > 0, range(1, x.ndim)), x, jnp.ones_like(x)),
        scores,
    )
    losses = task.loss(scores)
    if losses.shape != weights.shape:
        raise ValueError(
            f"the loss returned shape {losses.shape} for {weights.shape[0]} rows; it must return "
            "one number per row, [B]."
        )
    return losses, task.report(scores), weights


def _accumulate(differentiate: Any, params: Any, parts: Any) -> tuple[Sums, Any]:
    """Sums over micro-batches ``[n, ...]``, one at a time."""
    shapes = jax.eval_shape(differentiate, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, differentiate(params, part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _cut(batch: Any, micro_batches: int, parts: int) -> Any:
    """``[B, ...]`` to ``[n, B / n, ...]``; the batch itself where n is 1.

    Micro-batch m takes every n-th row from the m-th on (of a packed batch, every n-th stream with
    its examples): each device keeps its own.
    """
    kind, count = "rows", batch.weight.shape[0]
    if isinstance(batch, PackedBatch):
        kind, count = "streams", batch.packed.stream.shape[0]
    if count % (micro_batches * parts):
        raise ValueError(
            f"a batch of {count} {kind} does not divide into {micro_batches} micro-batches on "
            f"{parts} parts of the mesh; make it a multiple of {micro_batches * parts} "
            "(rows of weight 0 may fill it)."
        )
    if micro_batches == 1:
        return batch

    def cut(x: Array) -> Array:
        each = x.shape[0] // count
        split = x.reshape(count // micro_batches, micro_batches, each, *x.shape[1:])
        return jnp.moveaxis(split, 1, 0).reshape(micro_batches, -1, *x.shape[1:])

    return jax.tree.map(cut, batch)


def _tokens(batch: Any) -> Int[Array, ""]:
    prompts = jnp.sum(batch.prompts.lengths, dtype=jnp.int32)
    return prompts + jnp.sum(batch.responses.lengths, dtype=jnp.int32)
