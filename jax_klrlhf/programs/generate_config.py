"""Configuration of ``klrlhf generate``, and what no type says of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jax_klrlhf.columns import Columns
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs import options
from jax_klrlhf.programs.config import MeshSizes
from jax_klrlhf.programs.options import Count, Probability, Seed, Weight, flag


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answers of one or several policies to prompts.

    klrlhf generate --models run/model --text "Once upon a time"
    klrlhf generate --models MODEL run/model --prompts PROMPTS.txt --output answers.jsonl
    klrlhf generate --models CHAT_MODEL --chat

    A single answer appears as it is drawn. With --chat and no prompts a conversation begins: every
    line is a message, /new forgets what was said, and the end of input ends it.
    """

    models: tuple[str, ...]
    """Folders or hub ids; every one answers every prompt."""
    text: tuple[str, ...] = ()
    """Prompts."""
    prompts: str | None = None
    """Or a source of them, in the forms of `klrlhf iterate`."""
    split: str | None = None
    """Split of --prompts, where it has several."""
    columns: Columns = field(default_factory=Columns)
    """What its columns are called."""
    count: Count | None = None
    """The first so many prompts alone."""
    chat: bool = False
    """Prompts that are text are a user's message, put in the tokenizer's chat template."""
    output: Path | None = None
    """File of answers, a JSON object on each line: prompt, model, answers, tokens."""
    samples: Count = 1
    """Answers to each prompt."""
    temperature: Weight = 1.0
    """0: the likeliest token each time."""
    top_k: Count | None = None
    top_p: Probability | None = None
    max_prompt_length: Count = 512
    """Tokens; a longer prompt loses its beginning, a longer conversation its first turns."""
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
    weights: Literal["float", "int8"] = "float"
    """int8: eight bits with a scale for each output channel; half the memory of bfloat16."""
    kv: Literal["float", "int8"] = "float"
    """Keys and values of what was read and said; int8: with a scale for each head and position."""
    prefill_chunk: Count | None = None
    """Tokens of a prompt that are read at one time: less memory for long prompts."""
    mesh: MeshSizes = field(default_factory=MeshSizes)
    seed: Seed = 0


def check(config: GenerateConfig) -> None:
    """What no type says. Raises ``InputError`` naming the option."""
    if not config.models:
        raise InputError("--models is missing: a folder or hub id of a model that answers.")
    options.check(config)
    if config.temperature == 0:
        for name in ("top_k", "top_p"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"{flag(name)}: at --temperature 0 nothing is drawn; leave it out."
                )
        if config.samples > 1:
            raise InputError("--samples: at --temperature 0 all answers are one; leave it out.")
    if config.text and config.prompts is not None:
        raise InputError("--text and --prompts: prompts come from one of them.")
    if config.prompts is None and (config.split is not None or config.columns != Columns()):
        raise InputError("--split and --columns are of --prompts, which is not given.")
    if not config.text and config.prompts is None:
        if not config.chat:
            raise InputError("no prompt: give --text, --prompts, or --chat for a conversation.")
        for name in ("output", "count"):
            if getattr(config, name) is not None:
                raise InputError(f"{flag(name)}: a conversation has none; leave it out.")
        if len(config.models) > 1 or config.samples > 1:
            raise InputError("a conversation is with one of --models, one of --samples at a time.")
