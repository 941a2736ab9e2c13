r"""What a loss may look at: the log-probabilities of the responses of each pair, and what is known.

Axes: ``batch`` (free axes, one entry per pair), ``responses`` (chosen at 0, rejected at 1).
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int, Shaped


class Scores(NamedTuple):
    """The last axis is what is chosen among: the chosen response at 0, the rejected one at 1.

    A field that no one filled in is None; a loss that needs it says which, and who provides it.

    >>> import jax.numpy as jnp
    >>> pair = Scores(jnp.array([-3.0, -5.0]), jnp.array([-4.0, -4.0]), jnp.array([7, 9]))
    >>> float(pair.chosen_log_ratio), float(pair.rejected_log_ratio), int(pair.chosen_length)
    (1.0, -1.0, 7)
    """

    log_prob: Float[Array, "*batch responses"]
    ref_log_prob: Float[Array, "*batch responses"] | None
    length: Int[Array, "*batch responses"]
    """Tokens of each response; 1 of an action."""
    reward: Float[Array, "*batch responses"] | None = None
    """What something else (a reward model, the data's scores) says of each response."""
    bonus: Float[Array, "*batch responses"] | None = None
    """Uncertainty of each response, times its radius, in units of reward."""
    exploration_log_prob: Float[Array, "*batch"] | None = None
    """log pi of a response that was drawn to explore with: of pi0 in XPO, of the policy in SELM."""
    label: Shaped[Array, "*batch"] | None = None
    """P(first preferred), or an outcome's number, for a loss that reads it; None is 1."""

    def given(self, name: str) -> Array:
        """A field that may be None; ValueError, saying who fills it in, where it is."""
        found = getattr(self, name)
        if found is None:
            raise ValueError(f"this loss reads Scores.{name}, which is None: {_WHO[name]}")
        return found

    @property
    def log_ratio(self) -> Float[Array, "*batch responses"]:
        """``log pi - log pi_0`` of each response; ValueError without a reference."""
        return self.log_prob - self.given("ref_log_prob")

    @property
    def chosen_log_prob(self) -> Float[Array, "*batch"]:
        """Log-probability of the chosen response."""
        return self.log_prob[..., 0]

    @property
    def rejected_log_prob(self) -> Float[Array, "*batch"]:
        """Log-probability of the rejected response."""
        return second(self.log_prob)

    @property
    def chosen_log_ratio(self) -> Float[Array, "*batch"]:
        """Log-ratio of the chosen response."""
        return self.log_ratio[..., 0]

    @property
    def rejected_log_ratio(self) -> Float[Array, "*batch"]:
        """Log-ratio of the rejected response."""
        return second(self.log_ratio)

    @property
    def chosen_length(self) -> Int[Array, "*batch"]:
        """Tokens of the chosen response."""
        return self.length[..., 0]

    @property
    def rejected_length(self) -> Int[Array, "*batch"]:
        """Tokens of the rejected response."""
        return second(self.length)

    def swapped(self) -> "Scores":
        """The pairs with their responses the other way round; who explored stays who it was."""
        pairs = {
            name: None if x is None else x[..., ::-1]
            for name, x in self._asdict().items()
            if name in _OF_RESPONSES
        }
        return self._replace(**pairs, label=None if self.label is None else 1 - self.label)


Loss = Callable[[Scores], Float[Array, "*batch"]]
"""``loss(scores) -> [batch]``, hyper-parameters bound: of :mod:`.objectives` or a user's own."""

_OF_RESPONSES = ("log_prob", "ref_log_prob", "length", "reward", "bonus")
_WHO = {
    "ref_log_prob": "score the reference too, or take a loss without one (objectives.simpo)",
    "reward": (
        "training.tasks.preference takes it from the batch's scores, bandit.policy_learner from "
        "its reward="
    ),
    "bonus": "hand in the uncertainty of each response, times its radius",
    "exploration_log_prob": (
        "training.tasks.preference(explores=1) and bandit.policy_learner(explores=True) score the "
        "responses that explored"
    ),
    "label": "hand in the labels",
}


def second(x: Array) -> Array:
    """Entry 1 of a last axis of two; jax would clamp the index on an axis of one."""
    if x.shape[-1] != 2:
        raise ValueError(
            f"a pair has two responses on its last axis, chosen and rejected; got shape {x.shape}: "
            "choose two of them first (core.pairs)"
        )
    return x[..., 1]
