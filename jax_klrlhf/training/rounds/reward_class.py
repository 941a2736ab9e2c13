r"""A belief in any class of rewards on features of responses: the bandit's own class, at scale.

.. math:: r(x, y) = r_{\hat\theta}(\phi(x, y)), \qquad
          \Gamma(x, y) = \beta \|g_{\hat\theta}(x, y) - \nu\|_{\Sigma^{-1}}

with a :class:`core.reward_class.RewardClass`, its maximum-likelihood fit on all comparisons, and
Sigma that of its gradients g at the fit, both the core's. The linear class has a belief of its own,
:func:`.features.linear`, which keeps differences alone, bounds theta and spreads over a mesh.

Axes: ``B`` prompts, ``K`` responses, ``N`` comparisons, ``D`` features, ``P`` parameters.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_klrlhf.core import ellipsoid, preferences, reward_class
from jax_klrlhf.core.preferences import PreferenceModel
from jax_klrlhf.core.reward_class import RewardClass
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import sampling
from jax_klrlhf.training.rounds.compute import fill
from jax_klrlhf.training.rounds.features import (
    Features,
    Last,
    Linear,
    as_scored,
    factor,
    pieces,
    whitened,
)
from jax_klrlhf.training.rounds.parts import Comparisons, Policies, Reward, Scored, join


def parametric(
    features: Features,
    rewards: RewardClass,
    *,
    dim: int,
    ridge: float,
    radius: float,
    nu: Float[np.ndarray, " P"] | None = None,
    preference: PreferenceModel = preferences.bradley_terry,
    iterations: int = 100,
    rows: int = 4096,
) -> Reward:
    """A class of rewards with the confidence ellipsoid of its gradients.

    The fit begins from the last one, on all comparisons so far, on one device.

    Args:
        features: of responses; frozen, so that all rounds share them.
        rewards: the class, the very object that ``bandit.from_arrays(reward_class=)`` takes.
        dim: D.
        ridge: lambda, of the fit and of Sigma.
        radius: beta, the scale of the uncertainty in units of reward.
        nu: what uncertainty is measured from, ``[parameters]``. None: the mean gradient of the
            responses that were compared.
        preference: what labels mean.
        iterations: the most steps of a fit.
        rows: comparisons whose features are computed at one time.

    Raises:
        ValueError: where nu is of another length than theta.
    """
    theta = rewards.start(dim)
    zero = jnp.zeros_like(theta)
    if nu is not None and nu.shape != theta.shape:
        raise ValueError(f"nu has shape {nu.shape}, and the class has {theta.size} parameters")
    empty = Linear(
        theta,
        ellipsoid.init(theta.size, ridge=ridge, dtype=theta.dtype),
        zero if nu is None else jnp.asarray(nu, theta.dtype),
        jnp.array(True),
    )

    @jax.jit
    def program(start: Array, both: Array, label: Array, weight: Array) -> Linear:
        given = {"ridge": ridge, "weights": weight}
        found = reward_class.fit(
            rewards, both, label, init=start, link=preference, iterations=iterations, **given
        )
        sigma = reward_class.confidence(rewards, found.theta, both, **given)
        centre = empty.nu
        if nu is None:
            slope = rewards.gradient(found.theta, jnp.where(weight[:, None, None] > 0, both, 0))
            total = 2 * jnp.maximum(jnp.sum(weight), jnp.finfo(weight.dtype).tiny)
            centre = jnp.einsum("nkp,n->p", slope, weight) / total
        return Linear(found.theta, sigma, centre, found.converged)

    def fit(
        key: Any, belief: Any, comparisons: Sequence[Comparisons], policies: Policies
    ) -> Linear:
        del key, policies
        if not comparisons:
            return empty
        data = join(comparisons)
        both = [x for x, _ in pieces(features, data, rows=rows, dtype=theta.dtype)]
        # Filled up to one of a few sizes, so that growing data do not compile anew each round.
        size = sampling.bucket(len(data.weight))
        both, label = (fill(x, size) for x in (np.concatenate(both), data.label))
        weight = np.where(np.arange(size) < len(data.weight), fill(data.weight, size), 0)
        arrays = (jnp.asarray(x, theta.dtype) for x in (both, label, weight))
        return program(belief.theta, *arrays)

    lower = Last(factor)

    @jax.jit
    def scored(belief: Linear, lower: Array, found: Array) -> tuple[Array, Array]:
        reward = rewards.reward(belief.theta, found)
        shift = rewards.gradient(belief.theta, found) - belief.nu[None, None, :]
        return reward, whitened(lower, shift, radius)

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        del policies
        found = jnp.asarray(features(prompts, responses), theta.dtype)
        return as_scored(*scored(belief, lower(belief.ellipsoid), found))

    return Reward(init=empty, fit=fit, score=score)
