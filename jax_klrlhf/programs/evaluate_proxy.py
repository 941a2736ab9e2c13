r"""What a proxy of the judge believed: over-optimization, agreement, and calibration.

A proxy is a reward that policies were chosen or trained by, in the judge's place. *Over-
optimization* is by how much its gain over the reference exceeds the judge's, prompt by prompt: it
compares two rewards, so both have to be in one unit, nats of Bradley-Terry. *Agreement* is how
often the two rank two answers to a prompt alike, a tie of either one half, whatever their units.
*Calibration* is the expected calibration error (:func:`core.measure.calibration`) of the proxy's
preferences :math:`\sigma(\Delta)` against the judge's, over all pairs of a policy's answers to a
prompt. On the policy's own answers both worsen where it exploits the proxy.

Axes: ``B`` prompts, ``K`` answers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_klrlhf.core import measure
from jax_klrlhf.results import Metric, mean

RESAMPLES = 400
Rewards = Mapping[str, Float[np.ndarray, "B K"]]
"""Of the ``policy``'s and the ``reference``'s answers."""


def by_proxy(judge: Rewards, proxy: Rewards) -> dict[str, Metric]:
    """Metrics ``policy/proxy...``, ``reference/proxy...`` and ``difference/...``.

    Standard errors are over prompts; the calibration's is the bootstrap's over prompts. Without two
    answers to a prompt there is neither agreement nor calibration.
    """
    judge, proxy = ({k: np.asarray(v, np.float64) for k, v in x.items()} for x in (judge, proxy))
    metrics: dict[str, Metric] = {}
    gains = [x["policy"].mean(1) - x["reference"].mean(1) for x in (proxy, judge)]
    metrics["difference/proxy"] = mean(gains[0])
    metrics["difference/over_optimization"] = mean(gains[0] - gains[1])
    for role in ("policy", "reference"):
        metrics[f"{role}/proxy"] = mean(proxy[role].mean(1))
        first, second = np.triu_indices(proxy[role].shape[1], 1)
        if not len(first):
            continue
        believed, true = (x[role][:, first] - x[role][:, second] for x in (proxy, judge))
        alike = 0.5 + 0.5 * np.sign(believed) * np.sign(true)
        metrics[f"{role}/proxy_agreement"] = mean(alike.mean(1))
        metrics[f"{role}/proxy_calibration"] = _calibration(believed, true)
    return metrics


def _calibration(believed: Float[np.ndarray, "B P"], true: Float[np.ndarray, "B P"]) -> Metric:
    count, pairs = believed.shape
    margin = jnp.asarray(believed.ravel(), jnp.float32)
    label = jax.nn.sigmoid(jnp.asarray(true.ravel(), jnp.float32))

    def error(weight: Array) -> Array:
        return measure.calibration(margin, label, weight=jnp.repeat(weight, pairs))

    rng = np.random.default_rng(0)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    weights = jnp.asarray(np.concatenate([np.ones((1, count)), drawn]), jnp.float32)
    value, *resampled = np.asarray(jax.jit(jax.vmap(error))(weights), np.float64)
    return Metric(float(value), float(np.std(resampled, ddof=1)) if count > 1 else None, count)
