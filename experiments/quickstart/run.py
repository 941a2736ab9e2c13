"""The main job: preference learning under a KL constraint, once exactly and once on a model.

Two panels, one core. The theory panel runs the paper's algorithms on a linear bandit whose pi0
covers the optimum poorly, and on real human choices; the practice panel aligns a language model
to a gold reward, offline and then online. Source: Xiong et al., arXiv 2312.11456.
"""

import dataclasses
import sys
from pathlib import Path

from rich.console import Console

from experiments import study
from experiments.progress import Told
from experiments.quickstart import practice, theory, world
from experiments.quickstart.practice import Config as PracticeConfig
from experiments.quickstart.theory import Config as TheoryConfig
from jax_klrlhf import results
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Run both panels; without --model, --prompts and --gold nothing is read from outside."""

    model: Path | None = None
    """Folder of a pretrained model in Hugging Face's format (safetensors and tokenizer)."""
    prompts: Path | None = None
    """Text file of stories; the first sentence of each is a prompt."""
    gold: Path | None = None
    """Folder with positive.txt and negative.txt, on which the gold reward is fitted."""
    choices: Path | None = None
    """Human A/B choices (.npz with xa, xb, y, user), added to the theory panel."""
    output: Path = Path("results/quickstart")
    """Where results.json and the figures go."""
    panels: tuple[str, ...] = ("theory", "practice")
    """Which panels to run."""
    seeds: int = 3
    """Independent repetitions of the practice panel."""
    theory: TheoryConfig = dataclasses.field(default_factory=TheoryConfig)
    practice: PracticeConfig = dataclasses.field(default_factory=PracticeConfig)

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        given = {"--model": self.model, "--prompts": self.prompts, "--gold": self.gold}
        missing = [flag for flag, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise InputError(
                f"{', '.join(missing)} missing: --model, --prompts and --gold go together; give "
                "all three for a real model, or none for the embedded default."
            )
        unknown = sorted(set(self.panels) - {"theory", "practice"})
        if unknown or not self.panels:
            raise InputError(f"--panels {' '.join(unknown)}: choose from theory and practice.")
        if self.seeds < 1:
            raise InputError(f"--seeds {self.seeds}: at least one seed is needed.")


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the panels and return the path of ``results.json``."""
    here = study.begin("quickstart", config, console=console)
    config, console = here.config, here.console
    # Whatever reads a file runs before anything that computes.
    choices = theory.load_choices(config.choices) if config.choices else None
    place = None
    if "practice" in config.panels and config.model and config.prompts and config.gold:
        place = world.real(config.model, config.prompts, config.gold)
        practice.check(config.practice, place)
    metrics: dict[str, results.Metric] = {}
    with Told(console) as progress:
        shared = {"output": here.output, "console": console, "progress": progress}
        if "theory" in config.panels:
            metrics |= theory.run(config.theory, choices, **shared)
        if "practice" in config.panels:
            if place is None:
                place = world.embedded(
                    stories=config.practice.stories,
                    steps=config.practice.sft_steps,
                    progress=progress,
                )
                practice.check(config.practice, place)
            metrics |= practice.run(config.practice, place, seeds=range(config.seeds), **shared)
    return here.end(metrics, seeds=range(config.seeds))


EMBEDDED = Config(
    seeds=3,
    theory=TheoryConfig(seeds=64),
    practice=PracticeConfig(
        train_prompts=256,
        held_out_prompts=128,
        new_tokens=40,
        pair_samples=8,
        eval_samples=8,
        learning_rate=1e-3,
        steps=32,
        batch=32,
        evaluations=2,
        stories=2000,
        sft_steps=200,
    ),
)
"""Sizes of the embedded default, for two minutes on two cores."""


def _default() -> Config:
    """Sizes that are not given are those of a real model where one is named, else EMBEDDED's."""
    real = any(argument.split("=")[0] == "--model" for argument in sys.argv[1:])
    return Config() if real else EMBEDDED


cli = study.entry(main, Config, __doc__, default=_default)
