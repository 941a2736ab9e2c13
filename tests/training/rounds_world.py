"""A world small enough to run many rounds in: a toy model, a rule as gold reward, fixed sizes."""

import jax
import numpy as np
import optax

from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.parts import ragged
from tests.models import toy

VOCAB, LENGTH, STOP = 5, 3, 0
MODEL = toy.language_model(vocab=VOCAB)
PARAMS = MODEL.init(jax.random.key(0))
PROMPTS = ragged([[1, 2], [2, 0], [3, 3], [4, 1], [1, 1], [2, 4]], [2, 1, 2, 2, 2, 2])
KL_COEF = 0.5
WORTH = np.array([0.0, 1.0, -1.0, 0.5, -0.5], np.float32)


def gold(prompts, responses):
    """Sum of token worths, so that a policy can learn it."""
    del prompts
    ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
    keep = np.arange(ids.shape[-1]) < lengths[..., None]
    return np.where(keep, WORTH[ids], 0.0).sum(-1).astype(np.float32)


def counts(prompts, responses):
    """Features in which the gold reward is linear: token counts over the longest length."""
    del prompts
    ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
    keep = np.arange(ids.shape[-1]) < lengths[..., None]
    hot = (ids[..., None] == np.arange(VOCAB)) & keep[..., None]
    return hot.sum(-2).astype(np.float32) / LENGTH


DRAW = rounds.Draw(model=MODEL, samples=4, max_new_tokens=LENGTH, stop=(STOP,), rows=4)
FITTING = rounds.Fitting(optimizer=optax.adam(0.02), steps=6, batch_size=8)


def policies(current=None, *earlier):
    current = PARAMS if current is None else current
    return rounds.Policies(current, PARAMS, PARAMS, (PARAMS, *earlier))


def drawn(key=1, sampler=None):
    sampler = sampler or rounds.main_agent(DRAW)
    return sampler(jax.random.key(key), policies(), PROMPTS)
