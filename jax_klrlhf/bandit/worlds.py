"""Problems to study: from the user's own arrays, and two families of the theory.

Shapes are static, and wrong ones raise at trace time. Facts about values (norms, probabilities)
are checked where the arrays are concrete, that is, when a constructor is called outside of a
transformation; inside one they can't be.

Axes: ``contexts``, ``actions``, ``dim``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jax_klrlhf.bandit.problem import Duels, Problem, Setting, check, label
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry
from jax_klrlhf.core.reward_class import RewardClass, linear


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
    reward_class: RewardClass = linear,
) -> Problem:
    """A problem from the user's own arrays.

    ``features`` are ``[contexts, actions, dim]``, ``reward_or_theta`` is the true reward
    ``[contexts, actions]`` or the true parameter (``[dim]``, or as the class has), ``ref_log_prob``
    and ``where`` are ``[contexts, actions]``, ``context_prob`` is ``[contexts]``.
    A reward that isn't linear in the features makes a misspecified problem, whose ``theta`` is
    the least-squares fit of feature differences within contexts. The reference policy and the
    context distribution are uniform by default; ``where`` (True keeps) masks actions.
    ``preference`` is both what labels mean and what learners take them to mean; for learners that
    are wrong about it replace the one of the problem or of its setting. ``reward_class`` is what
    learners take rewards to be; of another class than the linear one and a true reward that is
    handed in, ``theta`` of the problem is NaN: it is not known which parameter, if any, makes it.

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
        start = reward_class.start(dim)
        _shape("theta", reward_or_theta, start.shape, "one entry per feature, or of the class")
        theta = reward_or_theta
        reward = reward_class.reward(theta, features)
    else:
        _shape("reward", reward_or_theta, (contexts, actions), "the true reward of each action")
        reward = reward_or_theta
        theta = jnp.full(reward_class.start(dim).shape, jnp.nan, features.dtype)
        if reward_class.is_linear:
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
    given = (features, ref_log_prob, context_prob, where, kl_coef)
    setting = Setting(*given, preference=preference, reward_class=reward_class)
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


def four_arms_data(key: Key[Array, ""], problem: Problem, *, count: int) -> Duels:
    """``count - 1`` comparisons of arms 0 and 1 and one of arms 1 and 2 (arXiv 2301.11270)."""
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    last = jnp.arange(count) == count - 1
    context = jnp.zeros(count, jnp.int32)
    first, second = jnp.where(last, 1, 0), jnp.where(last, 2, 1)
    labels = label(key, problem, context, first, second)
    return Duels(context, first, second, labels, jnp.ones_like(labels))


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
