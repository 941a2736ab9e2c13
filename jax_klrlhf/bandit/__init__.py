"""KL-regularized preference bandits: problems, learners, simulation, exact evaluation."""

from jax_klrlhf.bandit import rules
from jax_klrlhf.bandit.evaluate import (
    coverage,
    error,
    gap,
    in_confidence_set,
    information,
    kl,
    optimum,
    record_gap,
    reward_gap,
    value,
)
from jax_klrlhf.bandit.learner import Estimate, Learner, Proposal, draw, mle_policy, reward_learner
from jax_klrlhf.bandit.offline import (
    kl_pcb,
    offline_greedy,
    offline_gshf_one,
    offline_gshf_two,
    pessimistic_mle,
)
from jax_klrlhf.bandit.online import (
    greedy,
    greedy_against_reference,
    gshf,
    kl_ucb,
    most_uncertain,
    thompson,
    uniform,
)
from jax_klrlhf.bandit.policy_class import chi_po, dpo, policy_learner, xpo
from jax_klrlhf.bandit.problem import Duels, Problem, Setting, compare
from jax_klrlhf.bandit.rules import at_contexts, choices, from_rule, from_target, reference
from jax_klrlhf.bandit.simulate import Round, Run, simulate
from jax_klrlhf.bandit.staged import moving_reference, two_stage
from jax_klrlhf.bandit.worlds import four_arms, four_arms_data, from_arrays, sphere
from jax_klrlhf.core import records

__all__ = [
    "Duels",
    "Estimate",
    "Learner",
    "Problem",
    "Proposal",
    "Round",
    "Run",
    "Setting",
    "at_contexts",
    "chi_po",
    "choices",
    "compare",
    "coverage",
    "dpo",
    "draw",
    "error",
    "four_arms",
    "four_arms_data",
    "from_arrays",
    "from_rule",
    "from_target",
    "gap",
    "greedy",
    "greedy_against_reference",
    "gshf",
    "in_confidence_set",
    "information",
    "kl",
    "kl_pcb",
    "kl_ucb",
    "mle_policy",
    "most_uncertain",
    "moving_reference",
    "offline_greedy",
    "offline_gshf_one",
    "offline_gshf_two",
    "optimum",
    "pessimistic_mle",
    "policy_learner",
    "record_gap",
    "reference",
    "reward_gap",
    "reward_learner",
    "rules",
    "simulate",
    "sphere",
    "thompson",
    "two_stage",
    "uniform",
    "value",
    "xpo",
]

records.document(__name__)
