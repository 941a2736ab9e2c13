"""Every family's losses as functions of one group of draws, so that all see the same samples.

What a family needs besides is made of the group: pairs (2i, 2i + 1) with the Bradley-Terry
probability of the rewards as a soft label, win rates against the group's other members, the best of
the group. ``inference`` has no loss: it is a law.

Axes: ``batch`` (contexts or prompts), ``responses`` (K, last).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.core import fdivergence, group_losses, links, objectives, sets
from jax_klrlhf.core import policy_gradient as gradients
from jax_klrlhf.core.group_losses import Group, GroupLoss
from jax_klrlhf.core.scores import Scores

Make = Callable[[Array], GroupLoss]
"""From the coefficient to a loss."""


class Method(NamedTuple):
    """A loss of a family, and what its docstring says it converges to."""

    family: str
    make: Make
    law: str


def pairwise(loss: Callable[..., Array]) -> Make:
    """A loss on pairs, of the group's draws 2i and 2i + 1, under its expected label."""

    def make(kl_coef: Array) -> GroupLoss:
        def of(group: Group) -> Array:
            pair = lambda x: x[..., : x.shape[-1] // 2 * 2].reshape(*x.shape[:-1], -1, 2)  # noqa: E731
            scores = Scores(pair(group.log_prob), pair(group.ref_log_prob), pair(group.length))
            reward = pair(group.reward)
            label = jax.nn.sigmoid(reward[..., 0] - reward[..., 1])
            one, two = (loss(s, kl_coef=kl_coef) for s in (scores, scores.swapped()))
            return jnp.mean(label * one + (1 - label) * two, -1)

        return of

    return make


def win_rates(kl_coef: Array) -> GroupLoss:
    """Log-ratios to pi0 regressed on win rates against the group's others."""
    loss = group_losses.regression(kl_coef=kl_coef)

    def of(group: Group) -> Array:
        samples = group.reward.shape[-1]
        beats = links.matrix(group.reward)
        # A draw does not meet itself, which would be a half.
        beats = jnp.where(jnp.broadcast_to(jnp.eye(samples, dtype=bool), beats.shape), 0, beats)
        return loss(group._replace(reward=jnp.sum(beats, -1) / (samples - 1)))

    return of


def best_of_set(kl_coef: Array) -> GroupLoss:
    """Leave-one-out weights of the group's best reward (pass@K), each response's KL priced."""

    def of(group: Group) -> Array:
        everyone = jnp.ones(group.reward.shape, bool)
        gain = sets.leave_one_out(partial(sets.maximum, group.reward), everyone)
        price = gradients.regularized(0 * group.reward, group.log_ratio, kl_coef=kl_coef)
        weight = group.reward.shape[-1] * gain + gradients.leave_one_out(price)
        return gradients.surrogate(group.log_prob, weight)

    return of


def best(penalty: bool) -> Make:
    """Likelihood of the group's best response; with k2 beside it (SuperHF) or without (RAFT)."""

    def make(kl_coef: Array) -> GroupLoss:
        def of(group: Group) -> Array:
            top = jnp.argmax(group.reward, -1, keepdims=True)
            found = -jnp.take_along_axis(group.log_prob, top, -1)[..., 0]
            if not penalty:
                return found
            return found + kl_coef * jnp.mean(group.log_ratio**2 / 2, -1)

        return of

    return make


def _k2(advantage: group_losses.Advantage) -> Make:
    return lambda kl_coef: group_losses.clipped(
        advantage=advantage, low=0.2, high=0.2, mean="group", kl_coef=kl_coef,
        penalty=fdivergence.reverse_kl,
    )  # fmt: skip


def _f_dpo(scores: Scores, *, kl_coef: Array) -> Float[Array, "*batch"]:
    divergence = fdivergence.jensen_shannon
    return objectives.f_divergence(scores, kl_coef=kl_coef, divergence=divergence)


METHODS: dict[str, Method] = {
    "f-DPG, forward KL": Method("F", lambda c: group_losses.f_dpg(kl_coef=c), "Gibbs"),
    "f-DPO, Jensen-Shannon": Method("F", pairwise(_f_dpo), "Jensen-Shannon's"),
    "DPO": Method("P", pairwise(objectives.sigmoid), "Gibbs"),
    "IPO": Method("P", pairwise(objectives.ipo), "none (win rates)"),
    "regression (PRDP, VarGrad)": Method(
        "R", lambda c: group_losses.regression(kl_coef=c), "Gibbs"
    ),
    "regression, forward KL": Method(
        "R", lambda c: group_losses.regression(kl_coef=c, divergence=fdivergence.forward_kl),
        "Gibbs",
    ),
    "REBEL": Method("R", lambda c: group_losses.rebel(kl_coef=c), "none"),
    "RLOO": Method("G", lambda c: group_losses.rloo(kl_coef=c), "Gibbs"),
    "REINFORCE++": Method("G", lambda c: group_losses.reinforce_pp(kl_coef=c), "Gibbs"),
    "leave-one-out, k2 as a loss": Method("G", _k2(gradients.leave_one_out), "Gibbs"),
    "GRPO (k3 as a loss, by std)": Method(
        "G", lambda c: group_losses.grpo(kl_coef=c), "forward KL at eta sd(r)"
    ),
    "by std, k2 as a loss": Method("G", _k2(gradients.by_std), "Gibbs at eta sd(r), or none"),
    "Dr. GRPO (k3 as a loss)": Method(
        "G", lambda c: group_losses.dr_grpo(size=1, kl_coef=c), "forward KL"
    ),
    "DAPO (no KL)": Method("G", lambda c: group_losses.dapo(), "none"),
    "pass@K, KL priced": Method("S", best_of_set, "of the set reward"),
    "win rates (SPPO, pi0 fixed)": Method("N", win_rates, "equilibrium"),
    "GDC (exponential weights)": Method("W", lambda c: group_losses.gdc(kl_coef=c), "Gibbs, K big"),
    "best of K and k2 (SuperHF)": Method("W", best(penalty=True), "none (below the frontier)"),
    "best of K (RAFT)": Method("W", best(penalty=False), "none"),
}  # fmt: skip
"""By name. Coefficients are eta of each method's own convention, so that KLs differ: read rewards
at equal KL (`below the frontier`)."""
