"""Configuration of policy improvement in ``klrlhf iterate``; nothing heavy is imported."""

from dataclasses import dataclass, field
from typing import Literal, get_args

OwnDraws = Literal[
    "regression", "rebel", "rloo", "qrpo", "f_dpg", "gdc", "reinforce_pp", "grpo", "dr_grpo",
    "dapo", "gspo", "clipped",
]  # fmt: skip
"""Losses on groups of the policy's own draws: the names of ``core.catalogue.METHODS``."""
OWN_DRAWS: tuple[str, ...] = get_args(OwnDraws)


@dataclass(frozen=True, kw_only=True)
class Improvement:
    """From comparisons to the next policy."""

    method: Literal["preference", "pessimistic", "rso", "rejection", "weighted", OwnDraws] = (
        "preference"
    )
    """A preference loss on the pairs; DPO with a margin by the belief's uncertainty; and, from
    responses that are drawn anew and judged by the belief: DPO on accepted ones (RSO), maximum
    likelihood on accepted ones, reward-weighted likelihood. The others draw from the policy itself
    again and again in a round and take the loss of that name in jax_klrlhf.core.group_losses;
    clipped is PPO's, put together by improve.options."""
    objective: str = "sigmoid"
    """preference: name of a loss in jax_klrlhf.core.objectives: sigmoid (DPO), ipo, rpo, ..."""
    options: dict[str, float | str] = field(default_factory=dict)
    """preference: further numbers of the objective, such as label_smoothing 0.1. On the policy's
    own draws: the loss's keywords, such as clip 0.1 of grpo, or of clipped: advantage
    leave_one_out low 0.2 high 0.28 mean group penalty k2 kl loss; kl none leaves out a KL that a
    loss can do without."""
    chain: int = 1
    """rso, rejection: steps of multi-step rejection sampling."""
    proposals: int | None = None
    """Of what is drawn anew: responses to each prompt; --samples by default."""
    iterations: int | None = None
    """On the policy's own draws: how often is drawn in a round; fit.steps are divided among the
    draws. By default before every step."""
    prompts: int | None = None
    """On the policy's own draws: prompts of each, one portion after the other; by default
    fit.batch-size for every step between two draws, so that each group is learned from once."""
    informative_only: bool = False
    """On the policy's own draws: leave out prompts whose rewards are all equal (DAPO's filter)."""
    importance_limit: float | None = None
    """On the policy's own draws: weigh each response by its scored over its sampled probability,
    at most this (truncated importance weights)."""
    quantiles: int = 32
    """qrpo: responses of the reference to each prompt, among whose rewards one's quantile is
    taken."""
    reward_bound: float | None = None
    """rso, rejection: a bound of every believed reward; by default the largest at each prompt
    stands in, and the error of that is reported."""
    keep: int | None = None
    """rso, rejection: accepted responses of a prompt that are learned from, at most."""
    passes: Literal["one", "until"] = "one"
    """rso, rejection: one pass over the proposals, which may leave a prompt without a pair; or
    passes until improve.keep different ones are accepted or none is left, as in RSO's own code."""
    ranking: Literal["first-round", "tournament"] = "first-round"
    """rso: how accepted responses are paired."""
    labels: Literal["expected", "drawn", "order"] = "expected"
    """rso: what a pair's label is by the believed rewards: the Bradley-Terry probability as a soft
    label; a preference drawn from it; or 1 for the higher reward, which keeps to no distance from
    pi0 but that of fit.steps."""
