r"""Preference bandits with finitely many contexts and actions, where every expectation is exact.

A :class:`Problem` is what nature knows: the :class:`Setting` that a learner may also see
(features, reference policy, context distribution, kl_coef) and the true reward.

.. math::
    J(\pi) = E_{x \sim d_0}\Big[ E_{a \sim \pi} r^*(x, a)
             - \eta\, \mathrm{KL}(\pi(\cdot|x) \| \pi_0(\cdot|x)) \Big], \qquad
    P(a^1 \succ a^2 | x) = \sigma\big(r^*(x, a^1) - r^*(x, a^2)\big)

Linear case: :math:`r^*(x, a) = \langle\theta^*, \phi(x, a)\rangle`, ``||phi|| <= 1``,
``||theta*|| <= bound`` (arXiv 2312.11456, Assumption 1). What else learners may take rewards to be
is :mod:`core.reward_class`.

Every number of a problem is traced: map over rewards, kl_coef, coverage or label noise by
``jax.vmap``. Shapes are static. :mod:`~jax_klrlhf.bandit.worlds` makes problems.

Axes: ``contexts``, ``actions``, ``dim``, ``batch`` (comparisons).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry
from jax_klrlhf.core.reward_class import RewardClass, linear


class Setting(NamedTuple):
    """What a learner may see of a problem."""

    features: Float[Array, "contexts actions dim"]
    ref_log_prob: Float[Array, "contexts actions"]
    context_prob: Float[Array, " contexts"]
    where: Bool[Array, "contexts actions"]  # True: the action exists in this context
    kl_coef: Float[Array, ""]
    preference: PreferenceModel = bradley_terry  # what a label is taken to mean
    reward_class: RewardClass = linear  # what rewards are taken to be

    def reward(self, theta: Float[Array, " parameters"]) -> Float[Array, "contexts actions"]:
        """Of the class: ``<theta, phi(x, a)>`` of the linear one."""
        return self.reward_class.reward(theta, self.features)

    def local(self, theta: Float[Array, " parameters"]) -> "Setting":
        """The setting near theta, where the class is linear in its gradient: that for features."""
        if self.reward_class.is_linear:
            return self
        slope = self.reward_class.gradient(theta, self.features)
        slope = jnp.where(self.where[..., None], slope, 0)
        return self._replace(features=slope, reward_class=linear)

    def mean_features(
        self, log_prob: Float[Array, "contexts actions"]
    ) -> Float[Array, "contexts dim"]:
        """``E_{a ~ pi} phi(x, a)`` in each context."""
        prob = jnp.exp(jnp.where(self.where, log_prob, -jnp.inf))
        return jnp.einsum("xa,xad->xd", prob, self.features)


class Problem(NamedTuple):
    """A preference bandit: its public setting, and what only nature knows."""

    setting: Setting
    reward: Float[Array, "contexts actions"]
    theta: Float[Array, " parameters"]  # the class's; NaN of another class than `linear` if unknown
    label_noise: Float[Array, ""]  # probability that a label is flipped
    preference: PreferenceModel = bradley_terry  # what a label means; a learner sees the setting's


class Duels(NamedTuple):
    """Labelled comparisons, one per entry of ``batch``."""

    context: Int[Array, " batch"]
    first: Int[Array, " batch"]
    second: Int[Array, " batch"]
    label: Float[Array, " batch"]  # P(first preferred): 1 or 0 when drawn, 1/2 for a tie
    weight: Float[Array, " batch"]  # 0: an empty row, which counts for nothing


def label(
    key: Key[Array, ""],
    problem: Problem,
    context: Int[Array, " batch"],
    first: Int[Array, " batch"],
    second: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    """Draw labels of the problem's preference model, 1 where the first is preferred.

    They are swapped at the rate ``label_noise``.
    """
    model = problem.preference
    margin = model.margin(model.parameters, problem.reward, context, first, second)
    return model.sample(key, margin, flip_rate=problem.label_noise)


def draw_contexts(key: Key[Array, ""], setting: Setting, *, batch: int) -> Int[Array, " batch"]:
    """Contexts ``x ~ d0``, independently."""
    uniform = jax.random.uniform(key, (batch,), setting.context_prob.dtype)
    cumulative = jnp.cumsum(setting.context_prob)
    return _invert(uniform, jnp.broadcast_to(cumulative[None], (batch, *cumulative.shape)))


def draw_actions(
    key: Key[Array, ""],
    first_log_prob: Float[Array, "contexts actions"],
    second_log_prob: Float[Array, "contexts actions"],
    context: Int[Array, " batch"],
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """``a1 ~ first(.|x)`` and ``a2 ~ second(.|x)``, independently; one uniform number for each."""
    uniform = jax.random.uniform(key, (2, *context.shape), first_log_prob.dtype)
    # Summed once for each context, then looked up.
    first, second = (jnp.cumsum(jnp.exp(p), -1) for p in (first_log_prob, second_log_prob))
    return _invert(uniform[0], first[context]), _invert(uniform[1], second[context])


def _invert(
    uniform: Float[Array, " batch"], cumulative: Float[Array, "batch outcomes"]
) -> Int[Array, " batch"]:
    """Inverse of the distribution function: the first outcome whose cumulative sum exceeds u.

    u is scaled to stay strictly below the total, so rounding never selects a zero probability.
    """
    total = cumulative[:, -1:]
    below = uniform[:, None] * (1 - jnp.finfo(cumulative.dtype).eps) * total
    return jnp.sum(cumulative <= below, -1, dtype=jnp.int32)


def compare(
    key: Key[Array, ""],
    problem: Problem,
    first_log_prob: Float[Array, "contexts actions"],
    second_log_prob: Float[Array, "contexts actions"],
    *,
    batch: int,
) -> Duels:
    """Offline data: ``x ~ d0``, ``a1 ~ first``, ``a2 ~ second``, and the problem's labels.

    With both policies the same it is the usual offline data set of a behaviour policy.
    """
    key_context, key_actions, key_label = jax.random.split(key, 3)
    context = draw_contexts(key_context, problem.setting, batch=batch)
    first, second = draw_actions(key_actions, first_log_prob, second_log_prob, context)
    labels = label(key_label, problem, context, first, second)
    return Duels(context, first, second, labels, jnp.ones_like(labels))


def check(problem: Problem) -> None:
    """Raise ValueError for values that break the assumptions; does nothing under a transformation.

    Feature norms above 1, probabilities that don't sum to 1, reference probability 0 on an action
    in play, kl_coef <= 0, label_noise outside [0, 1/2), anything not finite.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(problem)):
        return
    features, ref, prob, where, kl_coef = (np.asarray(leaf) for leaf in problem.setting[:5])
    if not where.any(-1).all():
        row = int(np.flatnonzero(~where.any(-1))[0])
        raise ValueError(f"context {row} has no action in play; drop it or correct `where`")
    norms = np.where(where, np.linalg.norm(features, axis=-1), 0)
    if not norms.max() <= 1 + 1e-4:
        raise ValueError(
            f"the largest feature norm is {norms.max():.4g}, the bounds assume at most 1; divide "
            "the features by it and multiply theta by it"
        )
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be positive, got {kl_coef}")
    if not 0 <= float(problem.label_noise) < 0.5:
        raise ValueError(f"label_noise must lie in [0, 0.5), got {float(problem.label_noise)}")
    if (prob < 0).any() or not abs(prob.sum() - 1) < 1e-4:
        raise ValueError(f"context_prob must be >= 0 and sum to 1, its sum is {prob.sum():.6g}")
    if not np.isfinite(ref[where]).all():
        x, a = np.argwhere(where & ~np.isfinite(ref))[0]
        raise ValueError(
            f"ref_log_prob[{x}, {a}] is {ref[x, a]}: pi0 must be positive on every action in "
            "play; mask the action with `where` instead"
        )
    total = np.where(where, np.exp(ref), 0).sum(-1)
    if not (abs(total - 1) < 1e-4).all():
        row = int(np.argmax(abs(total - 1)))
        raise ValueError(
            f"exp(ref_log_prob) must sum to 1 over the actions in play; row {row} sums to "
            f"{total[row]:.6g} (subtract its logsumexp)"
        )
    if not np.isfinite(np.asarray(problem.reward)[where]).all():
        raise ValueError("reward must be finite on every action in play")
