r"""Log-probabilities of the reference policy pi0: where a training step takes them from.

A reference is a function ``(log_prob, params, ref_params, batch) -> [B, K] or None`` handed to the
step: :func:`cached` reads them from the batch, :func:`live` scores with the state's ``ref_params``,
:func:`base` with the policy's own frozen base (LoRA: no second copy), :func:`free` has none
(SimPO, maximum likelihood). pi0 is the reference by construction: the state holds its
fingerprint, and a cache on disk that another model made is refused by name.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel

LogProb = Callable[[Any, Any], Float[Array, "B K"]]
"""``log_prob(params, batch)``: scores the batch's responses."""
Reference = Callable[[LogProb, Any, Any, Any], Float[Array, "B K"] | None]


def cached(log_prob: LogProb, params: Any, ref_params: Any, batch: Any) -> Float[Array, "B K"]:
    """Computed before (:func:`precompute`) and carried by the batch as ``ref_log_prob``."""
    del log_prob, params, ref_params
    if batch.ref_log_prob is None:
        raise ValueError(
            "reference.cached: the batch has no ref_log_prob. Compute it once with "
            "reference.precompute, or hand in reference.live with init(..., ref_params=params)."
        )
    return batch.ref_log_prob


def live(log_prob: LogProb, params: Any, ref_params: Any, batch: Any) -> Float[Array, "B K"]:
    """Scored in the step with the state's ``ref_params``, which never change."""
    del params
    if ref_params is None:
        raise ValueError("reference.live: the state has no reference; give init(ref_params=...).")
    return jax.lax.stop_gradient(log_prob(ref_params, batch))


def base(strip: Callable[[Any], Any]) -> Reference:
    """The policy with its adapters taken away: ``strip(params)`` are the base's parameters."""

    def reference(log_prob: LogProb, params: Any, ref_params: Any, batch: Any) -> Any:
        del ref_params
        return jax.lax.stop_gradient(log_prob(strip(params), batch))

    return reference


def free(log_prob: LogProb, params: Any, ref_params: Any, batch: Any) -> None:
    """No reference: for losses that read log-probabilities alone."""
    del log_prob, params, ref_params, batch


def make_log_prob(model: LanguageModel, *, chunk: int = scoring.CHUNK) -> LogProb:
    """Compiled ``log_prob(params, batch) -> [B, K]`` of a batch's responses."""

    @jax.jit
    def log_prob(params: Any, prompts: Any, responses: Any) -> Float[Array, "B K"]:
        return scoring.log_prob(model, params, prompts, responses, chunk=chunk)

    return lambda params, batch: log_prob(params, batch.prompts, batch.responses)


def precompute(
    model: LanguageModel, params: Any, batches: Iterable[Any], *, chunk: int = scoring.CHUNK
) -> list[Any]:
    """The batches with ``ref_log_prob`` filled in: one pass of pi0, before training begins."""
    log_prob = make_log_prob(model, chunk=chunk)
    return [batch._replace(ref_log_prob=np.asarray(log_prob(params, batch))) for batch in batches]
