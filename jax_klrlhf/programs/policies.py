"""Policies that answer prompts, for the programs that sample: loading, lengths, stop tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key
from rich.console import Console

from jax_klrlhf import models
from jax_klrlhf.core import sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import tokenize
from jax_klrlhf.data.examples import Example
from jax_klrlhf.data.rows import Row, encode
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained, stopping
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.programs.config import default_of
from jax_klrlhf.programs.rows import read_examples
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.parts import ragged

Config = TypeVar("Config")


class Policy(NamedTuple):
    """A model that answers."""

    name: str
    loaded: models.Loaded
    encoder: tokenize.Encoder
    stop: tuple[int, ...]


class Asked(NamedTuple):
    """A prompt: as it was given, and in words."""

    example: Example
    text: str


def folder_of(name: str) -> Path:
    """The folder of a model: its own, or the hub's copy."""
    return pretrained.find(Path(name).expanduser() if Path(name).expanduser().is_dir() else name)


def context_of(folder: Path) -> int:
    """Tokens of a model's context, from its config.json alone."""
    where = folder / "config.json"
    return ModelConfig.from_hf(pretrained.read_json(where), where=str(where)).max_length


def within_context(config: Config, contexts: Mapping[str, int], console: Console) -> Config:
    """Default lengths cut to the shortest context, and said.

    Raises:
        InputError: where lengths that were asked for exceed it.
    """
    names = ("max_prompt_length", "max_response_length")
    prompt, response = given = tuple(getattr(config, name) for name in names)
    model, most = min(contexts.items(), key=lambda item: item[1])
    if sum(given) <= most:
        return config
    free = [length == default_of(type(config), n) for n, length in zip(names, given, strict=True)]
    if free[1]:
        response = min(response, most // 2 if free[0] else most - prompt)
    if free[0]:
        prompt = min(prompt, most - response)
    if not any(free) or min(prompt, response) < 1:
        raise InputError(
            f"--max-prompt-length {given[0]} and --max-response-length {given[1]} exceed the "
            f"model's context of {most} tokens ({model}); lower one."
        )
    console.print(
        f"the model's context is {most} tokens: --max-prompt-length is {prompt}, "
        f"--max-response-length {response}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return dataclasses.replace(
        config,  # pyright: ignore[reportArgumentType]  # a dataclass, of whichever program
        max_prompt_length=prompt,
        max_response_length=response,
    )


def stop_of(given: Sequence[str] | None, tokenizer: Any, folder: Path) -> tuple[int, ...]:
    """Ids that end a response: those of --stop, else what the model's folder says.

    Raises ``InputError`` naming the word of --stop that is no token.
    """
    if given is not None:
        return stopping.read_stop(tokenizer, given)
    settings = pretrained.read_json(folder / "config.json")
    return models.stop_tokens(tokenizer, pretrained.generation_settings(folder, settings))


def load(
    name: str, *, dtype: str, stop: Sequence[str] | None, mesh: Mesh | None, **options: Any
) -> Policy:
    """A model to sample from; ``options`` are of :func:`models.load`.

    Raises:
        InputError: where there is none, or it has no tokenizer.
    """
    folder = folder_of(name)
    tokenizer = pretrained.load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{name}: the folder has no tokenizer, which prompts need.")
    kind = jnp.dtype(dtype)
    loaded = models.load(folder, mesh=mesh, param_dtype=kind, dtype=kind, **options)
    return Policy(name, loaded, tokenize.encoder(tokenizer), stop_of(stop, tokenizer, folder))


def read_prompts(source: str, config: Any, *, count: int | None) -> list[Asked]:
    """The prompts of a source, each once, in order.

    Raises:
        InputError: naming file, line and column; where there is no prompt.
    """
    found: dict[str, Asked] = {}
    for example in read_examples(source, config, split=config.split):
        if example.prompt is None:
            raise InputError(f"{example.where}: no prompt column; name yours with --columns.prompt")
        text = _words(example.prompt)
        found.setdefault(text, Asked(example._replace(responses=[], scores=[]), text))
        if count is not None and len(found) == count:
            break
    if not found:
        raise InputError(f"{source}: no prompt in it.")
    return list(found.values())


def _words(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], int):
        return " ".join(map(str, prompt))
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def tokens_of(policy: Policy, asked: Sequence[Asked], config: Any) -> Ragged:
    """Prompts ``[B, P]`` in a policy's own tokens; the longest lose their beginning.

    Raises:
        InputError: naming a prompt that has no token.
    """
    rows = []
    for row in encode(
        policy.encoder,
        (prompt.example for prompt in asked),
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
    ):
        if not isinstance(row, Row):
            raise InputError(f"{row.where}: {row.reason}; leave this prompt out.")
        rows.append(row.prompt)
    return ragged(*sequence.pad(rows, length=-(-max(map(len, rows)) // 8) * 8))


def answers(
    key: Key[Array, ""],
    policy: Policy,
    prompts: Ragged,
    config: Any,
    *,
    mesh: Mesh | None,
    plain: bool = False,
) -> Ragged:
    """``config.samples`` responses to each prompt ``[B, K, C]``; ``plain``: of the policy itself,
    at temperature 1 and without cuts."""
    draw = rounds.Draw(
        model=policy.loaded.model,
        samples=config.samples,
        max_new_tokens=config.max_response_length,
        stop=policy.stop,
        temperature=1.0 if plain else config.temperature,
        top_k=None if plain else config.top_k,
        top_p=None if plain else config.top_p,
        rows=config.rows,
        continuous=config.continuous,
        mesh=mesh,
    )
    return draw(key, policy.loaded.params, prompts)


def texts(policy: Policy, responses: Ragged) -> list[list[str]]:
    """Text of every response ``[B, K]``, special tokens left out."""
    ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
    return [
        [policy.encoder.decode(row[:n].tolist()) for row, n in zip(rows, counts, strict=True)]
        for rows, counts in zip(ids, lengths, strict=True)
    ]


def printable(text: str) -> str:
    """Text of a model for a terminal: no control character of its own, and so no escape, in it."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
