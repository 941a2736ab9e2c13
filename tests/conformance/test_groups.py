"""Every loss on groups in both worlds: an action of a bandit is a response of one token.

A prompt of the toy model is a context, its next token the action. What the bandit's table gives a
loss and what the model's scoring gives it are the same numbers.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import catalogue, group_losses
from jax_klrlhf.models import enumerate as enumerated
from jax_klrlhf.training import group
from jax_klrlhf.training.rounds.parts import ragged
from tests.training import rounds_world as world

GIVEN = {
    "copo": {"threshold": 0.5, "sharpness": 4.0},
    "dr_grpo": {"size": 1},
    "clipped": {
        "advantage": catalogue.CHOICES["advantage"]["by_std"],
        "low": 0.2,
        "high": 0.3,
        "mean": "group",
    },
}
METHODS = {**catalogue.METHODS, "copo": group_losses.copo}


def bound(name):
    given = dict(GIVEN.get(name, {}))
    if "kl_coef" in inspect.signature(METHODS[name]).parameters:
        given["kl_coef"] = 0.5
    return METHODS[name](**given)


@pytest.fixture(scope="module")
def both():
    """The same draws as tokens and as actions."""
    rng = np.random.default_rng(0)
    params = {
        name: world.MODEL.init(jax.random.key(number))
        for number, name in enumerate(("policy", "reference", "old"))
    }
    prompts = jax.tree.map(jnp.asarray, world.PROMPTS)
    every = enumerated.responses(vocab_size=world.VOCAB, max_new_tokens=1, stop=(world.STOP,))
    law = jax.jit(lambda p: enumerated.log_prob(world.MODEL, p, prompts, every))
    tables = {name: law(p) for name, p in params.items()}
    count = len(prompts.lengths)
    actions = rng.integers(0, world.VOCAB, (count, 4))
    reward = jnp.asarray(rng.normal(size=(count, 4)), "float32")
    classes = jnp.asarray(actions % 2, "int32")
    at = partial(jnp.take_along_axis, indices=jnp.asarray(actions), axis=-1)
    of_bandit = group_losses.from_actions(
        at(tables["policy"]), reward, ref_log_prob=at(tables["reference"]),
        old_log_prob=at(tables["old"]),
    )  # fmt: skip
    batch = group.GroupBatch(
        prompts,
        jax.tree.map(jnp.asarray, ragged(actions[..., None], np.ones_like(actions))),
        jnp.ones(count),
        reward,
        at(tables["reference"])[..., None],
        at(tables["old"])[..., None],
    )
    task = group.group(world.MODEL, bound("rloo"))
    of_model = jax.jit(task.score)(params["policy"], None, batch).group
    return [one._replace(classes=classes) for one in (of_bandit, of_model)]


@pytest.mark.parametrize("name", METHODS)
def test_both_worlds_minimize_the_same_number(both, name):
    loss = jax.jit(bound(name))
    of_bandit, of_model = (np.asarray(loss(one)) for one in both)
    assert of_bandit.shape == (len(world.PROMPTS.lengths),)
    np.testing.assert_allclose(of_model, of_bandit, rtol=1e-4, atol=1e-5)
    # The control: another policy's draws are another number.
    other = np.asarray(loss(both[0]._replace(token_log_prob=both[0].old_token_log_prob - 0.7)))
    assert np.abs(other - of_bandit).max() > 1e-3
