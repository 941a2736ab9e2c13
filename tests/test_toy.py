"""The toy world: what its words mean, and that its prompts are names and verbs."""

import numpy as np

from jax_klrlhf import toy
from jax_klrlhf.training.rounds.parts import ragged


def test_gold_counts_happy_verbs_less_sad_ones_up_to_the_end():
    at = {word: number for number, word in enumerate(toy.WORDS)}
    rows = [["sang", "fell", "sang"], ["walked", "cried", "left"], ["danced", "<end>", "fell"]]
    ids = [[[at[word] for word in row]] for row in rows]
    found = toy.World.gold(None, ragged([[1]] * 3, [1] * 3), ragged(ids, [[3], [3], [2]]))
    np.testing.assert_array_equal(found, [[1.0], [-2.0], [1.0]])
    assert toy.decode(ids[2][0]) == "danced fell"
    prompts = toy.World.prompts(None, 500, seed=1)
    words = [toy.decode(row).split() for row in prompts.ids]
    assert all(name in toy.NAMES and verb not in toy.NAMES for name, verb in words)
    sad = np.mean([verb in toy.SAD for _, verb in words])
    # 15 of 33; a standard error is 0.022: five of them are passed once in two million seeds.
    assert abs(sad - 15 / 33) < 0.11
    np.testing.assert_array_equal(toy.World.prompts(None, 500, seed=1).ids, prompts.ids)
