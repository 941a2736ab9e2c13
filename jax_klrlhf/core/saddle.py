r"""Members against the policy, outside the expectation: saddle points with a certificate.

For a convex set W of weights [derived, by minimax]

.. math::
    \max_\pi \min_{w \in W} E_\pi[r_0 + \langle w, r\rangle] - \eta\,\mathrm{KL}(\pi\|\pi_0)
        - \langle w, \theta\rangle
    = \min_{w \in W} E_x\, \eta \log Z(r_0 + \langle w, r\rangle) - \langle w, \theta\rangle

and the policy is the Gibbs policy of the worst mixture ``r_0 + <w, r>``. Five systems are this
line:

===================== =============================================================================
:func:`simplex`       MaxMin-RLHF (arXiv 2402.08925): the worst-off group's E r; reward-robust RLHF
                      (arXiv 2409.15360, eq. 7): rewards ``(1 - a) r``, nominal ``a r_nom``
:func:`cone`          constrained RLHF: most E r_0 with E r_i >= theta_i (w the multipliers); Safe
                      RLHF: nominal r, rewards -c, threshold 0
:func:`free`          constraints with equality, E r_i = theta_i (arXiv 2310.04373)
:func:`ball`          GSHF's Option I (arXiv 2312.11456): rewards -beta Sigma^{-1/2}(phi - nu)
===================== =============================================================================

A minimum over groups *inside* the expectation (:func:`core.aggregate.minimum`) is another, worse
policy. The answer moves with each member's unidentified offset: centre members at pi0 first
(:func:`core.aggregate.centre`), or use win rates, which share a unit. Constraints on means don't
stop hacking: the policy is a linear weighting of the rewards, whatever the thresholds.

**Digits.** At a small kl_coef the last bit of a float32 weight moves the policy by more than the
gap that is asked for (eps range^2 / kl_coef is 1e-4 at 0.02). So the end is sought in the policy:
what a Newton step adds to its log-probabilities is small and keeps its digits, whatever the
weights' are. :class:`Saddle` holds that policy; its weights are rounded.

Axes: ``members``, ``contexts``, ``actions``.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core import gibbs, linalg, numerics
from jax_klrlhf.core import simplex as simplices
from jax_klrlhf.core.numerics import Scalar


class Saddle(NamedTuple):
    """A solution with its certificates: the policy's objective is within both of the optimum's."""

    log_prob: Float[Array, "contexts actions"]
    weight: Float[Array, " members"]
    value: Float[Array, " members"]  # E r_i of the policy
    duality_gap: Float[Array, ""]  # how far the policy's objective is below the optimum, at most
    violation: Float[Array, ""]  # the largest missed threshold; 0 where there are none
    iterations: Int[Array, ""]


class _World(NamedTuple):
    rewards: Array
    ref_log_prob: Array
    context_prob: Array
    nominal: Array
    threshold: Array
    kl_coef: Array
    where: Array

    def policy(self, weight: Array) -> Array:
        return gibbs.log_prob(
            self.mixed(weight), self.ref_log_prob, kl_coef=self.kl_coef, where=self.where
        )

    def mixed(self, weight: Array) -> Array:
        return self.nominal + jnp.einsum("m,mxa->xa", weight, self.rewards)

    def dual(self, weight: Array) -> Array:
        energy = gibbs.free_energy(
            self.mixed(weight), self.ref_log_prob, kl_coef=self.kl_coef, where=self.where
        )
        return self.context_prob @ energy - weight @ self.threshold

    def moments(self, log_prob: Array) -> tuple[Array, Array, Array]:
        """E r_i, their covariance within contexts, and the rewards centred at the policy's mean."""
        conditional = jnp.where(self.where, jnp.exp(log_prob), 0)
        mean = jnp.einsum("xa,mxa->mx", conditional, self.rewards)
        centred = jnp.where(self.where[None], self.rewards - mean[..., None], 0)
        joint = self.context_prob[:, None] * conditional
        covariance = jnp.einsum("xa,mxa,kxa->mk", joint, centred, centred)
        return mean @ self.context_prob, covariance, centred


def _world(rewards, ref_log_prob, kl_coef, context_prob, nominal, threshold, where) -> _World:
    members, contexts, _ = rewards.shape
    dtype = rewards.dtype
    keep = numerics.support(ref_log_prob, where)
    if context_prob is None:
        context_prob = jnp.full(contexts, 1 / contexts, dtype)
    if threshold is None:
        threshold = jnp.zeros(members, dtype)
    if threshold.shape != (members,):
        raise ValueError(
            f"threshold has shape {threshold.shape}, expected one for each of {members}"
        )
    nominal = jnp.zeros(ref_log_prob.shape, dtype) if nominal is None else nominal
    return _World(
        jnp.where(keep[None], rewards, 0),
        ref_log_prob,
        context_prob,
        jnp.where(keep, nominal, 0),
        threshold,
        jnp.asarray(kl_coef, dtype),
        keep,
    )


def _scale(world: _World) -> Array:
    """The largest range of a member in a context: the unit of values and of the duality gap."""
    top = jax.vmap(lambda r: numerics.masked_max(r, world.where))
    width = jnp.max(top(world.rewards) + top(-world.rewards))
    return jnp.where(width > 0, width, 1)


def _model(world: _World, *, smooth: bool = False) -> Callable[[Array, Array], simplices.Model]:
    """The dual to second order. ``smooth``: kl_coef no smaller than the barrier.

    At a small kl_coef the dual has kinks; from afar it is followed at a larger one.
    """
    exact = world

    def model(weight: Array, mu: Array) -> simplices.Model:
        world = exact
        if smooth:
            world = exact._replace(kl_coef=jnp.maximum(exact.kl_coef, mu))
        value, covariance, centred = world.moments(world.policy(weight))

        def change(step: Array) -> Array:
            return jnp.max(jnp.abs(jnp.einsum("m,mxa->xa", step, centred))) * 2 / world.kl_coef

        return simplices.Model(
            world.dual(weight), value - world.threshold, covariance / world.kl_coef, change
        )

    return model


Newton = Callable[[Array, Array, Array], Array]
"""``(weight, slack, hessian) -> step`` of the weights."""


def _refined(
    world: _World, weight: Array, newton: Newton, certificate: Callable[[Array, Array], Array]
) -> tuple[Array, Array, Array, Array]:
    """Newton steps on the policy itself: (log_prob, weight, value, certificate) of the best.

    The policy stays within rounding of the optimum for its exact weights, and its objective within
    the square of that: ``certificate(weight, E r - threshold)`` is exact to rounding.
    """
    dtype, eps = weight.dtype, jnp.finfo(weight.dtype).eps

    def step(_: int | Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        log_prob, weight, *best = state
        value, covariance, centred = world.moments(log_prob)
        slack = value - world.threshold
        gap = certificate(weight, slack)
        better = gap < best[-1]
        here = (log_prob, weight, value, gap)
        best = [jnp.where(better, new, old) for new, old in zip(here, best, strict=True)]
        move = newton(weight, slack, covariance / world.kl_coef)
        shift = jnp.einsum("m,mxa->xa", move, centred) / world.kl_coef
        size = 2 * jnp.max(jnp.abs(shift))
        length = jnp.where(size > eps, jnp.log1p(size) / jnp.where(size > eps, size, 1), 1)
        moved = jnp.where(world.where, log_prob + length * shift, -jnp.inf)
        return jax.nn.log_softmax(moved), weight + length * move, *best

    log_prob = world.policy(weight)
    first = (log_prob, weight, jnp.zeros_like(weight), jnp.asarray(jnp.inf, dtype))
    _, _, *best = jax.lax.fori_loop(0, 12, step, (log_prob, weight, *first))
    return best[0], best[1], best[2], best[3]


def _scaled_newton(weight: Array, slack: Array, hessian: Array, *, normalized: bool) -> Array:
    """A step in u = dw / w, complementarity being its curvature: weights of no use shrink to 0."""
    if normalized:
        slack = slack - jnp.min(slack)
    gradient = weight * slack
    curvature = weight[:, None] * hessian * weight[None, :]
    curvature = curvature + jnp.diag(jnp.maximum(gradient, 0))
    move = simplices.newton_move(weight, gradient, curvature, normalized=normalized)
    return weight * move * (0.9 / jnp.maximum(jnp.max(-move), 0.9))


def simplex(
    rewards: Float[Array, "members contexts actions"],
    ref_log_prob: Float[Array, "contexts actions"],
    *,
    kl_coef: Scalar,
    context_prob: Float[Array, " contexts"] | None = None,
    nominal: Float[Array, "contexts actions"] | None = None,
    threshold: Float[Array, " members"] | None = None,
    where: Bool[Array, "contexts actions"] | None = None,
    max_iterations: int = 60,
) -> Saddle:
    r"""The policy whose worst member is best: :math:`\max_\pi \min_i E_\pi r_i - \theta_i`.

    Works under jit and vmap. The duality gap is a few eps of the largest range of a member in a
    context, at small kl_coef too. ``threshold`` measures each member from a point of its own,
    ``nominal`` is a reward that all share.
    """
    world = _world(rewards, ref_log_prob, kl_coef, context_prob, nominal, threshold, where)
    members, scale = rewards.shape[0], _scale(world)
    eps = jnp.finfo(rewards.dtype).eps
    last = max(eps / 8, 1e-12) * scale
    rounding = 2 * eps * scale**2 / world.kl_coef
    start = jnp.full(members, 1 / members, rewards.dtype)
    weight, iterations = simplices.minimize(
        _model(world, smooth=True),
        start,
        barrier=scale,
        last_barrier=last,
        slack_of_gap=rounding,
        exact_below=world.kl_coef,
        max_iterations=max_iterations,
    )
    log_prob, weight, value, gap = _refined(
        world,
        weight,
        partial(_scaled_newton, normalized=True),
        lambda weight, slack: weight @ (slack - jnp.min(slack)),
    )
    return Saddle(log_prob, weight, value, gap, jnp.zeros_like(gap), iterations)


def cone(
    rewards: Float[Array, "members contexts actions"],
    ref_log_prob: Float[Array, "contexts actions"],
    *,
    kl_coef: Scalar,
    threshold: Float[Array, " members"],
    context_prob: Float[Array, " contexts"] | None = None,
    nominal: Float[Array, "contexts actions"] | None = None,
    where: Bool[Array, "contexts actions"] | None = None,
    max_iterations: int = 300,
) -> Saddle:
    r"""The best policy with :math:`E_\pi r_i \ge \theta_i` for every member: Lagrange multipliers.

    ``weight`` are the multipliers, 0 where a constraint is slack. Where no policy can meet the
    thresholds the multipliers grow without end: ``violation`` then stays positive. The most a
    single member can reach is ``E max_a r_i`` over the actions of pi0.
    """
    world = _world(rewards, ref_log_prob, kl_coef, context_prob, nominal, threshold, where)
    scale = _scale(world)
    unit = world.kl_coef / scale
    # Multipliers in units of kl_coef / range, so that the barrier is one of reward.
    rescaled = world._replace(rewards=world.rewards * unit, threshold=world.threshold * unit)
    weight, iterations = simplices.minimize(
        _model(rescaled),
        jnp.ones(rewards.shape[0], rewards.dtype),
        barrier=world.kl_coef,
        last_barrier=jnp.finfo(rewards.dtype).eps / 2 * world.kl_coef,
        normalized=False,
        max_iterations=max_iterations,
    )
    missed = lambda slack: jnp.maximum(jnp.max(-slack), 0)  # noqa: E731
    log_prob, weight, value, _ = _refined(
        world,
        weight * unit,
        partial(_scaled_newton, normalized=False),
        lambda weight, slack: weight @ jnp.abs(slack) + missed(slack),
    )
    slack = value - world.threshold
    return Saddle(log_prob, weight, value, jnp.abs(weight @ slack), missed(slack), iterations)


def free(
    rewards: Float[Array, "members contexts actions"],
    ref_log_prob: Float[Array, "contexts actions"],
    *,
    kl_coef: Scalar,
    threshold: Float[Array, " members"],
    context_prob: Float[Array, " contexts"] | None = None,
    nominal: Float[Array, "contexts actions"] | None = None,
    where: Bool[Array, "contexts actions"] | None = None,
    max_iterations: int = 100,
) -> Saddle:
    r"""The best policy with :math:`E_\pi r_i = \theta_i`: each proxy held at a point of usefulness.

    Source: arXiv 2310.04373. Multipliers of either sign; damped Newton steps. ``duality_gap`` is
    :math:`|\langle w, E r - \theta\rangle|`, ``violation`` the largest :math:`|E r_i - \theta_i|`.
    """
    world = _world(rewards, ref_log_prob, kl_coef, context_prob, nominal, threshold, where)
    dtype = rewards.dtype
    model, identity = _model(world), jnp.eye(rewards.shape[0], dtype=dtype)
    eps = jnp.finfo(dtype).eps
    scale = _scale(world)

    def newton(_: Array, slack: Array, hessian: Array) -> Array:
        jitter = eps * jnp.trace(hessian) + jnp.finfo(dtype).tiny
        return -jnp.linalg.solve(hessian + jitter * identity, slack)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, _, iterations = state
        here = model(weight, jnp.zeros((), dtype))
        move = newton(weight, here.gradient, here.hessian)
        size = here.change(move)
        length = jnp.where(size > eps, jnp.log1p(size) / jnp.where(size > eps, size, 1), 1)
        done = jnp.max(jnp.abs(here.gradient)) <= 4 * eps * scale
        return jnp.where(done, weight, weight + length * move), done, iterations + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return ~state[1] & (state[2] < max_iterations)

    start = (jnp.zeros(rewards.shape[0], dtype), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    weight, _, iterations = jax.lax.while_loop(unfinished, step, start)
    log_prob, weight, value, _ = _refined(
        world, weight, newton, lambda _, slack: jnp.max(jnp.abs(slack))
    )
    slack = value - world.threshold
    return Saddle(
        log_prob,
        weight,
        value,
        jnp.abs(weight @ slack),
        jnp.max(jnp.abs(slack)),
        iterations,
    )


def ball(
    rewards: Float[Array, "members contexts actions"],
    ref_log_prob: Float[Array, "contexts actions"],
    *,
    kl_coef: Scalar,
    context_prob: Float[Array, " contexts"] | None = None,
    nominal: Float[Array, "contexts actions"] | None = None,
    where: Bool[Array, "contexts actions"] | None = None,
    max_iterations: int = 60,
) -> Saddle:
    r"""The policy with the best :math:`E_\pi r_0 - \|E_\pi r\|_2 - \eta\,\mathrm{KL}`.

    The minimum over ``||w|| <= 1``: Newton steps on the quadratic model *inside the ball*, the
    length the best of a grid that holds the self-concordant one. The duality gap is
    :math:`\|E r\| + \langle w, E r\rangle`.
    """
    world = _world(rewards, ref_log_prob, kl_coef, context_prob, nominal, None, where)
    dtype = rewards.dtype
    eps = jnp.finfo(dtype).eps
    model, identity = _model(world), jnp.eye(rewards.shape[0], dtype=dtype)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, _, iterations = state
        here = model(weight, jnp.zeros((), dtype))
        jitter = eps * jnp.trace(here.hessian) + jnp.finfo(dtype).tiny
        hessian = here.hessian + jitter * identity
        target = hessian @ weight - here.gradient
        move = linalg.ball_minimum(hessian, target, 1.0)[0] - weight
        size = here.change(move)
        safe = jnp.where(size > 0, jnp.log1p(size) / jnp.where(size > 0, size, 1), 1)
        lengths = jnp.append(2.0 ** -jnp.arange(8, dtype=dtype), safe)
        values = jax.vmap(lambda length: world.dual(weight + length * move))(lengths)
        now = world.dual(weight)
        better = jnp.min(values) < now
        # So near the end values are rounding, and the full step is better than comparing them.
        decrease = -(here.gradient @ move + 0.5 * move @ hessian @ move)
        small = decrease <= 100 * eps * (1 + jnp.abs(now))
        length = jnp.where(small, 1, jnp.where(better, lengths[jnp.argmin(values)], 0))
        return weight + length * move, small | ~better, iterations + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, done, iterations = state
        return ~done & (iterations < max_iterations)

    start = (jnp.zeros(rewards.shape[0], dtype), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    weight, _, iterations = jax.lax.while_loop(unfinished, step, start)

    def newton(weight: Array, value: Array, hessian: Array) -> Array:
        # On the sphere the multiplier is |E r|, and a step stays in the tangent.
        norm = numerics.safe_sqrt(value @ value)
        outside = weight @ weight > 1 - 1e-3
        jitter = eps * jnp.trace(hessian) + jnp.finfo(dtype).tiny
        shift = jnp.where(outside, norm, 0) + jitter
        white = linalg.inverse_factor(hessian + shift * identity)
        solved = white.T @ (white @ jnp.stack([value, weight], -1))
        inward = weight @ solved[:, 0] / (weight @ solved[:, 1])
        return -solved[:, 0] + jnp.where(outside, inward, 0) * solved[:, 1]

    def certificate(weight: Array, value: Array) -> Array:
        norm = jnp.maximum(numerics.safe_sqrt(weight @ weight), 1)
        return numerics.safe_sqrt(value @ value) + weight @ value / norm

    log_prob, weight, value, gap = _refined(world, weight, newton, certificate)
    return Saddle(log_prob, weight, value, gap, jnp.zeros_like(gap), iterations)


def simplex_step(
    weight: Float[Array, " members"], value: Float[Array, " members"], *, rate: Scalar
) -> Float[Array, " members"]:
    r"""One exponentiated-gradient step of the weights against measured values: the sampled form.

    .. math:: w_i \leftarrow w_i e^{-\text{rate}\, v_i} / Z

    ``value`` are estimates of E r_i - theta_i under the present policy, whose reward is
    ``<w, r>``: for a language model, one step between two policy updates. The *averaged* weights
    converge, the last need not. With the groups' losses for minus the values it is a step of group
    DRO, whose loss to descend is ``weight @ loss`` (arXiv 1911.08731, algorithm 1).

    >>> simplex_step(jnp.array([0.5, 0.5]), jnp.log(jnp.array([1.0, 3.0])), rate=1.0).tolist()
    [0.75..., 0.25]
    """
    return jax.nn.softmax(jnp.log(weight) - rate * value)


def cone_step(
    weight: Float[Array, " members"], value: Float[Array, " members"], *, rate: Scalar
) -> Float[Array, " members"]:
    r"""One projected-gradient step of multipliers, :math:`w \leftarrow (w - \text{rate}\, v)_+`.

    ``value`` as in :func:`simplex_step`: a missed threshold raises its multiplier.

    >>> cone_step(jnp.array([1.0, 0.1]), jnp.array([-2.0, 1.0]), rate=0.5).tolist()
    [2.0, 0.0]
    """
    return jnp.maximum(weight - rate * value, 0)
