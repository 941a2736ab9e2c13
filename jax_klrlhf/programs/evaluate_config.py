"""Configuration of ``klrlhf eval``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jax_klrlhf.columns import Columns
from jax_klrlhf.programs.config import MeshSizes
from jax_klrlhf.programs.options import Count, Seed


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A policy against another: reward by a judge, win rate, KL, diversity, with standard errors.

    klrlhf eval --model run/model --against MODEL --prompts HELD_OUT.txt --reward SENTIMENT
    """

    model: str
    """Folder or hub id of the policy."""
    against: str
    """Of the policy that it is compared with: what it was trained from, say."""
    prompts: str
    """A source of prompts, in the forms of `klrlhf iterate`; best such as it has not learned on."""
    reward: str
    """The judge: folder or hub id of a reward model, or a folder with positive.txt and negative.txt
    on which one is fitted, or module:function of your own: reward(prompts, texts) with a number for
    each text."""
    proxy: str | None = None
    """A second reward, in the forms of --reward: the one that the policy was chosen or trained by.
    Says how far it was over-optimized, how often it ranks answers as the judge does, and how well
    it is calibrated."""
    output: Path | None = None
    """Folder for results.json and answers.jsonl: every prompt's answers, rewards, and KL, of each
    token too; `klrlhf report` shows them side by side."""
    split: str | None = None
    """Split of --prompts, where it has several."""
    columns: Columns = field(default_factory=Columns)
    """What its columns are called."""
    count: Count | None = 256
    """The first so many prompts."""
    chat: bool = False
    """Prompts that are text are a user's message, put in the tokenizer's chat template."""
    samples: Count = 4
    """Answers of each policy to each prompt, at temperature 1."""
    max_prompt_length: Count = 512
    """Tokens; a longer prompt loses its beginning."""
    max_response_length: Count = 256
    """Tokens of an answer at most."""
    stop: tuple[str, ...] | None = None
    """Tokens that end an answer, or their ids; by default as in `klrlhf iterate`."""
    rows: Count = 64
    """Prompts answered at one time."""
    continuous: bool = False
    """As a prompt is answered the next one takes its place, instead of waiting for all of `rows`:
    for answers of very different lengths to many prompts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshSizes = field(default_factory=MeshSizes)
    seed: Seed = 0
