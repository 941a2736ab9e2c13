"""A linear belief is factorized once for all the batches that it scores."""

import jax
import numpy as np

from jax_klrlhf.core import ellipsoid
from jax_klrlhf.training.rounds import features
from jax_klrlhf.training.rounds.parts import ragged
from tests.training import rounds_world as world


def test_a_belief_is_factorized_once_and_scores_as_the_ellipsoid_does(monkeypatch):
    calls = []

    def counted(state):
        calls.append(1)
        return ellipsoid.factor(state)

    monkeypatch.setattr(features, "_factor", counted)
    belief = features.linear(world.counts, dim=world.VOCAB, ridge=0.5, radius=2.0)
    directions = jax.random.normal(jax.random.key(0), (7, world.VOCAB))
    state = ellipsoid.update(belief.init.ellipsoid, directions)
    other = ellipsoid.update(state, directions)
    rng = np.random.default_rng(0)
    responses = ragged(rng.integers(1, 5, (6, 4, 3)), np.full((6, 4), 3))
    for number, one in enumerate((state, other), start=1):
        held = belief.init._replace(ellipsoid=one)
        for _ in range(3):
            scored = belief.score(held, world.policies(), world.PROMPTS, responses)
        phi = world.counts(world.PROMPTS, responses)
        inverse = np.linalg.inv(np.asarray(one.precision, np.float64))
        wanted = 2.0 * np.sqrt(np.einsum("bkd,de,bke->bk", phi, inverse, phi))
        np.testing.assert_allclose(scored.uncertainty, wanted, rtol=1e-4)
        assert len(calls) == number
