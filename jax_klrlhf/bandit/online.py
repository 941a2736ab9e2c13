"""Online learners: the pairs are chosen by the learner, round after round.

Axes: ``contexts``, ``actions``, ``dim``, ``batch``.
"""

from jaxtyping import Array, Int, Key

from jax_klrlhf.bandit import enhancer
from jax_klrlhf.bandit.learner import Estimate, Learner, Proposal, draw, linear, mle_policy
from jax_klrlhf.bandit.problem import Setting
from jax_klrlhf.core.numerics import Scalar


def gshf(
    *,
    radius: Scalar,
    ridge: Scalar = 1.0,
    starts: int = 4,
    iterations: int = 3,
    bisections: int = 12,
) -> Learner:
    """Online iterative GSHF with the Option I enhancer (arXiv 2312.11456, Algorithm 2).

    The main agent, which is deployed, plays the Gibbs policy of the MLE on all data, from pi0 in
    every round. Its opponent is the most informative policy within the confidence set, see
    :mod:`jax_klrlhf.bandit.enhancer`. The batch size, 1 included, is that of the simulation;
    hybrid learning is the same learner with ``simulate(offline=)``.
    """

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        main = mle_policy(setting, state)
        opponent = enhancer.option_one(
            setting,
            state,
            main,
            radius=radius,
            starts=starts,
            iterations=iterations,
            bisections=bisections,
        )
        return draw(key, main, opponent.log_prob, context)

    return linear(propose, mle_policy, ridge=ridge)
