"""Several heads on one trunk are the single reward models, and the trunk is read once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import heads
from jax_klrlhf.models import reward as single
from tests.models import toy

MODEL = toy.language_model(vocab=5)
PARAMS = MODEL.init(jax.random.key(0))
PROMPTS = Ragged(jnp.array([[1, 2], [2, 0]]), jnp.array([2, 1]))
RESPONSES = Ragged(
    jnp.array([[[1, 2, 0], [3, 0, 0]], [[4, 4, 4], [1, 0, 0]]]), jnp.array([[3, 1], [3, 2]])
)


@pytest.mark.slow
def test_each_head_is_its_own_reward_model_in_value_and_gradient():
    dim = single.features(MODEL, PARAMS, PROMPTS, RESPONSES).shape[-1]
    params = single.RewardParams(PARAMS, heads.init(jax.random.key(1), members=3, dim=dim))

    def together(params):
        return heads.rewards(MODEL, params, PROMPTS, RESPONSES)

    found = together(params)
    weight = jax.random.normal(jax.random.key(2), found.shape)
    gradient = jax.grad(lambda p: jnp.sum(weight * together(p)))(params)
    for m in range(3):
        one = heads.member(params, m)
        alone = lambda p: single.reward(MODEL, p, PROMPTS, RESPONSES)  # noqa: E731
        np.testing.assert_allclose(found[m], alone(one), rtol=1e-5, atol=1e-6)
        own = jax.grad(lambda p, m=m, alone=alone: jnp.sum(weight[m] * alone(p)))(one)
        np.testing.assert_allclose(gradient.head[m], own.head, rtol=1e-5, atol=1e-6)
    place = jnp.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    mixed = heads.per_user(place, found)
    np.testing.assert_allclose(mixed[1], found[0, 1], rtol=1e-5)
    np.testing.assert_allclose(mixed[0], np.tensordot(place[0], found[:, 0], 1), rtol=1e-5)


def test_the_trunk_is_traced_once_whatever_the_number_of_heads():
    calls = []

    def pooling(prompt, hidden, mask):
        calls.append(hidden.shape)
        return single.last(prompt, hidden, mask)

    head = jnp.ones((8, single.features(MODEL, PARAMS, PROMPTS, RESPONSES).shape[-1]))
    params = single.RewardParams(PARAMS, head)
    found = heads.rewards(MODEL, params, PROMPTS, RESPONSES, pooling=pooling)
    assert found.shape == (8, 2, 2)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="expected \\[members, dim\\]"):
        heads.rewards(MODEL, heads.member(params, 0), PROMPTS, RESPONSES)
