"""A toy world on which everything runs in seconds: three names, nine verbs, a small transformer.

A prompt is a name and what it did first, a response goes on with what it did then. pi0 is trained
on sentences in which sad things happen more often than happy ones; the gold reward counts happy
verbs less sad ones, and only the annotator knows it::

    world = toy.world()
    drawn = world.draw(4)(jax.random.key(0), world.pi0, world.prompts(64, seed=1))
    print(world.evaluate(world.pi0)["reward"])

Axes: ``B`` prompts of 2 tokens, ``K`` responses of at most 6.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float

from jax_klrlhf import models, training
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.results import Metric, mean
from jax_klrlhf.training import rounds
from jax_klrlhf.training.evaluate import kl_along
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import ragged

NAMES = ("Ana", "Ben", "Cleo")
HAPPY, PLAIN, SAD = (
    ("laughed", "danced", "sang"),
    ("walked", "waited", "slept"),
    ("cried", "fell", "left"),
)
WORDS = ("<end>", *NAMES, *HAPPY, *PLAIN, *SAD)
"""The vocabulary, by id."""
END, LONGEST = 0, 6
_WORTH = np.array([0] * 4 + [1] * 3 + [0] * 3 + [-1] * 3, np.float32)
_VERBS = np.array([2] * 3 + [4] * 3 + [5] * 3) / 33


@dataclass(frozen=True)
class World:
    """The model, pi0's parameters, and what can be asked of them."""

    model: LanguageModel
    pi0: Any

    def prompts(self, count: int, *, seed: int) -> Ragged:
        """``[count, 2]``, on the host."""
        return _stories(count, seed)[0]

    def draw(self, samples: int) -> rounds.Draw:
        """``draw(key, params, prompts)``: so many responses to each prompt."""
        return _draw(self.model, samples)

    def gold(self, prompts: Ragged, responses: Ragged) -> Float[np.ndarray, "B K"]:
        """Happy verbs less sad ones, in nats: a judge."""
        del prompts
        ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
        kept = np.arange(ids.shape[-1]) < lengths[..., None]
        return np.where(kept, _WORTH[ids], 0).sum(-1).astype(np.float32)

    def evaluate(self, params: Any, *, count: int = 256) -> dict[str, Metric]:
        """``reward`` (gold) and ``kl``, KL(pi || pi0) in nats, on held-out prompts, each with its
        standard error over prompts; every policy draws with the same key."""
        prompts = self.prompts(count, seed=1)
        said = self.draw(4)(jax.random.key(7), params, prompts)
        kl = _divergence(self.model)((params, self.pi0), prompts, said)
        return {
            "reward": mean(self.gold(prompts, said).mean(1)),
            "kl": mean(np.asarray(kl).mean(1)),
        }


def world(*, steps: int = 200) -> World:
    """The world, with a pi0 of so many training steps: the same one each time."""
    model = models.language_model(
        models.ModelConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            layers=1,
            heads=2,
            kv_heads=2,
            head_dim=16,
            max_length=16,
        )
    )
    questions, answers = _stories(1024, 0)
    optimizer = optax.adam(1e-2)
    step = training.make_step(training.tasks.likelihood(model), optimizer)
    carried = training.state.init(jax.random.key(0), model.init(jax.random.key(1)), optimizer)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        at = rng.choice(1024, 128, replace=False)
        picked = jax.tree.map(lambda x, at=at: x[at], (questions, answers))
        weight: Any = np.ones(128, np.float32)
        carried, _ = step(carried, training.Batch(*picked, weight=weight))
    return World(model, carried.policy)


def decode(ids: Any) -> str:
    """Text of token ids.

    >>> decode([1, 4, 0])
    'Ana laughed'
    """
    return " ".join(WORDS[int(i)] for i in ids if int(i) != END)


def _stories(count: int, seed: int) -> tuple[Ragged, Ragged]:
    rng = np.random.default_rng(seed)
    prompts = np.stack([rng.integers(1, 4, count), rng.choice(9, count, p=_VERBS) + 4], 1)
    length = rng.integers(2, LONGEST, count)
    words = rng.choice(9, (count, LONGEST), p=_VERBS) + 4
    words = np.where(np.arange(LONGEST) < length[:, None], words, END)
    return ragged(prompts, np.full(count, 2)), ragged(words[:, None], (length + 1)[:, None])


@cache
def _draw(model: LanguageModel, samples: int) -> rounds.Draw:
    """One for each number of samples, so that it is compiled once."""
    return rounds.Draw(model=model, samples=samples, max_new_tokens=LONGEST, stop=(END,), rows=256)


@cache
def _divergence(model: LanguageModel) -> Any:
    def divergence(both: Any, prompts: Ragged, responses: Ragged) -> Any:
        return kl_along(model, both[0], prompts, responses, reference=(model, both[1])).kl.sum(-1)

    return mapped(divergence, rows=256)
