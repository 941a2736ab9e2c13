"""Beliefs of ``klrlhf iterate``: of each kind its options, and how it is made of them.

Nothing heavy is imported before a belief is made.
"""
# ruff: noqa: D102  # the family says what its methods are

import abc
from typing import Annotated, Any, ClassVar, Literal

from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.options import Count, Family, Finite, Number, Weight, When


class Belief(Family, abc.ABC):
    """What the learner believes of responses; it sees labels, never the annotator's reward."""

    switch: ClassVar = "belief.kind"
    uncertain: ClassVar[bool] = False
    """Whether it knows its uncertainty."""

    kind: str
    length_penalty: Finite = 0.0
    """Nats taken from the reward for each token."""
    transform: Literal["none", "centred", "log-sigmoid"] = "none"
    """Of the reward at a prompt: less its mean, or the log-probability of beating the mean."""

    def make(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        """The ``rounds.Reward``; ``prompts`` serve to centre and scale features."""
        from jax_klrlhf.training import rounds

        found = self.build(place, key, judge, prompts)
        if self.length_penalty:
            found = rounds.length_penalty(found, self.length_penalty)
        if self.transform != "none":
            change = {"centred": rounds.centred, "log-sigmoid": rounds.log_sigmoid()}
            found = rounds.transformed(found, change[self.transform])
        return found

    @abc.abstractmethod
    def build(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        """The same without penalty and transform."""


class Fitted(Belief):
    """Reward models on the policy's trunk, fitted whole."""

    steps: Count = 100
    """Optimizer steps of each fit, anew each round on all labels."""
    learning_rate: Number = 1e-5
    """Of the fits."""
    pooling: Literal["last", "mean"] | None = None
    """The response's last state or the mean of its states; by default last, and mean for linear."""


class RewardModel(Fitted):
    """A Bradley-Terry reward model on the policy's trunk."""

    kind: Literal["reward-model"] = "reward-model"

    def build(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        return place.reward_models(self, [key])[0]


class Several(Fitted):
    """Members, who differ where they have seen little."""

    uncertain: ClassVar = True

    members: Count = 3
    """How many."""
    combine: Literal["mean", "worst", "variance"] = "mean"
    """The members' mean, their least, or mean less belief.variance-coef times their variance."""
    variance_coef: Annotated[Weight, When("belief.combine", "variance")] = 1.0
    """Where they are combined by variance."""

    def check(self, config: Any) -> None:
        if self.members < 2:
            raise InputError(f"--belief.members is {self.members}; an ensemble has at least two.")

    def combined(self) -> Any:
        """How members are combined."""
        from jax_klrlhf.training import rounds

        weighted = rounds.uncertainty_weighted(self.variance_coef)
        return {"mean": rounds.mean, "worst": rounds.worst, "variance": weighted}[self.combine]


class Ensemble(Several):
    """Several of them."""

    kind: Literal["ensemble"] = "ensemble"

    def build(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        import jax

        from jax_klrlhf.training import rounds

        keys = [jax.random.fold_in(key, number) for number in range(self.members)]
        members = [rounds.resampled(member) for member in place.reward_models(self, keys)]
        return rounds.ensemble(members, combine=self.combined())


class Heads(Several):
    """Several heads on one trunk, which cost one forward pass."""

    kind: Literal["heads"] = "heads"

    def build(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        return place.heads(self, key, self.combined())


class Linear(Belief):
    """A linear reward on pi0's frozen hidden states with its confidence ellipsoid."""

    uncertain: ClassVar = True

    kind: Literal["linear"] = "linear"
    pooling: Literal["last", "mean"] | None = None
    """As of a reward model."""
    ridge: Number = 0.01
    """Of the fit and of the ellipsoid (lambda)."""
    radius: Number = 1.0
    """Scale of the uncertainty (beta of arXiv 2312.11456), in nats of reward."""
    bound: Number | None = None
    """Largest norm of theta."""

    def build(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        from jax_klrlhf.training import rounds

        return rounds.linear(
            place.features(key, prompts, self.pooling),
            dim=place.loaded.config.hidden_size,
            ridge=self.ridge,
            radius=self.radius,
            bound=self.bound,
            mesh=place.mesh,
        )


class Implicit(Belief):
    """The policy's own implicit reward."""

    kind: Literal["implicit"] = "implicit"

    def build(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        from jax_klrlhf.training import rounds

        config = place.config
        return rounds.implicit(
            place.policy.model, kl_coef=config.kl_coef, rows=config.rows, mesh=place.mesh
        )


class Given(Belief):
    """A trained reward model (belief.model)."""

    kind: Literal["given"] = "given"
    model: str | None = None
    """Folder or hub id of the reward model."""

    def check(self, config: Any) -> None:
        if self.model is None:
            raise InputError("--belief.kind given needs --belief.model, a trained reward model.")

    def build(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        from jax_klrlhf.training import rounds

        return rounds.known(place.model_judge(str(self.model)))


class Annotators(Belief):
    """The annotator's reward itself, which is cheating and tells what belief costs."""

    kind: Literal["annotator"] = "annotator"

    def check(self, config: Any) -> None:
        if config.human:
            raise InputError(
                "--belief.kind annotator: people have no reward that could be believed."
            )
        if config.recorded:
            raise InputError("--belief.kind annotator: recorded labels have no reward to believe.")

    def build(self, place: Any, key: Any, judge: Any, prompts: Any) -> Any:
        from jax_klrlhf.training import rounds

        return rounds.known(judge)
