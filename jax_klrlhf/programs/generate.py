"""``klrlhf generate``: what policies say to prompts, to the terminal and to a file; and to talk."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data.examples import Example
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import streaming
from jax_klrlhf.programs import policies
from jax_klrlhf.programs import run as runs
from jax_klrlhf.programs.generate_config import GenerateConfig, check
from jax_klrlhf.programs.policies import Asked, Policy, printable


def generate(config: GenerateConfig, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Print the answers, write them to ``output``, and return them; or hold a conversation.

    Raises:
        InputError: naming what is wrong with options, models or prompts.
    """
    check(config)
    console = console or Console()
    folders = {name: policies.folder_of(name) for name in config.models}
    contexts = {name: policies.context_of(folder) for name, folder in folders.items()}
    config = policies.within_context(config, contexts, console)
    mesh = runs.mesh_of(config.mesh)
    load = partial(
        policies.load, dtype=config.dtype, stop=config.stop, mesh=mesh, weights=config.weights,
        kv=config.kv, prefill_chunk=config.prefill_chunk,
    )  # fmt: skip
    key = jax.random.key(config.seed)
    if not config.text and config.prompts is None:
        converse(key, load(config.models[0]), config, console, lines=map(str.rstrip, sys.stdin))
        return []
    asked = _asked(config)
    file = None
    if config.output is not None:
        try:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            file = config.output.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{config.output}: cannot be written ({error.strerror}).") from None
    found = []
    try:
        for name in config.models:
            policy = load(name)
            prompts = policies.tokens_of(policy, asked, config)
            for record in _records(key, policy, asked, prompts, config, console, mesh):
                found.append(record)
                if file is not None:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
    finally:
        if file is not None:
            file.close()
    if config.output is not None:
        said = f"{len(found)} records in {config.output}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    return found


def _asked(config: GenerateConfig) -> list[Asked]:
    if config.prompts is not None:
        return policies.read_prompts(config.prompts, config, count=config.count)
    found = []
    for number, text in enumerate(config.text, 1):
        prompt: Any = [{"role": "user", "content": text}] if config.chat else text
        found.append(Asked(Example(prompt, [], [], where=f"--text {number}"), text))
    return found[: config.count]


def _records(
    key: Any,
    policy: Policy,
    asked: list[Asked],
    prompts: Ragged,
    config: GenerateConfig,
    console: Console,
    mesh: Any,
) -> Iterator[dict[str, Any]]:
    """An answer or several to each prompt, told as they come."""
    several = len(config.models) > 1
    if len(asked) == 1 and config.samples == 1 and mesh is None:
        row = np.asarray(prompts.ids)[0, : int(np.asarray(prompts.lengths)[0])].tolist()
        _tell(asked[0], policy if several else None, console)
        ids = _streamed(key, policy, row, config, _writer(console))
        yield _record(asked[0], policy, [policy.encoder.decode(ids)], [len(ids)])
        return
    responses = policies.answers(key, policy, prompts, config, mesh=mesh)
    lengths = np.asarray(responses.lengths).tolist()
    for prompt, said, counts in zip(asked, policies.texts(policy, responses), lengths, strict=True):
        _tell(prompt, policy if several else None, console)
        for text in said:
            console.print(printable(text.strip()), markup=False, highlight=False, soft_wrap=True)
        yield _record(prompt, policy, said, counts)


def _record(asked: Asked, policy: Policy, said: list[str], tokens: list[int]) -> dict[str, Any]:
    prompt = asked.example.prompt
    return {"prompt": prompt, "model": policy.name, "answers": said, "tokens": tokens}


def _tell(asked: Asked, policy: Policy | None, console: Console) -> None:
    whose = "" if policy is None else f"[{policy.name}] "
    said = f"\n> {whose}{printable(asked.text.strip())}"
    console.print(said, style="bold", markup=False, highlight=False, soft_wrap=True)


def _writer(console: Console) -> Callable[[str], None]:
    def write(text: str) -> None:
        console.file.write(printable(text))
        console.file.flush()

    return write


def _streamed(
    key: Any,
    policy: Policy,
    prompt: list[int],
    config: GenerateConfig,
    write: Callable[[str], None],
) -> list[int]:
    """Draw an answer and write its text as it grows; a line's end follows it."""
    ids: list[int] = []
    told = ""
    for token in streaming.stream(
        key,
        policy.loaded.model,
        policy.loaded.params,
        prompt,
        max_new_tokens=config.max_response_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop=policy.stop,
    ):
        ids.append(token)
        text = policy.encoder.decode(ids)
        # A character may be several tokens: what is not whole yet is held back.
        if text.startswith(told) and not text.endswith("\ufffd"):
            write(text[len(told) :])
            told = text
    rest = policy.encoder.decode(ids)
    write((rest[len(told) :] if rest.startswith(told) else "") + "\n")
    return ids


def converse(
    key: Any,
    policy: Policy,
    config: GenerateConfig,
    console: Console,
    *,
    lines: Iterator[str],
) -> list[dict[str, str]]:
    """A conversation by lines: ``/new`` begins again. Returns what was said since then."""
    turns: list[dict[str, str]] = []
    write = _writer(console)
    policy.encoder.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    console.print(f"{policy.name}: /new begins again, the end of input ends", markup=False)
    write("> ")
    for number, line in enumerate(lines):
        if line.strip() == "/new":
            turns = []
        elif line.strip():
            turns.append({"role": "user", "content": line.strip()})
            ids = policy.encoder.chat_prompt(turns)
            forgotten = 0
            while len(ids) > config.max_prompt_length and len(turns) > 1:
                turns = turns[2:]
                forgotten += 2
                ids = policy.encoder.chat_prompt(turns)
            if forgotten:
                write(f"({forgotten} turns no longer fit and are forgotten)\n")
            if len(ids) > config.max_prompt_length:
                write(f"(of {len(ids)} tokens at most {config.max_prompt_length} fit)\n")
                turns = []
            else:
                said = _streamed(jax.random.fold_in(key, number), policy, ids, config, write)
                turns.append({"role": "assistant", "content": policy.encoder.decode(said)})
        write("> ")
    write("\n")
    return turns


__all__ = ["GenerateConfig", "generate"]
