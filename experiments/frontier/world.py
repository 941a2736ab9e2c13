"""Where the comparison happens: a policy, three kinds of prompts, and a gold reward.

Prompts to learn on and prompts to be judged on come from one source (stories), and a third set from
another (instructions, say): the out-of-distribution prompts, which no method sees before it is
judged. The gold reward belongs to the annotator: learners see its Bradley-Terry labels alone.

Without files everything is embedded: a small model trained here on the quickstart's grammar, and
openings that the grammar never makes as the other source.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.progress import Progress

from experiments import prompts
from experiments.frontier.judges import Judge
from experiments.gold import WordReward
from experiments.quickstart import world as worlds
from jax_klrlhf.core import sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.training.rounds.parts import ragged

# Words of the grammar's stories in a sentence that it does not make.
_OTHER = (
    "One day a {trait} {kind} came to the {place} with a {thing}.",
    "Look at the {thing}, said the {trait} {kind}.",
    "Every {kind} in the {place} was {trait}.",
    "It was time for a {trait} {thing} in the {place}.",
)
_WORDS = {
    "trait": ("small", "tall", "young", "old", "quiet", "busy", "clever", "sleepy"),
    "kind": ("fox", "bear", "girl", "boy", "cat", "robot", "owl", "mouse", "king", "baker"),
    "place": ("forest", "village", "garden", "castle", "harbour", "city", "valley", "school"),
    "thing": ("ball", "cake", "kite", "book", "boat", "lamp", "song", "drum", "coat", "map"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A world and its prompts, all of one width so that every program is compiled once."""

    world: worlds.World
    """pi0, tokenizer, story prompts and gold reward."""
    other: list[str]
    """Prompts of another source."""
    second: Judge | None
    """Another judge, of texts; None in the embedded world."""
    accuracy: tuple[float, float] | None
    """Of gold and of the second judge, each on the other's sentences."""
    width: int
    """Positions of every prompt row."""

    def encode(self, texts: list[str]) -> Ragged:
        """Prompts ``[len(texts), width]`` on the host."""
        rows = [self.world.encoder.prompt(text) for text in texts]
        return ragged(*sequence.pad(rows, length=self.width, pad_id=self.world.pad_id))

    def judge(self, asked: Ragged, responses: Ragged) -> Float[np.ndarray, "B K"]:
        """Gold reward, nats. It goes to the oracle and to the evaluation, never to a learner."""
        del asked
        return self.world.reward(responses)

    def judge_again(self, asked: Ragged, responses: Ragged) -> Float[np.ndarray, "B K"]:
        """By the second judge, to the evaluation alone; NaN where there is none."""
        del asked
        if self.second is None:
            return np.full(np.asarray(responses.lengths).shape, np.nan)
        return self.world.judged(responses, by=self.second)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One seed's prompts."""

    train: Ragged
    held_out: Ragged
    ood: Ragged


def build(
    world: worlds.World,
    other: list[str],
    *,
    gold_scale: float,
    max_prompt_tokens: int,
    second: Judge | None = None,
    accuracy: tuple[float, float] | None = None,
) -> Place:
    """Scale both judges' rewards and leave out prompts that are too long.

    Raises:
        InputError: where no prompt of one of the sources is short enough.
    """
    gold = WordReward({word: gold_scale * w for word, w in world.gold.weights.items()})
    kept = []
    for name, texts in (("--prompts", world.prompts), ("--ood", other)):
        short = [t for t in texts if len(world.encoder.prompt(t)) <= max_prompt_tokens]
        if not short:
            raise InputError(
                f"{name}: none of {len(texts)} prompts has at most {max_prompt_tokens} tokens; "
                "raise --sizes.max-prompt-tokens or give shorter prompts."
            )
        kept.append(short)
    stories, rest = kept
    longest = max(len(world.encoder.prompt(text)) for text in stories + rest)
    return Place(
        world=dataclasses.replace(world, gold=gold, prompts=stories),
        other=rest,
        accuracy=accuracy,
        second=None if second is None else lambda texts: gold_scale * second(texts),
        width=-(-longest // 8) * 8,
    )


def split(place: Place, *, train: int, held_out: int, seed: int) -> Split:
    """Disjoint random train and held-out prompts, and ``held_out`` of the other source.

    Raises:
        InputError: where there are too few prompts.
    """
    learn, judge = prompts.split(place.world.prompts, train=train, held_out=held_out, seed=seed)
    if len(place.other) < held_out:
        raise InputError(
            f"{len(place.other)} out-of-distribution prompts are short enough, {held_out} are "
            "asked for: give more, or lower --sizes.held-out-prompts."
        )
    order = np.random.default_rng([seed, 1]).permutation(len(place.other))[:held_out]
    return Split(
        train=place.encode(learn),
        held_out=place.encode(judge),
        ood=place.encode([place.other[i] for i in order]),
    )


def embedded(*, stories: int, steps: int, progress: Progress) -> tuple[worlds.World, list[str]]:
    """The quickstart's own model and prompts, and openings of another form."""
    world = worlds.embedded(stories=stories, steps=steps, progress=progress)
    draw = random.Random(2)
    found = (
        draw.choice(_OTHER).format(**{name: draw.choice(words) for name, words in _WORDS.items()})
        for _ in range(2 * stories)
    )
    return world, list(dict.fromkeys(found))


def other_prompts(path: Path, *, column: str) -> list[str]:
    """Distinct prompts of a JSON list of records (``column`` of each) or of a text file's lines.

    Each ends with one space, because tokens of many tokenizers carry theirs.

    Raises:
        InputError: where the file is missing, is not of that form, or holds no prompt.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; --ood takes a JSON list or a text file.")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        rows: Any = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} is not JSON ({error.msg}).") from None
    if path.suffix == ".json":
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: not a list of records; give one, or a text file.")
        missing = [n for n, row in enumerate(rows) if not isinstance(row.get(column), str)]
        if missing:
            raise InputError(
                f"{path}: record {missing[0]} has no text in column {column}; name another with "
                "--ood-column."
            )
        rows = [row[column] for row in rows]
    found = [" ".join(row.split()) + " " for row in rows if row.strip()]
    if not found:
        raise InputError(f"{path}: no prompt in it; put one on each line.")
    return list(dict.fromkeys(found))
