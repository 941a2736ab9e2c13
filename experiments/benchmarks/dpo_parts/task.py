"""What all contenders are given: one model, the same pairs of token ids, our batches of them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.dpo_parts.options import Config
from jax_klrlhf import models
from jax_klrlhf.data import packing, prepare, tokenize
from jax_klrlhf.data.packing import PackedLoader
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.data.sources import open_source
from jax_klrlhf.errors import InputError
from jax_klrlhf.models.config import Rope

THETA = 1_000_000.0
"""RoPE's base: the only one that tunix's Llama has, whatever its configuration says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all contenders are given."""

    model: Path
    pairs: list[list[list[int]]]
    """Prompt, chosen and rejected ids."""
    batches: Sequence[tuple[Sequence[Any], list[int]]]
    """Layouts and rows of our batches."""
    check: list[list[list[int]]]
    useful: int
    """Tokens of the pairs, each prompt once."""
    padding: tuple[float, float]
    """Padding fraction of a whole epoch of ours, packed and in as many padded shapes."""


def prepare_task(config: Config, work: Path) -> Task:
    """Tokenizer, token ids, model and batches, all from the data and fixed seeds."""
    source = open_source(str(config.data))
    # Prompt and responses one by one, which is how rows are encoded.
    texts = [
        text
        for example in source.examples()
        for text in (example.prompt, *example.responses)
        if isinstance(text, str)
    ]
    tokenizer = tokenize.train_tokenizer(
        texts, vocab_size=config.vocab_size, folder=work / "tokenizer"
    )
    data = prepare.build(
        str(config.data),
        tokenizer,
        work / "data",
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
    )["train"]
    if data.responses != 2:
        raise InputError(f"{config.data}: {data.responses} responses to a prompt; pairs are wanted")
    settings: dict[str, Any] = {
        "token_budget": config.token_budget,
        "max_shapes": config.max_shapes,
    }
    # A rectangle for each shape: attention then wastes least, which is what a CPU spends most on.
    layouts = packing.fit(data.lengths, **settings, rectangles=config.max_shapes)
    loader = PackedLoader(data.fetch, data.lengths, layouts=layouts, seed=0)
    padded = data.loader(seed=0, **settings).padding_fraction
    pieces = sorted(loader.epoch(0), key=lambda piece: piece[0].groups[0].row_slots)
    count = min(config.batches, len(pieces))
    # Every n-th of the batches in order of shape: a small epoch of the same make-up.
    taken = [pieces[math.floor((k + 0.5) * len(pieces) / count)] for k in range(count)]
    taken = [(layout, streams[streams >= 0]) for layout, streams in taken]
    rows = np.random.default_rng(0).permutation(np.concatenate([held for _, held in taken]))
    place = {int(row): number for number, row in enumerate(rows)}
    held = [
        ((tuple(layout.groups[0]), layout.tokens, layout.answers), [place[int(n)] for n in numbers])
        for layout, numbers in taken
    ]
    used = data.lengths.prompts[rows].sum() + data.lengths.responses[rows].sum()
    model = models.ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_length=config.max_prompt_length + config.max_response_length,
        tied=False,
        ropes=(Rope(theta=THETA),),
    )
    params = jax.jit(models.language_model(model).init)(jax.random.key(0))
    folder = models.save(work / "model", model, params, tokenizer)
    return Task(
        model=folder,
        pairs=_ids(data, rows),
        batches=held,
        check=_ids(data, _short(data, config)),
        useful=int(used),
        padding=(loader.padding_fraction, padded),
    )


def _short(data: Prepared, config: Config) -> np.ndarray:
    """Rows for the check: drawn from the shorter half, where all steps are quick."""
    longest = data.lengths.prompts + data.lengths.longest
    half = np.argsort(longest, kind="stable")[: max(1, len(longest) // 2)]
    drawn = np.random.default_rng(1).permutation(half)
    return np.resize(drawn, config.check_steps * config.batch_size)


def _ids(data: Prepared, rows: np.ndarray) -> list[list[list[int]]]:
    return [[row.prompt, *row.responses] for row in data.fetch(rows.tolist())]
