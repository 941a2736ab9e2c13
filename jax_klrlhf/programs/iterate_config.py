"""Configuration of ``klrlhf iterate``, and what no type says of it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from jax_klrlhf import defaults
from jax_klrlhf.columns import Columns
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs import options
from jax_klrlhf.programs.belief_config import Belief, RewardModel
from jax_klrlhf.programs.config import (
    Adapter,
    MeshSizes,
    Processes,
    check_adapter,
    default_of,
)
from jax_klrlhf.programs.improvement_config import Drawing, Improvement, Preference
from jax_klrlhf.programs.options import (
    Count,
    Number,
    Probability,
    Seed,
    Share,
    Weight,
    When,
    flag,
    not_negative,
)

_IN_ROUNDS = When("setting", "online", "newest", "hybrid")
_ADAMW = When("fit.optimizer", "adamw")
_SECOND = When("pairs.other", "pi0", "temperature", "earlier")
_BETWEEN = When("pairs.rule", "between")


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Who labels pairs: Bradley-Terry on --reward, or people. Recorded labels are taken as they
    are."""

    labels: Literal["drawn", "expected"] = "drawn"
    """A preference drawn for each pair, or its probability as a soft label."""
    scale: Number = 1.0
    """What the reward is multiplied by; the higher, the surer the labels."""
    noise: float = 0.0
    """Rate at which a label is swapped."""
    tie: Annotated[float, When("annotator.labels", "drawn")] = 0.0
    """Width of a tie in nats of reward, of drawn labels."""
    folder: Path | None = None
    """people: where pairs wait for them; by default OUTPUT/labels."""
    each: Count = 1
    """people: how many are asked of each pair."""


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which two responses are compared, and who gives them besides the main agent."""

    rule: Annotated[
        Literal[
            "best-worst", "best-second", "best-random", "sampled", "first-round", "tournament",
            "most-uncertain", "enhancer", "between",
        ],
        _IN_ROUNDS,
    ] = "best-worst"  # fmt: skip
    """By believed reward: best-worst, best-second, best-random (two draws where it ranks none),
    first-round and tournament (several pairs a prompt); sampled: two draws. By the ellipsoid of a
    linear belief: most-uncertain, and enhancer, the main agent's draw against one tilted towards
    what is least known, within the KL budget. between: one response of the main agent, one of the
    second agent."""
    other: Annotated[Literal["none", "pi0", "temperature", "earlier"], _IN_ROUNDS] = "none"
    """A second agent that answers too: pi0, the main agent at another temperature, or the policy
    of pairs.back rounds before."""
    temperature: Annotated[Number | None, _SECOND] = None
    """Of the second agent; the main agent's by default."""
    back: Annotated[Count, When("pairs.other", "earlier")] = 1
    """earlier: rounds."""
    samples: Annotated[Count | None, _SECOND] = None
    """Responses of the second agent; as many as the main agent's by default."""
    first: Annotated[Literal["any", "best", "worst"], _BETWEEN] = "any"
    """between: which of the main agent's responses, by believed reward."""
    second: Annotated[Literal["any", "best", "worst"], _BETWEEN] = "any"
    """between: which of the second agent's."""

    def check(self, config: Any) -> None:
        """What no type says. Raises ``InputError``."""
        if self.rule in ("most-uncertain", "enhancer") and config.belief.kind != "linear":
            raise InputError(
                f"--pairs.rule {self.rule} measures uncertainty in feature space: give "
                "--belief.kind linear."
            )
        if self.rule == "enhancer" and self.other != "none":
            raise InputError(
                "--pairs.rule enhancer tilts the main agent's own draws; leave out --pairs.other."
            )
        if self.rule == "between" and self.other == "none":
            raise InputError("--pairs.rule between needs a second agent; give --pairs.other.")
        if self.other == "temperature" and self.temperature is None:
            raise InputError("--pairs.other temperature needs --pairs.temperature.")
        if config.samples + (0 if self.other == "none" else self.samples or config.samples) < 2:
            raise InputError("--samples is 1: a pair has two different responses; draw more.")

    def make(self, place: Any) -> Any:
        """The ``core.pairs.PairRule``."""
        from jax_klrlhf.core import pairs

        if self.rule == "enhancer":
            return pairs.enhancer(kl_coef=place.config.kl_coef)
        if self.rule == "between":
            picks = {"any": pairs.any_one, "best": pairs.best, "worst": pairs.worst}
            return pairs.between_agents(first=picks[self.first], second=picks[self.second])
        rule = getattr(pairs, self.rule.replace("-", "_"))
        # A belief that ranks nothing yet has no best; it begins with two draws.
        ranks = self.rule in ("best-worst", "best-second", "best-random")
        return pairs.otherwise(rule, pairs.sampled) if ranks else rule


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How the policy is fitted; the optimizer begins anew each round."""

    steps: Count = 100
    batch_size: Count = 64
    """Comparisons of a step, over all devices; of the belief's fits too."""
    micro_batches: Count = 1
    learning_rate: Number = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: Annotated[Weight, _ADAMW] = 0.0
    """Of adamw."""
    moments: Annotated[Literal["float32", "bfloat16"], _ADAMW] = "float32"
    """Of adamw, the first ones; the second, which change by a thousandth a step, stay float32."""
    clip: Number | None = 1.0
    """Largest norm of the gradient."""
    save_every: Count = 100
    """Steps between checkpoints inside a fit, from the last of which a killed one goes on."""
    max_skipped: Count = 5
    """Updates in a row whose loss or gradient is not finite: so many stop the run."""
    log_every: Count = 50


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

    split: Annotated[str | None, When("data")] = None
    """Split of --data, where it has several."""
    prompts_split: Annotated[str | None, When("prompts")] = None
    """Split of --prompts."""
    columns: Columns = field(default_factory=Columns)
    """What the columns of both are called."""
    chat: bool = False
    """Prompts that are text are a user's message, put in the tokenizer's chat template."""
    control_tokens: bool = False
    """Read control tokens such as ``<|im_end|>`` in the data's text as such, not as words."""
    max_prompt_length: Count = 512
    """Tokens; a longer prompt loses its beginning."""
    max_response_length: Count = 512
    """Tokens that are sampled at most; a longer response of --data loses its end."""
    stop: tuple[str, ...] | None = None
    """Tokens that end a response, or their ids; by default the end token, those that the model's
    generation_config.json lists, and the one with which its chat template closes a turn."""

    setting: Literal["offline", "online", "newest", "hybrid"] = "online"
    """Which data a round's policy learns from: the offline data alone, without rounds; all rounds'
    pairs; the last round's alone (an ablation); or offline data and all rounds'. --data, where
    given, make the policy that the first round begins with."""
    rounds: Annotated[int, _IN_ROUNDS] = 3
    prompts_per_round: Annotated[Count | None, _IN_ROUNDS] = None
    """One portion of the prompts after the other, from the first again; all by default."""
    offline_prompts: Annotated[Count | None, When("setting", "offline", "hybrid")] = None
    """Pairs of pi0 to label, where there is no --data: one of each of so many prompts; by default
    of every prompt."""
    offline_share: Annotated[float | None, When("setting", "hybrid")] = None
    """hybrid: share of every batch that offline data are given; by default all rows are alike."""
    newest_share: Annotated[float | None, When("setting", "hybrid")] = None
    """hybrid, with offline-share: share of the last round."""
    reference: Literal["pi0", "previous"] = "pi0"
    """Of the KL and its losses. `previous` is the ablation of arXiv 2409.02392."""
    start: Literal["reference", "pi0", "previous"] = "reference"
    """Where each fit begins."""
    kl_coef: Number = 0.1
    """Strength of the KL regularization (eta of arXiv 2312.11456, beta of DPO)."""

    samples: Count = 8
    """Responses of the main agent to each prompt."""
    temperature: Number = 1.0
    top_k: Count | None = None
    top_p: Probability | None = None

    annotator: Annotator = Annotator()
    belief: Belief = field(default_factory=RewardModel)
    pairs: Pairing = Pairing()
    improve: Improvement = field(default_factory=Preference)
    fit: FitConfig = FitConfig()
    lora: Adapter = field(default_factory=Adapter)
    """Of the policy; a belief that is a reward model is trained whole."""

    held_out: Annotated[int, not_negative] = 64
    """Prompts kept from learning, on which every round's policy is judged; 0 for none."""
    eval_samples: Annotated[Count, When("held_out")] = 4
    """Responses to each of them, at temperature 1."""
    best_of: Annotated[Count | None, When("held_out")] = None
    """Judge the best of so many responses of the last policy too, chosen by the belief."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; master parameters and moments are float32."""
    remat: str | None = defaults.REMAT
    """What the backward pass recomputes: full, a policy of jax.checkpoint_policies, or None."""
    rows: Count = 64
    """Prompts answered, and comparisons scored, at one time."""
    continuous: bool = False
    """As a prompt is answered the next one takes its place, instead of waiting for all of `rows`:
    for answers of very different lengths to many prompts."""
    mesh: MeshSizes = field(default_factory=MeshSizes)
    sampling_tensor: int | None = None
    """Devices that a copy of the weights is cut over while it is sampled from; the others have
    copies of their own. By default the fewest on which it is 4 GiB and a quarter of the memory at
    most; 0: where training has them, every layer gathered for every token."""
    sampling_weights: Literal["float", "int8"] = "float"
    """Of every policy that answers. int8: eight bits with a scale for each output channel, half of
    what bfloat16 moves, holds and reads. Responses are then the quantized policy's, and
    sampler_scorer_mismatch says how far it is from the one that is trained."""
    sampling_kv: Literal["float", "int8"] = "float"
    """Keys and values of what is sampled; int8: with a scale for each head and position."""
    sampling_prefill_chunk: Count | None = None
    """Tokens of a prompt that the sampler reads at one time: less memory for long prompts."""
    processes: Processes = field(default_factory=Processes)
    compilation_cache: str = "auto"
    """Folder that keeps compiled programs for the next start; auto: one of the user's on
    accelerators, and none on a CPU; none."""
    seed: Seed = 0

    @property
    def recorded(self) -> bool:
        """Whether labels and responses are those of --data."""
        return self.reward == "recorded"

    @property
    def human(self) -> bool:
        """Whether people label."""
        return self.reward == "human"


# What may change between a run and its continuation.
FREE = {"output", "rounds", "best_of", "mesh", "sampling_tensor", "processes", "compilation_cache"}


def check(config: IterateConfig) -> None:
    """What no type says. Raises ``InputError`` naming the option."""
    options.check(config)
    if not 0 <= config.annotator.noise <= 0.5 or config.annotator.tie < 0:
        raise InputError("--annotator.noise lies in [0, 0.5] and --annotator.tie is at least 0.")
    if config.setting != "offline" and config.rounds < 1:
        raise InputError(f"--rounds is {config.rounds}; --setting {config.setting} needs one.")
    check_adapter(config.lora)
    for part in (config.pairs, config.belief, config.improve):
        part.check(config)
    _check_sources(config)
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
    draws = isinstance(config.improve, Drawing)
    idle = not draws and (config.recorded or config.setting == "offline")
    if idle and config.samples != default_of(IterateConfig, "samples"):
        raise InputError("--samples: no part of this run draws so many responses; leave it out.")
    if not config.recorded:
        return
    if config.data is None:
        raise InputError("--reward recorded needs --data, where the labels are.")
    if config.setting == "hybrid":
        raise InputError(
            "--reward recorded: --setting hybrid would have the labels of --data twice; give "
            "offline, which takes them all, or online, which asks for them a round at a time."
        )
    if config.pairs.other != "none" or config.prompts is not None:
        raise InputError(
            "--reward recorded: responses and prompts are those of --data; leave out "
            "--pairs.other and --prompts."
        )
    for name in ("temperature", "top_k", "top_p"):
        if not draws and getattr(config, name) != default_of(IterateConfig, name):
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
