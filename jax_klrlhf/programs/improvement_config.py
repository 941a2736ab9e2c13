"""Policy improvement in ``klrlhf iterate``: of each method its options, and how it is made of them.

Nothing heavy is imported before an improvement is made.
"""
# ruff: noqa: D102  # the family says what its methods are

import abc
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.options import Count, Family, Finite, Number, When


class Improvement(Family, abc.ABC):
    """From comparisons to the next policy."""

    switch: ClassVar = "improve.method"
    method: str

    @abc.abstractmethod
    def make(self, place: Any) -> Any:
        """The ``rounds.Improve``."""


class Preference(Improvement):
    """A preference loss on the pairs."""

    method: Literal["preference"] = "preference"
    objective: str = "sigmoid"
    """Name of a loss in jax_klrlhf.core.objectives: sigmoid (DPO), ipo, rpo, ..."""
    options: dict[str, float | str] = field(default_factory=dict)
    """Of preference: further numbers of the objective, such as label_smoothing 0.1. On the policy's
    own draws: the loss's keywords, such as clip 0.1 of grpo, or of clipped: advantage
    leave_one_out low 0.2 high 0.28 mean group penalty k2 kl loss; kl none leaves out a KL that a
    loss can do without."""

    def check(self, config: Any) -> None:
        self.loss(config)

    def loss(self, config: Any) -> Any:
        """Of log-probabilities, ``core.scores.Loss``."""
        from jax_klrlhf.programs.losses import objective

        return objective(self.objective, kl_coef=config.kl_coef, options=self.options)[0]

    def make(self, place: Any) -> Any:
        from jax_klrlhf.programs.iterate_parts import preferred_first, rounds

        config = place.config
        return preferred_first(
            rounds.preference_optimization(
                place.policy.model,
                self.loss(config),
                fitting=place.policy_fitting(),
                report_coef=config.kl_coef,
                rows=config.rows,
            )
        )


class Pessimistic(Improvement):
    """DPO with a margin by the belief's uncertainty."""

    method: Literal["pessimistic"] = "pessimistic"

    def check(self, config: Any) -> None:
        if not config.belief.uncertain:
            raise InputError(
                f"--improve.method pessimistic needs a belief that knows its uncertainty; "
                f"{config.belief.kind} does not: give --belief.kind linear, ensemble or heads."
            )

    def make(self, place: Any) -> Any:
        from jax_klrlhf.programs.iterate_parts import preferred_first, rounds

        given = {"rows": place.config.rows, **place.strength()}
        return preferred_first(rounds.pessimistic_dpo(place.policy.model, **given))


class Drawing(Improvement):
    """Methods that draw responses anew, which the belief judges."""

    proposals: Count | None = None
    """Responses drawn to each prompt; --samples by default."""

    def each(self, config: Any) -> int:
        """Responses drawn to each prompt."""
        return self.proposals or config.samples


class Rejecting(Drawing):
    """Methods that accept some of them."""

    chain: Count = 1
    """Steps of multi-step rejection sampling."""
    reward_bound: Finite | None = None
    """A bound of every believed reward; by default the largest at each prompt stands in, and the
    error of that is reported."""
    keep: Count | None = None
    """Accepted responses of a prompt that are learned from, at most."""
    passes: Literal["one", "until"] = "one"
    """One pass over the proposals, which may leave a prompt without a pair; or passes until
    improve.keep different ones are accepted or none is left, as in RSO's own code."""

    def check(self, config: Any) -> None:
        if self.keep is not None and self.keep > self.each(config):
            raise InputError(
                f"--improve.keep is {self.keep}, of {self.each(config)} proposals "
                "(--improve.proposals)."
            )
        if self.passes == "until" and self.keep is None:
            raise InputError("--improve.passes until needs --improve.keep: how many to go on for.")
        if self.passes == "until" and self.reward_bound is not None:
            raise InputError(
                "--improve.reward-bound: with --improve.passes until the largest reward that is "
                "left stands for it; leave it out."
            )

    def accepting(self) -> dict[str, Any]:
        """Which are accepted."""
        return {
            "steps": self.chain,
            "keep": self.keep,
            "reward_bound": self.reward_bound,
            "passes": self.passes,
        }


class Rso(Rejecting):
    """From responses that are drawn anew and judged by the belief: DPO on accepted ones (RSO)."""

    method: Literal["rso"] = "rso"
    ranking: Literal["first-round", "tournament"] = "first-round"
    """How accepted responses are paired."""
    labels: Literal["expected", "drawn", "order"] = "expected"
    """What a pair's label is by the believed rewards: the Bradley-Terry probability as a soft
    label; a preference drawn from it; or 1 for the higher reward, which keeps to no distance from
    pi0 but that of fit.steps."""

    def make(self, place: Any) -> Any:
        from jax_klrlhf.core import pairs
        from jax_klrlhf.training import rounds

        return rounds.rso(
            place.policy.model,
            place.draw(self.each(place.config)),
            rule=pairs.first_round if self.ranking == "first-round" else pairs.tournament,
            labelling=rounds.rejection.LABELLINGS[self.labels],
            **self.accepting(),
            **place.strength(),
        )


class Rejection(Rejecting):
    """Likewise, maximum likelihood on accepted ones."""

    method: Literal["rejection"] = "rejection"

    def make(self, place: Any) -> Any:
        from jax_klrlhf.training import rounds

        learn = rounds.rejection.likelihood(place.policy.model, fitting=place.policy_fitting())
        draw, kl_coef = place.draw(self.each(place.config)), place.config.kl_coef
        return rounds.rejection_sampling(draw, learn, kl_coef=kl_coef, **self.accepting())


class Weighted(Drawing):
    """Likewise, reward-weighted likelihood."""

    method: Literal["weighted"] = "weighted"

    def make(self, place: Any) -> Any:
        from jax_klrlhf.training import rounds

        draw = place.draw(self.each(place.config))
        return rounds.weighted_likelihood(place.policy.model, draw, **place.strength())


class OwnDraws(Drawing):
    """Draw from the policy itself again and again in a round, and take the loss of that name in
    jax_klrlhf.core.group_losses; clipped is PPO's, put together by improve.options."""

    called: ClassVar = "on the policy's own draws"
    method: Literal[
        "regression", "rebel", "rloo", "qrpo", "f_dpg", "gdc", "reinforce_pp", "grpo", "dr_grpo",
        "dapo", "gspo", "clipped",
    ]  # fmt: skip
    options: dict[str, float | str] = field(default_factory=dict)
    """As of preference."""
    iterations: Count | None = None
    """How often is drawn in a round; fit.steps are divided among the draws. By default before every
    step."""
    prompts: Count | None = None
    """Prompts of each draw, one portion after the other; by default fit.batch-size for every step
    between two draws, so that each group is learned from once."""
    informative_only: bool = False
    """Leave out prompts whose rewards are all equal (DAPO's filter)."""
    importance_limit: Number | None = None
    """Weigh each response by its scored over its sampled probability, at most this (truncated
    importance weights)."""
    quantiles: Annotated[Count, When("improve.method", "qrpo")] = 32
    """qrpo: responses of the reference to each prompt, among whose rewards one's quantile is
    taken."""

    def check(self, config: Any) -> None:
        from jax_klrlhf.programs import own_draws

        own_draws.check(config)

    def make(self, place: Any) -> Any:
        from jax_klrlhf.programs import own_draws

        return own_draws.improvement(place)
