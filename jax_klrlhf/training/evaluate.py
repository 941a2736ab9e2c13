r"""Evaluation: a task on held-out rows, and the divergence from the reference on the policy's own.

**KL(pi || pi0) needs samples from pi.** The log-ratio of offline pairs is an average over whoever
wrote them: it is not a KL, and may be negative. :func:`kl_along` measures given responses; what
:func:`make_divergence` compiles draws them from the policy and reports

- ``kl/ref``: the sum over a response's tokens of the exact conditional divergence
  :math:`\sum_v \pi(v) \log(\pi(v) / \pi_0(v))`, averaged over drawn responses. Unbiased, since the
  divergence of two chains is the expected sum of the conditional ones; and of lower variance than
  the next, which it is the Rao-Blackwell form of;
- ``kl/k1``: the sampled log-ratio :math:`\log \pi(y)/\pi_0(y)`, unbiased: a check on the first;
- ``entropy``: of the policy's law of whole responses, likewise by exact conditional entropies.

These are estimates to read, not losses: the gradient through samples of the first two is not the
KL's (``core.divergence`` has the table). Standard errors are over prompts, the independent units;
samples of one prompt are averaged first. All in nats per response.

Axes: ``B`` prompts, ``K`` responses.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from jax_klrlhf import placement
from jax_klrlhf.core import measure
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import sampling, scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.logits import Warp
from jax_klrlhf.results import Metric, mean
from jax_klrlhf.training.metrics import Metrics
from jax_klrlhf.training.state import TrainState, cast_floating
from jax_klrlhf.training.step import per_row
from jax_klrlhf.training.tasks import Task


def make_evaluate(
    task: Task, *, compute_dtype: Any = None, shardings: Any = None
) -> Callable[[TrainState, Iterable[Any]], Metrics]:
    """Compile a task's evaluation: ``evaluate(state, batches) -> metrics``.

    Named ``eval/...``: the loss, what the task reports, and for tasks with margins
    ``eval/calibration_error`` (:func:`calibration_error` of the probability
    :math:`\\sigma(\\text{margin})` of a pair's label). Each is an average over all rows with its
    standard error over rows, and their number.
    """
    mesh = None if shardings is None else shardings.step.mesh
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=replicated)
    def rows(params: Any, ref_params: Any, batch: Any) -> Any:
        return per_row(task, params, ref_params, batch, compute_dtype=compute_dtype)

    def evaluate(state: TrainState, batches: Iterable[Any]) -> Metrics:
        found = []
        for batch in batches:
            with _under(mesh):
                out = rows(state.policy, state.ref_params, placement.put(batch, mesh))
            found.append(jax.device_get(out))
        losses, report, weights = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
        metrics = {"eval/loss": weighted(losses, weights)}
        for field, name in task.names.items():
            values = getattr(report, field)
            if values is not None:
                metrics[f"eval/{name}"] = weighted(values, weights)
        if "margin" in task.names:
            kept = report.margin[weights > 0]
            metrics["eval/calibration_error"] = Metric(calibration_error(kept), None, kept.size)
        return metrics

    return evaluate


def calibration_error(margin: np.ndarray, *, bins: int = 10) -> float:
    r"""Expected calibration error of the probabilities :math:`\sigma(|m|)` of being right.

    The predictions are cut into ``bins`` equal intervals of [1/2, 1]; the mean over pairs of the
    distance between share right and mean prediction of their interval. Positive even for a
    calibrated model, by about the square root of bins over pairs.
    :func:`core.measure.calibration` of certain labels.
    """
    margins = jnp.asarray(margin, jnp.float32)
    return float(measure.calibration(margins, jnp.ones_like(margins), bins=bins))


class Along(NamedTuple):
    """A policy along responses, at each token of them; nats, 0 after a response's end."""

    kl: Float[Array, "B K C"]
    """Exact conditional divergence from the reference."""
    entropy: Float[Array, "B K C"]
    """Exact conditional entropy."""
    log_prob: Float[Array, "B K C"]
    ref_log_prob: Float[Array, "B K C"]


def kl_along(
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    responses: Ragged,
    *,
    reference: tuple[LanguageModel, Any],
    chunk: int = scoring.CHUNK,
) -> Along:
    r"""The exact divergence at each token of responses, and what is scored in the same pass.

    .. math:: \mathrm{KL}(\pi \| \pi_0) = E_{y \sim \pi} \sum_i \sum_v \pi(v \mid x, y_{<i})
              \log \frac{\pi(v \mid x, y_{<i})}{\pi_0(v \mid x, y_{<i})}

    So ``kl.sum(-1)``, averaged over *the policy's own* responses, is unbiased for KL(pi || pi0) in
    nats, and ``entropy.sum(-1)`` for the entropy; ``(log_prob - ref_log_prob).sum(-1)`` is unbiased
    too, of more variance. On responses of anybody else none of them estimates the KL.

    Args:
        model: the policy; ``reference`` is pi0, of the same vocabulary.
        params: of the policy.
        prompts: ``[B, P]``.
        responses: ``[B, K, C]``.
        reference: model and parameters.
        chunk: tokens projected on the vocabulary at one time.
    """
    scores = scoring.score(model, params, prompts, responses, reference=reference, chunk=chunk)
    # Never None beside a reference.
    kl, ref_log_prob = cast(Array, scores.kl), cast(Array, scores.ref_log_prob)
    return Along(kl, scores.entropy, scores.log_prob, ref_log_prob)


def make_divergence(
    model: LanguageModel,
    *,
    samples: int,
    max_new_tokens: int,
    stop: tuple[int, ...],
    mesh: Mesh | None = None,
    compute_dtype: Any = None,
    chunk: int = scoring.CHUNK,
) -> Callable[..., Metrics]:
    """Compile ``divergence(key, params, ref_params, prompts, where=None) -> metrics`` (see the
    module). ``prompts`` are batches, of each this process's rows; ``where`` are as many arrays
    ``[B]``, False at rows that only fill a batch and are not to count.

    Args:
        model: the policy and, with other parameters, the reference.
        samples: responses drawn per prompt, at temperature 1.
        max_new_tokens: where a response is cut; the KL is then that of the cut responses.
        stop: ids that end a response.
        mesh: of the parameters; one device without.
        compute_dtype: the training step's.
        chunk: tokens projected on the vocabulary at one time.
    """
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=replicated)
    def measure(key: Any, params: Any, ref_params: Any, prompts: Ragged) -> Any:
        params, ref_params = (cast_floating(p, compute_dtype) for p in (params, ref_params))
        keys = jax.random.split(key, prompts.lengths.shape[0])
        drawn = sampling.sample(
            keys, model, params, prompts, Warp(), samples=samples,
            max_new_tokens=max_new_tokens, stop=stop,
        )  # fmt: skip
        found = kl_along(
            model, params, prompts, drawn.responses, reference=(model, ref_params), chunk=chunk
        )
        dtype = found.ref_log_prob.dtype
        return {
            "kl/ref": found.kl.sum(-1).mean(-1),
            "kl/k1": (found.log_prob - found.ref_log_prob).sum(-1).mean(-1),
            "entropy": found.entropy.sum(-1).mean(-1),
            "length/sampled": drawn.responses.lengths.astype(dtype).mean(-1),
            "sampler_scorer_mismatch": sampling.mismatch(drawn, found.log_prob).mean(-1),
            "finished": drawn.finished.astype(dtype).mean(-1),
        }

    def divergence(
        key: Key[Array, ""],
        params: Any,
        ref_params: Any,
        prompts: Iterable[Ragged],
        where: Iterable[np.ndarray] | None = None,
    ) -> Metrics:
        found = []
        batches = ((rows, np.ones(len(rows.lengths), bool)) for rows in prompts)
        if where is not None:
            batches = zip(prompts, where, strict=True)
        for number, (rows, keep) in enumerate(batches):
            rows, keep = placement.put((rows, keep), mesh)
            with _under(mesh):
                out = measure(jax.random.fold_in(key, number), params, ref_params, rows)
            # Rows come back of all processes, and so does which of them count.
            keep = placement.host(keep)
            found.append({name: values[keep] for name, values in jax.device_get(out).items()})
        together = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
        return {f"eval/{name}": mean(values) for name, values in together.items()}

    return divergence


def _under(mesh: Any) -> Any:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def weighted(values: np.ndarray, weights: np.ndarray) -> Metric:
    """Weighted mean; the standard error of a ratio estimator, rows being independent."""
    keep = weights > 0
    x, w = values[keep].astype(np.float64), weights[keep].astype(np.float64)
    if x.size == 0:
        return Metric(math.nan, None, 0)
    value = float(np.average(x, weights=w))
    if x.size == 1:
        return Metric(value, None, 1)
    spread = math.sqrt(float(np.sum((w * (x - value)) ** 2)) * x.size / (x.size - 1))
    return Metric(value, spread / float(w.sum()), x.size)
