"""A model of a few hundred parameters with stories for it, as folders on disk."""

from pathlib import Path

import jax

from experiments.quickstart import grammar
from jax_klrlhf import models
from jax_klrlhf.data import tokenize


def story_model(folder: Path) -> list[tuple[str, str]]:
    """``folder/model`` and ``folder/stories.txt``; returns the stories, prompt and rest."""
    rows = grammar.stories(60, seed=0)
    tokenizer = tokenize.train_tokenizer(
        (a + b for a, b in rows), vocab_size=300, folder=folder / "tokenizer"
    )
    config = models.ModelConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, layers=1, heads=2,
        kv_heads=2, head_dim=4, max_length=64,
    )  # fmt: skip
    params = models.language_model(config).init(jax.random.key(0))
    models.save(folder / "model", config, params, tokenizer)
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(a.strip() + b for a, b in rows))
    return rows
