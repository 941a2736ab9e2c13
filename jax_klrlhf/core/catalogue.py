r"""Every objective by name: what there is, which family it is in, what it converges to.

* :data:`METHODS`, :data:`CHOICES`: losses on groups by the name that the command line takes.
* :data:`ENTRIES`: the names of the literature, each with the function that is it, or the reason why
  there is none. :func:`table` is the page of the documentation; a law is what the function's own
  docstring says after "Law:", so that the two cannot differ.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jax_klrlhf.core import group_losses
from jax_klrlhf.core import policy_gradient as gradients
from jax_klrlhf.core.fdivergence import forward_kl, jensen_shannon, reverse_kl

METHODS: dict[str, Callable[..., group_losses.Loss]] = {
    "regression": group_losses.regression,
    "rebel": group_losses.rebel,
    "rloo": group_losses.rloo,
    "qrpo": group_losses.qrpo,
    "f_dpg": group_losses.f_dpg,
    "gdc": group_losses.gdc,
    "reinforce_pp": group_losses.reinforce_pp,
    "grpo": group_losses.grpo,
    "dr_grpo": group_losses.dr_grpo,
    "dapo": group_losses.dapo,
    "gspo": group_losses.gspo,
    "clipped": group_losses.clipped,
}
"""Factories of losses on groups; what their keywords take besides numbers is in :data:`CHOICES`."""

WEIGHED = frozenset(
    {"rloo", "f_dpg", "gdc", "reinforce_pp", "grpo", "dr_grpo", "dapo", "gspo", "clipped"}
)
"""Those that read ``Group.importance``; the others keep their law on anyone's draws without."""

_DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "k1": reverse_kl,
    "k2": reverse_kl,
    "forward_kl": forward_kl,
    "k3": forward_kl,
    "jensen_shannon": jensen_shannon,
}
CHOICES: dict[str, dict[str, Any]] = {
    "advantage": {
        "leave_one_out": gradients.leave_one_out,
        "group_mean": gradients.group_mean,
        "by_std": gradients.by_std,
        "by_batch_std": gradients.by_batch_std,
    },
    "divergence": _DIVERGENCES,
    "penalty": _DIVERGENCES,
    "kl": {"loss": "loss", "reward": "reward"},
    "mean": {"response": "response", "group": "group", "constant": "constant"},
    "sequence": {"no": False, "yes": True},
}
"""Words for the keywords that are no numbers. An estimator is a divergence: k1 in the reward and k2
as a loss are reverse KL's, k3 as a loss is forward KL's."""


class Entry(NamedTuple):
    """A published name."""

    name: str
    family: str
    source: str
    """arXiv number, or what stands for it."""
    path: str | None
    """Of the function, from ``core`` on; None: there is none, and ``note`` says why."""
    note: str = ""
    law: str | None = None
    """In place of the function's own, where it is a part of the method alone."""

    def function(self) -> Any:
        """The object at ``path``."""
        module, _, attribute = str(self.path).rpartition(".")
        return getattr(importlib.import_module(f"jax_klrlhf.{module}"), attribute)


F, P, R, G, S, N, W, A, INF = (
    "divergences", "pairs", "regression", "policy gradient", "sets", "self-play",
    "weighted likelihood", "saddle", "inference",
)  # fmt: skip


def law(function: Any) -> str | None:
    """What a docstring says after "Law:", to the end of the sentence; None where it doesn't."""
    found = re.search(r"\bLaw:\s+(.*?)(?:\.\s|\.$|$)", _flat(function))
    return found[1] if found else None


def _flat(function: Any) -> str:
    text = (inspect.getdoc(function) or "").split(">>>")[0]
    return " ".join(text.split())
