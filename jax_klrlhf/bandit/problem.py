r"""Preference bandits with finitely many contexts and actions, where every expectation is exact.

A :class:`Problem` is what nature knows: the :class:`Setting` that a learner may also see
(features, reference policy, context distribution, kl_coef) and the true reward.

.. math::
    J(\pi) = E_{x \sim d_0}\Big[ E_{a \sim \pi} r^*(x, a)
             - \eta\, \mathrm{KL}(\pi(\cdot|x) \| \pi_0(\cdot|x)) \Big], \qquad
    P(a^1 \succ a^2 | x) = \sigma\big(r^*(x, a^1) - r^*(x, a^2)\big)

Linear case: :math:`r^*(x, a) = \langle\theta^*, \phi(x, a)\rangle`, ``||phi|| <= 1``,
``||theta*|| <= bound`` (arXiv 2312.11456, Assumption 1).

Every number of a problem is traced: map over rewards, kl_coef, coverage or label noise by
``jax.vmap``. Shapes are static, and wrong ones raise at trace time. Facts about values (norms,
probabilities) are checked where the arrays are concrete, that is, when a constructor is called
outside of a transformation; inside one they can't be.

Axes: ``contexts``, ``actions``, ``dim``, ``batch`` (comparisons).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry


class Setting(NamedTuple):
    """What a learner may see of a problem."""

    features: Float[Array, "contexts actions dim"]
    ref_log_prob: Float[Array, "contexts actions"]
    context_prob: Float[Array, " contexts"]
    where: Bool[Array, "contexts actions"]  # True: the action exists in this context
    kl_coef: Float[Array, ""]
    preference: PreferenceModel = bradley_terry  # what a label is taken to mean

    def reward(self, theta: Float[Array, " dim"]) -> Float[Array, "contexts actions"]:
        """Linear reward ``<theta, phi(x, a)>``."""
        return self.features @ theta

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
    theta: Float[Array, " dim"]  # of the linear part; the rest of `reward` is misspecification
    label_noise: Float[Array, ""]  # probability that a label is flipped
    preference: PreferenceModel = bradley_terry  # what a label means; a learner sees the setting's


class Comparisons(NamedTuple):
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
) -> Comparisons:
    """Offline data: ``x ~ d0``, ``a1 ~ first``, ``a2 ~ second``, and the problem's labels.

    With both policies the same it is the usual offline data set of a behaviour policy.
    """
    key_context, key_actions, key_label = jax.random.split(key, 3)
    context = draw_contexts(key_context, problem.setting, batch=batch)
    first, second = draw_actions(key_actions, first_log_prob, second_log_prob, context)
    labels = label(key_label, problem, context, first, second)
    return Comparisons(context, first, second, labels, jnp.ones_like(labels))


def from_arrays(
    features: Float[Array, "..."],
    reward_or_theta: Float[Array, "..."],
    *,
    kl_coef: Scalar,
    ref_log_prob: Float[Array, "..."] | None = None,
    context_prob: Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    label_noise: Scalar = 0.0,
    preference: PreferenceModel = bradley_terry,
) -> Problem:
    """A problem from the user's own arrays.

    ``features`` are ``[contexts, actions, dim]``, ``reward_or_theta`` is the true reward
    ``[contexts, actions]`` or the true parameter ``[dim]``, ``ref_log_prob`` and ``where`` are
    ``[contexts, actions]``, ``context_prob`` is ``[contexts]``.
    A reward that isn't linear in the features makes a misspecified problem, whose ``theta`` is
    the least-squares fit of feature differences within contexts. The reference policy and the
    context distribution are uniform by default; ``where`` (True keeps) masks actions.
    ``preference`` is both what labels mean and what learners take them to mean; for learners that
    are wrong about it replace the one of the problem or of its setting.

    ValueError on shapes that don't fit and, where the arrays are concrete, on feature norms above
    1, on probabilities that are negative or don't sum to 1, on reference probability 0 at an
    action in play, on non-finite rewards, and on kl_coef <= 0.
    """
    if features.ndim != 3:
        raise ValueError(
            f"features must be [contexts, actions, dim], got shape {features.shape}; for one "
            "context add a leading axis"
        )
    contexts, actions, dim = features.shape
    if where is None:
        where = jnp.ones((contexts, actions), bool)
    _shape("where", where, (contexts, actions), "True where the action exists")
    if ref_log_prob is None:
        ref_log_prob = -jnp.log(jnp.sum(where, -1, keepdims=True).astype(features.dtype))
        ref_log_prob = jnp.broadcast_to(ref_log_prob, where.shape)
    _shape("ref_log_prob", ref_log_prob, (contexts, actions), "log pi0, one row per context")
    if context_prob is None:
        context_prob = jnp.full((contexts,), 1 / contexts, features.dtype)
    _shape("context_prob", context_prob, (contexts,), "the probability of each context")
    if reward_or_theta.ndim == 1:
        _shape("theta", reward_or_theta, (dim,), "one entry per feature")
        theta = reward_or_theta
        reward = features @ theta
    else:
        _shape("reward", reward_or_theta, (contexts, actions), "the true reward of each action")
        reward = reward_or_theta
        theta = _linear_part(features, reward, where)
    kl_coef = jnp.asarray(kl_coef, features.dtype)
    label_noise = jnp.asarray(label_noise, features.dtype)
    for name, value in (("kl_coef", kl_coef), ("label_noise", label_noise)):
        if value.shape != ():
            raise ValueError(
                f"{name} must be a scalar, got shape {value.shape}; map over it with jax.vmap"
            )
    # What stands at a masked action is never read, so that no sum meets an infinity there.
    features = jnp.where(where[..., None], features, 0)
    reward = jnp.where(where, reward, 0)
    ref_log_prob = jnp.where(where, ref_log_prob, -jnp.inf)
    setting = Setting(features, ref_log_prob, context_prob, where, kl_coef, preference)
    problem = Problem(setting, reward, theta, label_noise, preference)
    check(problem)
    return problem


def sphere(
    key: Key[Array, ""],
    *,
    contexts: int,
    actions: int,
    dim: int,
    kl_coef: Scalar,
    bound: Scalar = 1.0,
    coverage: Scalar = 1.0,
    hidden: int = 0,
    misspecification: Scalar = 0.0,
    label_noise: Scalar = 0.0,
) -> Problem:
    r"""Random features and parameter on the sphere, with a knob for how well pi0 covers.

    Unit features, uniform on the sphere, and ``||theta*|| = bound``. The second half of the
    actions of every context is rare: pi0 gives them ``coverage / actions`` each, and shares the
    rest among the others. ``coverage = 1`` is a uniform pi0. The first half of the actions never
    uses the last ``hidden`` of the ``dim`` coordinates, so what is hidden is learned from rare
    actions only: comparisons of two draws from pi0 inform about it in proportion to ``coverage``,
    while the optimum plays rare actions wherever they are good. ``hidden = 0`` is isotropic:
    there offline and online learning hardly differ, whatever pi0 (theory, warning 1).
    The coefficient itself is :func:`jax_klrlhf.bandit.evaluate.coverage`; that of pi* also depends
    on kl_coef, as pi* follows pi0 where kl_coef is large.

    ``misspecification`` adds a non-linear part of that size to the reward (independent
    Rademacher signs). ``label_noise`` flips labels. Numbers may be traced, sizes are static.
    """
    if not 0 <= hidden < dim:
        raise ValueError(f"hidden must be in 0..dim-1, got hidden={hidden} with dim={dim}")
    if actions < 2 or contexts < 1:
        raise ValueError(f"need actions >= 2 and contexts >= 1, got {actions} and {contexts}")
    key_features, key_theta, key_signs = jax.random.split(key, 3)
    rare = jnp.arange(actions) >= (actions + 1) // 2
    shown = rare[:, None] | (jnp.arange(dim) < dim - hidden)[None, :]
    features = jax.random.normal(key_features, (contexts, actions, dim))
    features = _unit(jnp.where(shown[None], features, 0))
    theta = jnp.asarray(bound, features.dtype) * _unit(jax.random.normal(key_theta, (dim,)))
    coverage = jnp.asarray(coverage, features.dtype)
    n_rare = actions // 2
    common_prob = (1 - coverage * (n_rare / actions)) / (actions - n_rare)
    ref_prob = jnp.where(rare, coverage / actions, common_prob)
    signs = jax.random.rademacher(key_signs, (contexts, actions), features.dtype)
    reward = features @ theta + jnp.asarray(misspecification, features.dtype) * signs
    problem = from_arrays(
        features,
        reward,
        kl_coef=kl_coef,
        ref_log_prob=jnp.broadcast_to(jnp.log(ref_prob)[None], (contexts, actions)),
        label_noise=label_noise,
    )
    return problem._replace(theta=theta)


def four_arms(*, kl_coef: Scalar, ref_log_prob: Float[Array, "1 4"] | None = None) -> Problem:
    """The instance of arXiv 2301.11270 on which greedy maximum likelihood fails.

    One context, four arms with features (1,1,0), (1,0,0), (0,0,0), (0,1,0), and theta* =
    (-1, 0.1, 0.9); both halved in the features and doubled in theta*, so that ``||phi|| <= 1``
    as everywhere here; rewards are the paper's. Its data, :func:`four_arms_data`, compares arms
    0 and 1 many times and arms 1 and 2 once: the greedy choice then falls on an arm whose
    estimate rests on one comparison.
    """
    features = jnp.array([[1.0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]])[None] / 2
    theta = 2 * jnp.array([-1.0, 0.1, 0.9])
    return from_arrays(features, theta, kl_coef=kl_coef, ref_log_prob=ref_log_prob)


def four_arms_data(key: Key[Array, ""], problem: Problem, *, count: int) -> Comparisons:
    """``count - 1`` comparisons of arms 0 and 1 and one of arms 1 and 2 (arXiv 2301.11270)."""
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    last = jnp.arange(count) == count - 1
    context = jnp.zeros(count, jnp.int32)
    first, second = jnp.where(last, 1, 0), jnp.where(last, 2, 1)
    labels = label(key, problem, context, first, second)
    return Comparisons(context, first, second, labels, jnp.ones_like(labels))


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


def _shape(name: str, value: Array, expected: tuple[int, ...], meaning: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{name} has shape {value.shape}, expected {expected}: {meaning}")


def _unit(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    return x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True))


def _linear_part(
    features: Float[Array, "contexts actions dim"],
    reward: Float[Array, "contexts actions"],
    where: Bool[Array, "contexts actions"],
) -> Float[Array, " dim"]:
    """Least squares of the reward on the features, each centred within its context."""
    keep = where[..., None].astype(features.dtype)
    count = jnp.sum(keep, 1, keepdims=True)
    both = jnp.concatenate([features, reward[..., None]], -1) * keep
    centred = (both - jnp.sum(both, 1, keepdims=True) / count) * keep
    rows = centred.reshape(-1, both.shape[-1])
    return jnp.linalg.lstsq(rows[:, :-1], rows[:, -1])[0]
