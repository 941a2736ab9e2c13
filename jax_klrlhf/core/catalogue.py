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

METHODS: dict[str, Callable[..., group_losses.GroupLoss]] = {
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


def _group(name: str, family: str, source: str, note: str = "", law: str | None = None) -> Entry:
    return Entry(name, family, source, f"core.group_losses.{_SPELLED.get(name, name)}", note, law)


def _pair(name: str, source: str, function: str, note: str = "", family: str = P) -> Entry:
    return Entry(name, family, source, f"core.objectives.{function}", note)


def _one(name: str, source: str, function: str, note: str = "") -> Entry:
    return Entry(name, P, source, f"core.onesided.{function}", note)


def _no(name: str, family: str, source: str, why: str) -> Entry:
    return Entry(name, family, source, None, why)


_SPELLED = {
    "REBEL": "rebel", "RLOO": "rloo", "QRPO": "qrpo", "f-DPG": "f_dpg", "GDC, DPG": "gdc",
    "REINFORCE++": "reinforce_pp", "GRPO": "grpo", "Dr. GRPO": "dr_grpo", "DAPO": "dapo",
    "GSPO": "gspo", "COPO": "copo", "PPO's clip, composed": "clipped",
    "PRDP, VarGrad, FoR, TB": "regression",
}  # fmt: skip

ENTRIES: tuple[Entry, ...] = (
    _pair("f-DPO", "2309.16240", "f_divergence", family=F),
    _pair("chi-PO", "2407.13399", "chi_po", family=F),
    _group("f-DPG", F, "2302.08215"),
    _group("GDC, DPG", F, "2012.11635"),
    _pair("DPO", "2305.18290", "sigmoid", "cDPO by label_smoothing; ties by preference"),
    _pair("IPO", "2310.12036", "ipo"),
    _pair("SLiC, hinge", "2305.10425", "hinge"),
    _pair("rDPO", "2403.00409", "robust"),
    _pair("RPO", "2405.16436", "rpo"),
    _pair("CPO", "2401.08417", "cpo"),
    _pair("SimPO", "2405.14734", "simpo"),
    _pair("length-normalized DPO (Tulu 3)", "2411.15124", "length_normalized"),
    _pair("offline GSHF, Option II", "2312.11456", "pessimistic"),
    _pair("XPO, SELM, VPO", "2405.21046", "exploratory"),
    _pair("MODPO", "2310.03708", "modpo"),
    _pair("ODPO", "2402.10571", "odpo"),
    _pair("MM-DPO", "2502.10391", "mm_dpo"),
    _pair("EXO", "2402.00856", "exo"),
    _pair("DiscoPOP", "2406.08414", "discopop"),
    _pair("AOT", "2406.05882", "aot"),
    _pair("ORPO", "2403.07691", "orpo", "no reference"),
    Entry("WPO", P, "2406.11827", "core.objectives.wpo_weight", "a weight for `weighted`",
          "that of the loss it weighs"),
    Entry("LD-DPO", P, "2409.06411", "core.sequence.length_desensitized",
          "training.tasks.preference(tail=)"),
    Entry("TR-DPO", P, "2404.09656", "core.pairwise.moved_reference", "",
          "none: a schedule of eta"),
    Entry("CDR", P, "2411.02481", "core.gibbs.implicit_reward",
          "log strong over weak as the reward", "the strong model, at eta 1"),
    _one("NCA", "2402.05369", "nca"),
    _one("BCO", "2404.04656", "bco", "shift: a running mean"),
    _one("SPPO, hard labels", "2405.00675", "sppo"),
    _one("KTO", "2402.01306", "kto", "shift: the batch's KL"),
    _one("APO-zero", "2408.06266", "apo_zero"),
    _one("APO-down", "2408.06266", "apo_down"),
    _group("PRDP, VarGrad, FoR, TB", R, "2402.08714"),
    _group("REBEL", R, "2404.16767"),
    _group("QRPO", R, "2507.08068"),
    Entry("OP-GFN", R, "2310.00386", "core.regression.listwise"),
    _group("RLOO", G, "2402.14740"),
    _group("REINFORCE++", G, "2501.03262"),
    _group("GRPO", G, "2402.03300"),
    _group("Dr. GRPO", G, "2503.20783"),
    _group("DAPO", G, "2503.14476", "its filter: policy_gradient.informative"),
    _group("GSPO", G, "2507.18071"),
    _group("COPO", G, "authors' code", "needs answers that can be compared"),
    _group("PPO's clip, composed", G, "1707.06347", "dual clip; KL in the reward or as a loss"),
    Entry("pass@k, set rewards", S, "2505.15201", "core.sets.leave_one_out",
          "of sets.maximum", "the set reward's optimum"),
    Entry("SubPO", S, "2307.13372", "core.sets.to_go", "", "the set reward's optimum"),
    Entry("DARLING", S, "2509.02534", "core.sets.different_share", "times the reward",
          "a game's: shares in proportion to rewards"),
    Entry("DRAGON", S, "rewards of laws", "core.sets.mmd", "exemplars by a kernel",
          "the set reward's optimum"),
    Entry("DNO, SPPO, NashMD", N, "2404.03715", "core.self_play.mirror_step", "",
          "equilibrium with pi0 fixed; cycles without"),
    Entry("NLHF's equilibrium", N, "2312.00886", "core.links.nash", "", "the equilibrium itself"),
    Entry("RWR, reward-weighted likelihood", W, "2312.11456", "core.targets.optimum", "",
          "Gibbs, on draws of pi0"),
    Entry("RAFT", W, "2304.06767", "core.targets.top", "", "none, repeated: deterministic"),
    Entry("best-of-n distillation, SuperHF", W, "2407.14622", "core.targets.best_of", "",
          "best of n, below the frontier"),
    Entry("RSO", W, "2309.06657", "core.rejection.accept", "", "Gibbs, where the bound holds"),
    Entry("MaxMin-RLHF", A, "2402.08925", "core.saddle.simplex", "", "Gibbs of w* r"),
    Entry("constrained RLHF", A, "2310.04373", "core.saddle.free", "", "Gibbs of w* r"),
    Entry("soft-value guided decoding", INF, "2305.16765", "core.guided.soft_value", "",
          "Gibbs; of the mean value: none"),
    Entry("particles", INF, "twisted SMC", "core.guided.resample", "", "Gibbs, as N grows"),
    _no("TDPO, token-level DPO", P, "2404.11999", "a loss of tokens; none of the families"),
    _no("URPO, Cooper", G, "2507.17515", "a loop that judges itself: rounds with reward_model"),
    _no("TP-GRPO", G, "thought-level rewards", "needs a judge of thoughts"),
    _no("VERL's shaping", G, "2509.23808", "no fixed point; its rank: diversity.effective_rank"),
)  # fmt: skip
"""Every published name that the library has, is, or leaves out."""


def table() -> str:
    """The entries as Markdown, a family after the other."""
    lines = ["| method | family | function | law | source |", "|---|---|---|---|---|"]
    for entry in ENTRIES:
        note = f" ({entry.note})" if entry.note else ""
        if entry.path is None:
            row = (entry.name, entry.family, "none", entry.note, entry.source)
        else:
            said = entry.law or law(entry.function()) or "?"
            short = entry.path.removeprefix("core.")
            row = (f"{entry.name}{note}", entry.family, f"`{short}`", said, entry.source)
        lines.append("| " + " | ".join(_plain(cell) for cell in row) + " |")
    return "\n".join(lines) + "\n"


def _plain(cell: str) -> str:
    """A docstring's roles as Markdown."""
    cell = re.sub(r":math:`([^`]*)`", r"$\1$", cell)
    cell = re.sub(r":(?:func|data|mod|class):`~?\.?([^`]*)`", r"`\1`", cell)
    cell = cell.replace("|a|", r"\lvert a\rvert ")
    return cell.replace("``", "`").replace("|", "\\|")
