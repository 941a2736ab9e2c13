"""KL-regularized preference bandits: problems, learners, simulation, exact evaluation."""

from jax_klrlhf.bandit.evaluate import record_gap
from jax_klrlhf.bandit.learner import Estimate, Learner, Proposal, linear
from jax_klrlhf.bandit.offline import offline_greedy, offline_gshf_two
from jax_klrlhf.bandit.online import gshf
from jax_klrlhf.bandit.problem import Comparisons, Problem, Setting, from_arrays, sphere
from jax_klrlhf.bandit.simulate import Round, Run, simulate

__all__ = [
    "Comparisons",
    "Estimate",
    "Learner",
    "Problem",
    "Proposal",
    "Round",
    "Run",
    "Setting",
    "from_arrays",
    "gshf",
    "linear",
    "offline_greedy",
    "offline_gshf_two",
    "record_gap",
    "simulate",
    "sphere",
]
