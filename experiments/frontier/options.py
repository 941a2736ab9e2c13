"""What is compared, and how large everything is."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.frontier import methods
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is; a folder of results goes on only with the same sizes."""

    labels: int = 2304
    """Label budget of every method, a multiple of twice the rounds."""
    rounds: int = 3
    """Of the online and hybrid methods, and steps of multi-step RSO."""
    train_prompts: int = 768
    held_out_prompts: int = 384
    """As many out-of-distribution prompts are judged."""
    max_prompt_tokens: int = 32
    """Longer prompts are left out."""
    new_tokens: int = 32
    """Longest response."""
    explore: int = 8
    """Responses of which online methods compare the best and the worst."""
    propose: int = 6
    """Proposals at a prompt in each step of multi-step RSO; RSO draws all of them in one."""
    eval_samples: int = 4
    """Responses to each prompt that a policy is judged by."""
    steps: int = 48
    """Optimizer steps of a fit; a multi-step chain has them in total."""
    batch: int = 48
    """Pairs in a step."""
    gold_scale: float = 4.0
    """Nats of the annotator's logit to a nat of the fitted gold reward."""
    tokens: int = 512
    """Of pi0's most frequent tokens the proxy counts this many."""
    hidden: bool = False
    """The proxy looks at pi0's hidden states too: a little better, and several times slower."""
    ridge: float = 1.0
    """Of the proxy and of its ellipsoid."""
    radius: float = 2.0
    """beta: at 2 the uncertainty is about a posterior standard deviation of the proxy."""
    stories: int = 4000
    """Embedded default: stories that pi0 is trained on."""
    sft_steps: int = 400
    """Embedded default: optimizer steps that make pi0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Run every cell that is not on disk yet; without files an embedded world is used."""

    model: Path | None = None
    """Folder of a pretrained model in Hugging Face's format (safetensors and tokenizer)."""
    prompts: Path | None = None
    """Text file of stories; the first sentence of each is a prompt."""
    gold: Path | None = None
    """Folder with positive.txt and negative.txt, on which the gold reward is fitted."""
    ood: Path | None = None
    """Prompts of another source: a JSON list of records, or a text file of lines."""
    ood_column: str = "instruction"
    """Where the prompt of a record is."""
    output: Path = Path("results/frontier")
    """Where cells, results.json, the figures and report.html go; started again, a run goes on."""
    minutes: float | None = None
    """Begin no cell after so many minutes and report on what there is; a later run goes on."""
    seeds: int = 5
    first_seed: int = 0
    """The first of them: a pilot takes one that no statement is judged by."""
    workers: int = 1
    """Processes that seeds are divided over, each on its share of the cores: the model is so small
    that cores do more apart than together. CPU only, and with files only."""
    proxy: Literal["linear", "reward-model"] = "linear"
    """What the learners' reward is: linear on frozen features, or all of pi0 with a head."""
    methods: tuple[str, ...] = methods.DEFAULT
    """Methods with a coefficient; pi0 and best-of-n are always there."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Learning rates: each method takes the one of the least training loss at the end of its last
    fit, at its middle coefficient, on a seed that is judged by nothing. One rate needs no such
    pilot."""
    coefficients: tuple[float, ...] = (4.0, 1.5, 0.4, 0.1)
    """kl_coef of the sweep."""
    rejection_coefficients: tuple[float, ...] = (4.0, 1.5, 0.6)
    """kl_coef of RSO and multi-step RSO: at smaller ones hardly a proposal is accepted, and the few
    pairs that are left differ so little that their labels are a coin's."""
    rejection_labels: Literal["expected", "drawn", "order"] = "order"
    """What the pairs that RSO and multi-step RSO accept are labelled by, all by the proxy: the
    Bradley-Terry probability, a draw from it, or which reward is the higher."""
    best_of: tuple[int, ...] = (2, 4, 8, 16)
    small: bool = False
    """A run of a few minutes: other sizes, at most two seeds, two coefficients."""
    sizes: Sizes = dataclasses.field(default_factory=Sizes)

    def resized(self) -> "Config":
        """This, or the sizes of ``--small`` if it was asked for."""
        if not self.small:
            return self
        sizes = self.sizes
        return dataclasses.replace(
            self,
            seeds=min(self.seeds, 2),
            rates=(3e-4, 1e-3),
            coefficients=(0.4, 0.1),
            rejection_coefficients=(1.5, 0.6),
            best_of=(4,),
            sizes=dataclasses.replace(
                sizes, labels=192, train_prompts=64, held_out_prompts=64, steps=15, batch=32,
                # As many draws as a policy is judged by: one program less to compile for each.
                explore=sizes.eval_samples, propose=sizes.eval_samples, stories=1500, sft_steps=150,
            ),
        )  # fmt: skip

    def sweeps(self) -> dict[str, tuple[float, ...]]:
        """The coefficients of each method."""
        return {
            method: self.rejection_coefficients if "RSO" in method else self.coefficients
            for method in self.methods
        }

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        given = {
            "--model": self.model,
            "--prompts": self.prompts,
            "--gold": self.gold,
            "--ood": self.ood,
        }
        missing = [flag for flag, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise InputError(
                f"{', '.join(missing)} missing: --model, --prompts, --gold and --ood go together; "
                "give all four for a real model, or none for the embedded default."
            )
        unknown = sorted(set(self.methods) - set(methods.METHODS))
        if unknown:
            raise InputError(
                f"--methods {', '.join(unknown)}: choose from {', '.join(methods.METHODS)}."
            )
        asking = [m for m in self.methods if methods.METHODS[m].uncertainty]
        if self.proxy == "reward-model" and asking:
            raise InputError(
                f"--proxy reward-model has no uncertainty, which {', '.join(asking)} ask for: name "
                "the others with --methods, or take --proxy linear."
            )
        sizes = self.sizes
        if sizes.rounds < 1 or sizes.labels < 1 or sizes.labels % (2 * sizes.rounds):
            raise InputError(
                f"--sizes.labels {sizes.labels}: must be a multiple of twice the rounds, "
                f"{2 * sizes.rounds}, so that every round gets an equal part."
            )
        if sizes.steps < sizes.rounds:
            raise InputError(
                f"--sizes.steps {sizes.steps}: fewer than the {sizes.rounds} steps of the chain."
            )
        sweep = [*self.coefficients, *self.rejection_coefficients]
        if self.seeds < 1 or not self.coefficients or min(sweep) <= 0:
            raise InputError("--seeds must be at least 1 and every --coefficients positive.")
        if not self.rates or min(self.rates) <= 0:
            raise InputError("--rates: positive numbers.")
        if self.first_seed < 0:
            raise InputError(f"--first-seed {self.first_seed}: must be at least 0.")
        if self.workers < 1:
            raise InputError(f"--workers {self.workers}: must be at least 1.")
        if self.workers > 1 and missing:
            raise InputError(
                f"--workers {self.workers} needs --model, --prompts, --gold and --ood: every "
                "process would train the embedded model for itself, and not to the same bit."
            )
        if self.minutes is not None and self.minutes <= 0:
            raise InputError("--minutes must be positive.")
        if any(n < 2 for n in self.best_of):
            raise InputError("--best-of: every n must be at least 2; 1 is pi0.")
