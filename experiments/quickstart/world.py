"""What the practice panel happens in: a policy pi0, prompts, and a gold reward.

Either a real model, real stories and a reward fitted on real sentences, or the embedded default,
which trains its own small model on text from a grammar and reads nothing from outside.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from rich.progress import Progress

from experiments import gold, prompts
from experiments.quickstart import grammar
from jax_klrlhf import models
from jax_klrlhf.core import sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import tokenize
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model
from jax_klrlhf.training import Batch, make_step, state, tasks

VOCABULARY = 768
"""Largest vocabulary of the embedded default: every word of the grammar is one token."""
BATCH = 32
"""Stories in a step of maximum likelihood."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """A policy to align, the prompts it answers, and the judge."""

    name: str
    model: LanguageModel
    params: Any
    """pi0."""
    encoder: tokenize.Encoder
    gold: gold.WordReward
    prompts: list[str]
    pad_id: int

    def encode(self, texts: list[str]) -> Ragged:
        """Prompts as token ids ``[len(texts), P]``."""
        return sequence.pad([self.encoder.prompt(text) for text in texts], pad_id=self.pad_id)

    def reward(self, responses: Ragged) -> Float[np.ndarray, "B K"]:
        """Gold reward of every response ``[B, K]``, in nats."""
        return self.judged(responses, by=self.gold)

    def judged(
        self, responses: Ragged, *, by: Callable[[list[str]], np.ndarray]
    ) -> Float[np.ndarray, "B K"]:
        """The reward of every response's text."""
        ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
        texts = [
            self.encoder.decode(row[:length].tolist())
            for row, length in zip(ids.reshape(-1, ids.shape[-1]), lengths.reshape(-1), strict=True)
        ]
        return by(texts).reshape(lengths.shape)


def real(
    model: Path, prompt_file: Path, gold_folder: Path, *, judge: gold.WordReward | None = None
) -> World:
    """A pretrained model from a folder, first sentences of real stories, a fitted gold reward.

    ``judge`` is gold where it was fitted before.
    """
    reward = gold.fit_sentiment(gold_folder) if judge is None else judge
    sentences = prompts.first_sentences(prompt_file)
    loaded = models.load(model)
    pad_id = loaded.tokenizer.pad_token_id
    return World(
        name=model.name,
        model=loaded.model,
        params=loaded.params,
        encoder=tokenize.encoder(loaded.tokenizer),
        gold=reward,
        prompts=sentences,
        pad_id=0 if pad_id is None else pad_id,
    )


def embedded(*, stories: int, steps: int, progress: Progress) -> World:
    """A Llama-shaped model trained here, by maximum likelihood, on stories from the grammar."""
    rows = grammar.stories(stories, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenize.train_tokenizer(
            (prompt + response for prompt, response in rows), vocab_size=VOCABULARY, folder=folder
        )
    encoder = tokenize.encoder(tokenizer)
    # Openings of their own: pi0 has not seen the stories that it will be asked to tell.
    openings = {prompt for prompt, _ in rows}
    fresh = (prompt for prompt, _ in grammar.stories(4 * stories, seed=1))
    world = World(
        name="embedded",
        model=language_model(
            ModelConfig(
                vocab_size=encoder.vocab_size,
                hidden_size=64,
                intermediate_size=128,
                layers=2,
                heads=4,
                kv_heads=2,
                head_dim=16,
                max_length=96,
            )
        ),
        params=None,
        encoder=encoder,
        gold=grammar.gold_reward(),
        prompts=[prompt for prompt in dict.fromkeys(fresh) if prompt not in openings],
        pad_id=0,  # train_tokenizer puts its pad token first
    )
    params = _fit(world, rows, steps=steps, progress=progress)
    return dataclasses.replace(world, params=params)


def _fit(world: World, rows: list[tuple[str, str]], *, steps: int, progress: Progress) -> Any:
    """Maximum likelihood of the responses given their prompts."""
    questions = world.encode([prompt for prompt, _ in rows])
    answers = sequence.pad([world.encoder.response(text) for _, text in rows], pad_id=world.pad_id)
    answers = Ragged(answers.ids[:, None], answers.lengths[:, None])
    # On the host, where picking the rows of a step costs nothing.
    data = jax.tree.map(np.asarray, (questions, answers))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 8e-3, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    train_step = make_step(tasks.likelihood(world.model), optimizer)
    key_init, key_order = jax.random.split(jax.random.key(0))
    current = state.init(key_order, jax.jit(world.model.init)(key_init), optimizer)
    order = np.random.default_rng(0)
    bar = progress.add_task("pi0: maximum likelihood", total=steps)
    for _ in range(steps):
        chosen = order.choice(len(rows), BATCH, replace=False)
        picked = jax.tree.map(lambda x, at=chosen: x[at], data)
        batch = Batch(*picked, weight=jnp.ones(BATCH))
        current, _ = train_step(current, batch)
        progress.advance(bar)
    return current.policy
