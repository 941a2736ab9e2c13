r"""Learners that fit a policy, not a reward: DPO, XPO and chi-PO on the optima of a reward class.

.. math:: \pi_\theta(a|x) \propto \pi_0(a|x)\, e^{r_\theta(x, a)/\eta}

The losses are those of :mod:`jax_klrlhf.core.objectives`, the very functions that train language
models, on the log-probabilities of this class (:func:`policy_learner` takes any of them), with
``ridge / 2 ||theta - theta_0||^2`` added to the sum over comparisons, theta_0 where the class
begins (0 of the linear one, whose policies are softmax-linear).

On the softmax-linear class DPO is the Bradley-Terry MLE (statement L6), and iterating it exactly is
the greedy learner; its optimum is found here through the policy all the same. XPO and chi-PO are
not convex in theta: what is found is the minimum that descent from the previous round reaches, and
``converged`` says whether it is one.

Axes: ``contexts``, ``actions``, ``dim``, ``rows`` (weighted comparisons), ``batch``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.bandit import history
from jax_klrlhf.bandit.learner import Learner, Proposal, draw
from jax_klrlhf.bandit.problem import Duels, Setting
from jax_klrlhf.core import bradley_terry, descent, gibbs, objectives
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.scores import Loss, Scores

Agents = Callable[[Setting, Array], tuple[Array, Array]]
"""``agents(setting, log_prob)``: the laws that the first and the second action are drawn from."""


Table = Float[Array, "contexts actions"] | None


class PolicyFit(NamedTuple):
    """Data, the policy's parameter, and its fit."""

    history: history.History
    theta: Float[Array, " dim"]
    converged: Bool[Array, ""]  # to a stationary point; and nothing was beyond the capacity


def on_policy(setting: Setting, log_prob: Array) -> tuple[Array, Array]:
    """Both actions from the current policy."""
    del setting
    return log_prob, log_prob


def against_reference(setting: Setting, log_prob: Array) -> tuple[Array, Array]:
    """The current policy against pi0, which explores."""
    return log_prob, setting.ref_log_prob


def from_reference(setting: Setting, log_prob: Array) -> tuple[Array, Array]:
    """Both from pi0: offline data."""
    del log_prob
    return setting.ref_log_prob, setting.ref_log_prob


def policy_learner(
    loss: Loss,
    *,
    agents: Agents = on_policy,
    explores: bool = False,
    reward: Table = None,
    bonus: Table = None,
    ridge: Scalar = 1.0,
) -> Learner:
    """A learner that fits a policy of the class by a preference loss, solved in every round.

    The very function that trains a language model (:func:`training.tasks.preference`): what it may
    look at is :class:`core.scores.Scores`, with lengths of 1. Bind its ``kl_coef`` to the
    setting's::

        policy_learner(functools.partial(objectives.ipo, kl_coef=0.1))

    Labels count as the setting's preference model says: averaged where it merges them, else the
    loss reads ``scores.label``. ``explores`` fills in ``exploration_log_prob``, that of the second
    action of each comparison as it was asked; ``reward`` and ``bonus``, tables ``[contexts,
    actions]``, the fields of those names.
    """
    beside = {"reward": reward, "bonus": bonus}
    return _learner(lambda _: loss, agents=agents, explores=explores, beside=beside, ridge=ridge)


def dpo(*, ridge: Scalar = 1.0) -> Learner:
    """Iterative DPO, solved exactly in every round, with on-policy pairs (arXiv 2305.18290)."""
    return _learner(
        lambda s: partial(objectives.sigmoid, kl_coef=s.kl_coef, preference=s.preference),
        agents=on_policy,
        ridge=ridge,
    )


def xpo(*, optimism: Scalar, ridge: Scalar = 1.0) -> Learner:
    r"""XPO (arXiv 2405.21046, Algorithm 1): DPO plus ``optimism`` times log pi of pi0's draws.

    .. math:: \min_\pi\; \alpha \sum_i \log \pi(\tilde a_i | x_i)
              - \sum_i \log\sigma\Big(\eta \log\tfrac{\pi}{\pi_0}(a^+_i)
              - \eta \log\tfrac{\pi}{\pi_0}(a^-_i)\Big)

    Pairs are ``a ~ pi_t`` against ``a~ ~ pi0``; the ridge is ours. The paper's text was not at
    hand: that the bonus is summed over the same pi0 draws as the loss is our reading of it.
    """
    return _learner(
        lambda s: partial(objectives.exploratory, kl_coef=s.kl_coef, optimism=optimism),
        agents=against_reference,
        explores=True,
        ridge=ridge,
    )


def chi_po(*, reward_bound: Scalar, ridge: Scalar = 1.0) -> Learner:
    r"""Chi-PO (arXiv 2407.13399, Algorithm 1) on offline pairs from pi0.

    The implicit reward is :math:`\eta (z + \log z)` of the ratio z = pi/pi0, margins clipped at
    ``2 reward_bound``. The paper regularizes by chi-squared plus KL and asks that the class holds
    the optimum of *that*; a softmax-linear class doesn't, which is a misspecification that the
    comparison with the others has to carry. A minimum on the edge of the clipping has
    no gradient that vanishes: ``converged`` then stays False whatever the number of steps.
    The paper's algorithm was read by its abstract and notation only: the link ``z + log z``
    multiplied by ``kl_coef`` and the clipping of the margin are our reading of it.
    """

    def at(setting: Setting) -> Loss:
        clip = 2 * jnp.asarray(reward_bound, setting.features.dtype)
        return partial(objectives.chi_po, kl_coef=setting.kl_coef, clip=clip)

    return _learner(at, agents=from_reference, ridge=ridge)


def policy_log_prob(
    setting: Setting, theta: Float[Array, " dim"]
) -> Float[Array, "contexts actions"]:
    """Log-probabilities of the class's policy with this parameter."""
    return gibbs.log_prob(
        setting.reward(theta), setting.ref_log_prob, kl_coef=setting.kl_coef, where=setting.where
    )


def total_loss(
    setting: Setting,
    theta: Float[Array, " dim"],
    rows: history.View,
    *,
    loss: Loss,
    explores: bool = False,
    beside: Mapping[str, Table] | None = None,
    ridge: Scalar,
) -> Float[Array, ""]:
    """The summed objective of the class, on counted comparisons."""
    log_prob = policy_log_prob(setting, theta)
    # Masked actions are -inf in both: a finite stand-in keeps their difference out of gradients.
    log_prob = jnp.where(setting.where, log_prob, 0)
    ref_log_prob = jnp.where(setting.where, setting.ref_log_prob, 0)

    def of_pairs(table: Array) -> Array:
        return jnp.stack([table[rows.context, rows.first], table[rows.context, rows.second]], -1)

    pair = of_pairs(log_prob)
    scores = Scores(pair, of_pairs(ref_log_prob), jnp.ones(pair.shape, jnp.int32))
    if explores:
        scores = scores._replace(exploration_log_prob=pair[:, 1])
    for name, table in (beside or {}).items():
        if table is not None:
            scores = scores._replace(**{name: of_pairs(table)})
    away = theta - setting.reward_class.start(setting.features.shape[-1], theta.dtype)
    penalty = 0.5 * ridge * (away @ away)
    if not setting.preference.merges:
        label, count = history.labelled(rows)
        return count @ loss(scores._replace(label=label)) + penalty
    return rows.wins @ loss(scores) + rows.losses @ loss(scores.swapped()) + penalty


def _learner(
    loss_at: Callable[[Setting], Loss],
    *,
    agents: Agents,
    explores: bool = False,
    beside: Mapping[str, Table] | None = None,
    ridge: Scalar = 1.0,
) -> Learner:
    def init(setting: Setting, *, capacity: int) -> PolicyFit:
        dtype = setting.features.dtype
        return PolicyFit(
            history.init(setting, capacity=capacity, ordered=explores),
            setting.reward_class.start(setting.features.shape[-1], dtype),
            jnp.ones((), bool),
        )

    def propose(
        key: Key[Array, ""], setting: Setting, state: PolicyFit, context: Int[Array, " batch"]
    ) -> Proposal:
        return draw(key, *agents(setting, policy(setting, state)), context)

    def update(setting: Setting, state: PolicyFit, data: Duels) -> PolicyFit:
        seen = history.append(state.history, data, ordered=explores)
        rows = history.view(seen)
        loss = loss_at(setting)

        def objective(theta: Array) -> Array:
            return total_loss(
                setting, theta, rows, loss=loss, explores=explores, beside=beside, ridge=ridge
            )

        differences = history.differences(setting, seen)

        def metric(theta: Array) -> Array:
            if setting.reward_class.is_linear:
                z, margin = differences, differences @ theta
            else:
                z = history.differences(setting.local(theta), seen)
                margin = history.margins(setting, seen, theta)
            weights = (rows.wins + rows.losses) * bradley_terry.curvature(margin)
            identity = jnp.eye(theta.shape[0], dtype=theta.dtype)
            return (weights[:, None] * z).T @ z + ridge * identity

        found = descent.descend(objective, metric, state.theta)
        return PolicyFit(seen, found.theta, found.converged & ~history.overfull(seen))

    def policy(setting: Setting, state: PolicyFit) -> Float[Array, "contexts actions"]:
        return policy_log_prob(setting, state.theta)

    return Learner(init, propose, update, policy)
