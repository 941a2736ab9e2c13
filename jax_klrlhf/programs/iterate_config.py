"""Configuration of ``klrlhf iterate``, and what no type says of it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax_klrlhf import defaults
from jax_klrlhf.columns import Columns
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.config import (
    Adapter,
    MeshSizes,
    Processes,
    check_adapter,
    check_seed,
    default_of,
    flag,
    positive,
)
from jax_klrlhf.programs.improvement_config import OWN_DRAWS, Improvement


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Who labels pairs: Bradley-Terry on --reward, or people. Recorded labels are taken as they
    are."""

    labels: Literal["drawn", "expected"] = "drawn"
    """A preference drawn for each pair, or its probability as a soft label."""
    scale: float = 1.0
    """What the reward is multiplied by; the higher, the surer the labels."""
    noise: float = 0.0
    """Rate at which a label is swapped."""
    tie: float = 0.0
    """Width of a tie in nats of reward, of drawn labels."""
    folder: Path | None = None
    """people: where pairs wait for them; by default OUTPUT/labels."""
    each: int = 1
    """people: how many are asked of each pair."""


@dataclass(frozen=True, kw_only=True)
class Belief:
    """What the learner believes of responses; it sees labels, never the annotator's reward."""

    kind: Literal[
        "reward-model", "ensemble", "heads", "linear", "implicit", "given", "annotator"
    ] = "reward-model"
    """A Bradley-Terry reward model on the policy's trunk; several of them; several heads on one
    trunk, which cost one forward pass; a linear reward on pi0's frozen hidden states with its
    confidence ellipsoid; the policy's own implicit reward; a trained reward model (belief.model);
    or the annotator's reward itself, which is cheating and tells what belief costs."""
    model: str | None = None
    """given: folder or hub id of the reward model."""
    members: int = 3
    """ensemble, heads: how many."""
    combine: Literal["mean", "worst", "variance"] = "mean"
    """ensemble, heads: the members' mean, their least, or mean less belief.variance-coef times
    their variance."""
    variance_coef: float = 1.0
    """ensemble, heads, combined by variance."""
    steps: int = 100
    """reward-model, ensemble, heads: optimizer steps of each fit, anew each round on all labels."""
    learning_rate: float = 1e-5
    """reward-model, ensemble, heads."""
    pooling: Literal["last", "mean"] | None = None
    """reward-model, ensemble, heads, linear: the response's last state or the mean of its states;
    by default last, and mean for linear."""
    ridge: float = 0.01
    """linear: of the fit and of the ellipsoid (lambda)."""
    radius: float = 1.0
    """linear: scale of the uncertainty (beta of arXiv 2312.11456), in nats of reward."""
    bound: float | None = None
    """linear: largest norm of theta."""
    length_penalty: float = 0.0
    """Nats taken from the reward for each token."""
    transform: Literal["none", "centred", "log-sigmoid"] = "none"
    """Of the reward at a prompt: less its mean, or the log-probability of beating the mean."""


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which two responses are compared, and who gives them besides the main agent."""

    rule: Literal[
        "best-worst", "best-second", "best-random", "sampled", "first-round", "tournament",
        "most-uncertain", "enhancer", "between",
    ] = "best-worst"  # fmt: skip
    """By believed reward: best-worst, best-second, best-random (two draws where it ranks none),
    first-round and tournament (several pairs a prompt); sampled: two draws. By the ellipsoid of a
    linear belief: most-uncertain, and enhancer, the main agent's draw against one tilted towards
    what is least known, within the KL budget. between: one response of the main agent, one of the
    second agent."""
    other: Literal["none", "pi0", "temperature", "earlier"] = "none"
    """A second agent that answers too: pi0, the main agent at another temperature, or the policy
    of pairs.back rounds before."""
    temperature: float | None = None
    """Of the second agent; the main agent's by default."""
    back: int = 1
    """earlier: rounds."""
    samples: int | None = None
    """Responses of the second agent; as many as the main agent's by default."""
    first: Literal["any", "best", "worst"] = "any"
    """between: which of the main agent's responses, by believed reward."""
    second: Literal["any", "best", "worst"] = "any"
    """between: which of the second agent's."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How the policy is fitted; the optimizer begins anew each round."""

    steps: int = 100
    batch_size: int = 64
    """Comparisons of a step, over all devices; of the belief's fits too."""
    micro_batches: int = 1
    learning_rate: float = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = 0.0
    """Of adamw."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Of adamw, the first ones; the second, which change by a thousandth a step, stay float32."""
    clip: float | None = 1.0
    """Largest norm of the gradient."""
    save_every: int = 100
    """Steps between checkpoints inside a fit, from the last of which a killed one goes on."""
    max_skipped: int = 5
    """Updates in a row whose loss or gradient is not finite: so many stop the run."""
    log_every: int = 50


@dataclass(frozen=True, kw_only=True)
class IterateConfig:
    """Iterative preference learning: rounds of sample, score, pair, label, believe, fit.

    Offline DPO is --setting offline; RSO is that with --improve.method rso; online and hybrid GSHF
    (arXiv 2312.11456) are --setting online and hybrid. Every phase of every round is left in
    OUTPUT/rounds, and a run that was killed goes on from there to the same result; a finished one
    goes on with more --rounds. The policy is left in OUTPUT/model.

    From Python alone (jax_klrlhf.training.rounds): features, pair rules, and f-divergences of your
    own; another oracle or prompts for each round; a pool of recorded responses scored by another
    belief than these; an evaluation inside a fit.
    """

    model: str
    """Folder or hub id of pi0, the model to start from."""
    reward: str
    """What the annotator has in mind: folder or hub id of a reward model, or a folder with
    positive.txt and negative.txt (one sentence a line), on which one is fitted; or module:function
    of your own, reward(prompts, texts) with a number for each text; or the word `recorded`: the
    labels of --data, among whose responses pairs are then chosen; or the word `human`: people, on
    the page of `klrlhf label --output OUTPUT/labels`, for whom the run waits."""
    output: Path
    """Folder of the run. A run that was cut off goes on from it."""
    prompts: str | None = None
    """Prompts to answer: a .txt file, one a line; or .jsonl, .json, .parquet, a folder, hub id or
    tfds:name with a prompt column. By default the prompts of --data."""
    data: str | None = None
    """Offline preferences, in the forms of `klrlhf dpo`. Where --setting needs some and none are
    given, pairs of pi0's responses are labelled."""

    split: str | None = None
    """Split of --data, where it has several."""
    prompts_split: str | None = None
    """Split of --prompts."""
    columns: Columns = field(default_factory=Columns)
    """What the columns of both are called."""
    chat: bool = False
    """Prompts that are text are a user's message, put in the tokenizer's chat template."""
    control_tokens: bool = False
    """Read control tokens such as ``<|im_end|>`` in the data's text as such, not as words."""
    max_prompt_length: int = 512
    """Tokens; a longer prompt loses its beginning."""
    max_response_length: int = 512
    """Tokens that are sampled at most; a longer response of --data loses its end."""
    stop: tuple[str, ...] | None = None
    """Tokens that end a response, or their ids; by default the end token, those that the model's
    generation_config.json lists, and the one with which its chat template closes a turn."""

    setting: Literal["offline", "online", "newest", "hybrid"] = "online"
    """Which data a round's policy learns from: the offline data alone, without rounds; all rounds'
    pairs; the last round's alone (an ablation); or offline data and all rounds'. --data, where
    given, make the policy that the first round begins with."""
    rounds: int = 3
    prompts_per_round: int | None = None
    """One portion of the prompts after the other, from the first again; all by default."""
    offline_prompts: int | None = None
    """Pairs of pi0 to label, where there is no --data: one of each of so many prompts; by default
    of every prompt."""
    offline_share: float | None = None
    """hybrid: share of every batch that offline data are given; by default all rows are alike."""
    newest_share: float | None = None
    """hybrid, with offline-share: share of the last round."""
    reference: Literal["pi0", "previous"] = "pi0"
    """Of the KL and its losses. `previous` is the ablation of arXiv 2409.02392."""
    start: Literal["reference", "pi0", "previous"] = "reference"
    """Where each fit begins."""
    kl_coef: float = 0.1
    """Strength of the KL regularization (eta of arXiv 2312.11456, beta of DPO)."""

    samples: int = 8
    """Responses of the main agent to each prompt."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    annotator: Annotator = Annotator()
    belief: Belief = Belief()
    pairs: Pairing = Pairing()
    improve: Improvement = field(default_factory=Improvement)
    fit: FitConfig = FitConfig()
    lora: Adapter = field(default_factory=Adapter)
    """Of the policy; a belief that is a reward model is trained whole."""

    held_out: int = 64
    """Prompts kept from learning, on which every round's policy is judged; 0 for none."""
    eval_samples: int = 4
    """Responses to each of them, at temperature 1."""
    best_of: int | None = None
    """Judge the best of so many responses of the last policy too, chosen by the belief."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; master parameters and moments are float32."""
    remat: str | None = defaults.REMAT
    """What the backward pass recomputes: full, a policy of jax.checkpoint_policies, or None."""
    rows: int = 64
    """Prompts answered, and comparisons scored, at one time."""
    mesh: MeshSizes = field(default_factory=MeshSizes)
    sampling_tensor: int | None = None
    """Devices that a copy of the weights is cut over while it is sampled from; the others have
    copies of their own. By default the fewest on which it is 4 GiB and a quarter of the memory at
    most; 0: where training has them, every layer gathered for every token."""
    processes: Processes = field(default_factory=Processes)
    compilation_cache: str = "auto"
    """Folder that keeps compiled programs for the next start; auto: one of the user's on
    accelerators, and none on a CPU; none."""
    seed: int = 0

    @property
    def recorded(self) -> bool:
        """Whether labels and responses are those of --data."""
        return self.reward == "recorded"

    @property
    def human(self) -> bool:
        """Whether people label."""
        return self.reward == "human"

    @property
    def draws(self) -> bool:
        """Whether the improvement draws responses of its own."""
        return self.improve.method in (*REJECTION, "weighted", *OWN_DRAWS)

    @property
    def draws_of_round(self) -> int:
        """How often a method on the policy's own draws draws in a round."""
        return self.improve.iterations or self.fit.steps


# What may change between a run and its continuation.
FREE = {"output", "rounds", "best_of", "mesh", "sampling_tensor", "processes", "compilation_cache"}

MANY = ("ensemble", "heads")
MODELS = ("reward-model", *MANY)
REJECTION = ("rso", "rejection")
ROUNDS = ("online", "newest", "hybrid")
# Option, its switch, and the values of the switch that read it.
_READ: Mapping[str, tuple[str, Sequence[Any]]] = {
    "annotator.tie": ("annotator.labels", ("drawn",)),
    "belief.model": ("belief.kind", ("given",)),
    "belief.members": ("belief.kind", MANY),
    "belief.combine": ("belief.kind", MANY),
    "belief.variance_coef": ("belief.combine", ("variance",)),
    "belief.steps": ("belief.kind", MODELS),
    "belief.learning_rate": ("belief.kind", MODELS),
    "belief.pooling": ("belief.kind", (*MODELS, "linear")),
    "belief.ridge": ("belief.kind", ("linear",)),
    "belief.radius": ("belief.kind", ("linear",)),
    "belief.bound": ("belief.kind", ("linear",)),
    "pairs.rule": ("setting", ROUNDS),
    "pairs.other": ("setting", ROUNDS),
    "pairs.temperature": ("pairs.other", ("pi0", "temperature", "earlier")),
    "pairs.samples": ("pairs.other", ("pi0", "temperature", "earlier")),
    "pairs.back": ("pairs.other", ("earlier",)),
    "pairs.first": ("pairs.rule", ("between",)),
    "pairs.second": ("pairs.rule", ("between",)),
    "improve.objective": ("improve.method", ("preference",)),
    "improve.options": ("improve.method", ("preference", *OWN_DRAWS)),
    "improve.iterations": ("improve.method", OWN_DRAWS),
    "improve.prompts": ("improve.method", OWN_DRAWS),
    "improve.informative_only": ("improve.method", OWN_DRAWS),
    "improve.importance_limit": ("improve.method", OWN_DRAWS),
    "improve.quantiles": ("improve.method", ("qrpo",)),
    "improve.chain": ("improve.method", REJECTION),
    "improve.proposals": ("improve.method", (*REJECTION, "weighted", *OWN_DRAWS)),
    "improve.reward_bound": ("improve.method", REJECTION),
    "improve.keep": ("improve.method", REJECTION),
    "improve.passes": ("improve.method", REJECTION),
    "improve.ranking": ("improve.method", ("rso",)),
    "improve.labels": ("improve.method", ("rso",)),
    "fit.weight_decay": ("fit.optimizer", ("adamw",)),
    "fit.moments": ("fit.optimizer", ("adamw",)),
    "offline_share": ("setting", ("hybrid",)),
    "newest_share": ("setting", ("hybrid",)),
    "offline_prompts": ("setting", ("offline", "hybrid")),
    "prompts_per_round": ("setting", ROUNDS),
    "rounds": ("setting", ROUNDS),
    "eval_samples": ("held_out", range(1, 10**9)),
    "best_of": ("held_out", range(1, 10**9)),
    "split": ("data", ()),
    "prompts_split": ("prompts", ()),
}
_POSITIVE = (
    "samples", "temperature", "top_k", "kl_coef", "rows", "eval_samples", "best_of",
    "prompts_per_round", "offline_prompts", "max_prompt_length", "max_response_length",
    "annotator.scale", "annotator.each", "belief.members", "belief.steps", "belief.learning_rate",
    "belief.ridge", "belief.radius", "belief.bound", "pairs.temperature", "pairs.samples",
    "improve.chain",
    "improve.proposals", "improve.keep", "improve.iterations", "improve.prompts",
    "improve.importance_limit", "improve.quantiles", "fit.steps", "fit.batch_size",
    "fit.micro_batches", "fit.learning_rate", "fit.save_every", "fit.log_every", "fit.clip",
    "fit.max_skipped",
)  # fmt: skip


def check(config: IterateConfig) -> None:
    """What no type says. Raises ``InputError`` naming the option."""
    for name in _POSITIVE:
        positive(name, _value(config, name))
    for name, (switch, values) in _READ.items():
        given = _value(config, switch)
        read = given in values if values else given is not None
        if not read and _value(config, name) != _default(name):
            raise InputError(
                f"{flag(name)} is read by no run with {flag(switch)} {given}; leave it out."
            )
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise InputError(f"--top-p is {config.top_p}; it is a probability in (0, 1].")
    if not 0 <= config.annotator.noise <= 0.5 or config.annotator.tie < 0:
        raise InputError("--annotator.noise lies in [0, 0.5] and --annotator.tie is at least 0.")
    if not 0 <= config.fit.warmup < 1:
        raise InputError(f"--fit.warmup is {config.fit.warmup}; it is a share in [0, 1).")
    if config.held_out < 0:
        raise InputError(f"--held-out is {config.held_out}; 0 is for none.")
    if config.pairs.back < 1:
        raise InputError(f"--pairs.back is {config.pairs.back}; it must be at least 1.")
    if config.setting != "offline" and config.rounds < 1:
        raise InputError(f"--rounds is {config.rounds}; --setting {config.setting} needs one.")
    for name in ("fit.weight_decay", "belief.variance_coef"):
        if not 0 <= _value(config, name) < math.inf:
            raise InputError(f"{flag(name)} is {_value(config, name)}; it is at least 0.")
    for name in ("belief.length_penalty", "improve.reward_bound"):
        if not math.isfinite(_value(config, name) or 0.0):
            raise InputError(f"{flag(name)} is {_value(config, name)}; it must be finite.")
    check_seed(config.seed)
    check_adapter(config.lora)
    _check_parts(config)
    _check_sources(config)
    if config.improve.method in OWN_DRAWS:
        from jax_klrlhf.programs import own_draws

        own_draws.check(config, kl_coef=_default("kl_coef"))
    if config.improve.method == "preference":
        from jax_klrlhf.programs.losses import objective

        objective(config.improve.objective, kl_coef=config.kl_coef, options=config.improve.options)


def _check_parts(config: IterateConfig) -> None:
    belief, pairs, improve = config.belief, config.pairs, config.improve
    if belief.kind == "given" and belief.model is None:
        raise InputError("--belief.kind given needs --belief.model, a trained reward model.")
    if belief.kind in MANY and belief.members < 2:
        raise InputError(f"--belief.members is {belief.members}; an ensemble has at least two.")
    if pairs.rule in ("most-uncertain", "enhancer") and belief.kind != "linear":
        raise InputError(
            f"--pairs.rule {pairs.rule} measures uncertainty in feature space: give "
            "--belief.kind linear."
        )
    if pairs.rule == "enhancer" and pairs.other != "none":
        raise InputError(
            "--pairs.rule enhancer tilts the main agent's own draws; leave out --pairs.other."
        )
    if pairs.rule == "between" and pairs.other == "none":
        raise InputError("--pairs.rule between needs a second agent; give --pairs.other.")
    if pairs.other == "temperature" and pairs.temperature is None:
        raise InputError("--pairs.other temperature needs --pairs.temperature.")
    proposals = improve.proposals or config.samples
    if improve.keep is not None and improve.keep > proposals:
        raise InputError(
            f"--improve.keep is {improve.keep}, of {proposals} proposals (--improve.proposals)."
        )
    if improve.passes == "until":
        if improve.keep is None:
            raise InputError("--improve.passes until needs --improve.keep: how many to go on for.")
        if improve.reward_bound is not None:
            raise InputError(
                "--improve.reward-bound: with --improve.passes until the largest reward that is "
                "left stands for it; leave it out."
            )
    if improve.method == "pessimistic" and belief.kind not in ("linear", *MANY):
        raise InputError(
            f"--improve.method pessimistic needs a belief that knows its uncertainty; "
            f"{belief.kind} does not: give --belief.kind linear, ensemble or heads."
        )
    if (
        config.samples != _default("samples")
        and not config.draws
        and (config.recorded or config.setting == "offline")
    ):
        raise InputError("--samples: no part of this run draws so many responses; leave it out.")
    total = config.samples + (0 if pairs.other == "none" else pairs.samples or config.samples)
    if total < 2:
        raise InputError("--samples is 1: a pair has two different responses; draw more.")
    if improve.keep is not None and improve.keep > (improve.proposals or config.samples):
        raise InputError(
            f"--improve.keep {improve.keep} is more than the "
            f"{improve.proposals or config.samples} proposals to a prompt."
        )
    if config.newest_share is not None and config.offline_share is None:
        raise InputError("--newest-share goes with --offline-share.")
    shares = (config.offline_share or 0.0, config.newest_share or 0.0)
    if min(shares) < 0 or sum(shares) > 1:
        raise InputError(f"--offline-share and --newest-share {shares}: in [0, 1], 1 in all.")


def _check_sources(config: IterateConfig) -> None:
    if config.prompts is None and config.data is None:
        raise InputError("--prompts is missing: a file of prompts to answer (or --data).")
    if config.data is not None and config.offline_prompts is not None:
        raise InputError("--offline-prompts: there is --data already; leave one of them out.")
    _check_annotator(config)
    if not config.recorded:
        return
    if config.data is None:
        raise InputError("--reward recorded needs --data, where the labels are.")
    if config.setting == "hybrid":
        raise InputError(
            "--reward recorded: --setting hybrid would have the labels of --data twice; give "
            "offline, which takes them all, or online, which asks for them a round at a time."
        )
    if config.belief.kind == "annotator":
        raise InputError("--belief.kind annotator: recorded labels have no reward to believe.")
    if config.pairs.other != "none" or config.prompts is not None:
        raise InputError(
            "--reward recorded: responses and prompts are those of --data; leave out "
            "--pairs.other and --prompts."
        )
    for name in ("temperature", "top_k", "top_p"):
        if not config.draws and _value(config, name) != _default(name):
            raise InputError(f"{flag(name)}: recorded responses are not sampled; leave it out.")


def _check_annotator(config: IterateConfig) -> None:
    """Options of labelling that nobody reads."""
    people = ("folder", "each")
    for field_of in dataclasses.fields(Annotator):
        if getattr(config.annotator, field_of.name) == field_of.default:
            continue
        if config.recorded:
            why = "recorded labels are taken as they are"
        elif config.human and field_of.name not in people:
            why = "people label as they like"
        elif not config.human and field_of.name in people:
            why = f"it is of people, who label where --reward is human, not {config.reward}"
        else:
            continue
        raise InputError(f"--annotator.{field_of.name}: {why}; leave it out.")
    if config.human and config.belief.kind == "annotator":
        raise InputError("--belief.kind annotator: people have no reward that could be believed.")


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _default(name: str) -> Any:
    kind: Any = IterateConfig
    *groups, last = name.split(".")
    for group in groups:
        kind = type(default_of(kind, group))
    return default_of(kind, last)
