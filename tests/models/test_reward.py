"""Features, heads and ensembles, on a plain-pytree model and on the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained, reward
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model
from tests.models import tiny, toy

PROMPTS = Ragged(jnp.array([[1, 2, 3], [4, 0, 0]], jnp.int32), jnp.array([3, 1], jnp.int32))
RESPONSES = Ragged(
    jnp.array([[[1, 2, 3, 4], [2, 2, 0, 0]], [[3, 0, 0, 0], [4, 4, 4, 0]]], jnp.int32),
    jnp.array([[4, 2], [0, 3]], jnp.int32),
)
TOY = toy.language_model()


@pytest.fixture(scope="module")
def params():
    return TOY.init(jax.random.key(0))


def states(params, b, k):
    """The hidden states after the prompt's last token and after each response token, one row."""
    n, c = int(PROMPTS.lengths[b]), int(RESPONSES.lengths[b, k])
    prompt = Ragged(PROMPTS.ids[b : b + 1, :n], PROMPTS.lengths[b : b + 1])
    prefix = TOY.prefill(params, prompt)
    after = TOY.extend(params, prefix, RESPONSES.ids[b : b + 1, k : k + 1, : max(c, 1)])
    return prefix.hidden[0], after[0, 0, :c]


def test_features_are_the_rows_own(params):
    last = reward.features(TOY, params, PROMPTS, RESPONSES)
    mean = reward.features(TOY, params, PROMPTS, RESPONSES, pooling=reward.mean)
    for b, k in np.ndindex(2, 2):
        prompt, hidden = states(params, b, k)
        empty = len(hidden) == 0
        np.testing.assert_allclose(last[b, k], prompt if empty else hidden[-1], atol=1e-6)
        np.testing.assert_allclose(mean[b, k], prompt if empty else hidden.mean(0), atol=1e-6)


@pytest.mark.parametrize("pooling", [reward.last, reward.mean])
def test_padding_has_no_say(params, pooling):
    def total(responses):
        return reward.features(TOY, params, PROMPTS, responses, pooling=pooling)

    other = jnp.where(RESPONSES.mask, RESPONSES.ids, 1)
    assert (other != RESPONSES.ids).any()
    np.testing.assert_array_equal(total(RESPONSES), total(RESPONSES._replace(ids=other)))
    grads = jax.grad(lambda p: reward.features(TOY, p, PROMPTS, RESPONSES, pooling=pooling).sum())(
        params
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_ensembles_are_vmaps(params):
    keys = jax.random.split(jax.random.key(1), 3)
    heads = jax.vmap(lambda key: reward.init_head(key, dim=8))(keys)
    found = reward.features(TOY, params, PROMPTS, RESPONSES)
    scores = jax.vmap(reward.score, in_axes=(0, None))(heads, found)
    models = jax.vmap(TOY.init)(keys)
    stacked = reward.RewardParams(model=models, head=heads)
    jitted = jax.jit(reward.reward, static_argnums=0)
    whole = jax.vmap(reward.reward, in_axes=(None, 0, None, None))
    rewards = jax.jit(whole, static_argnums=0)(TOY, stacked, PROMPTS, RESPONSES)
    assert scores.shape == rewards.shape == (3, 2, 2)
    for i in range(3):
        np.testing.assert_allclose(scores[i], found @ heads[i], atol=1e-6)
        one = jax.tree.map(lambda x, i=i: x[i], stacked)
        alone = jitted(TOY, one, PROMPTS, RESPONSES)
        np.testing.assert_allclose(rewards[i], alone, atol=1e-6)


CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=12,
    intermediate_size=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=6,
    max_length=32,
    tied=False,
)


@pytest.fixture(scope="module")
def trained():
    model = tiny.params(CONFIG)
    return reward.RewardParams(model=model, head=reward.init_head(jax.random.key(1), dim=12))


def test_round_trip(trained, tmp_path):
    folder = reward.save(tmp_path / "reward", CONFIG, trained)
    loaded = reward.load(folder)
    expected = {k: x for k, x in trained.model.items() if k != "unembedding"}
    jax.tree.map(np.testing.assert_array_equal, loaded.params.model, expected)
    np.testing.assert_array_equal(loaded.params.head, trained.head)
    assert loaded.config == dataclasses.replace(ModelConfig.from_hf(CONFIG.to_hf()), tied=True)


@pytest.mark.parity
def test_transformers_gives_the_same_reward(trained, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch (the `parity` extra)")
    transformers = pytest.importorskip("transformers")
    folder = reward.save(tmp_path / "reward", CONFIG, trained)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.num_labels == 1
    ours = jax.jit(lambda p: reward.reward(language_model(CONFIG), p, PROMPTS, RESPONSES))(trained)
    for b, k in np.ndindex(2, 2):
        n, c = int(PROMPTS.lengths[b]), int(RESPONSES.lengths[b, k])
        ids = np.concatenate([PROMPTS.ids[b, :n], RESPONSES.ids[b, k, :c]])
        found = theirs(torch.tensor(ids[None].astype(np.int64))).logits.item()
        np.testing.assert_allclose(ours[b, k], found, atol=1e-5)


def test_refusals(trained, tmp_path):
    heads = trained._replace(head=jnp.zeros((3, 12)))
    with pytest.raises(ValueError, match="one by one"):
        reward.save(tmp_path / "heads", CONFIG, heads)
    pretrained.save(tmp_path / "policy", CONFIG, trained.model)
    with pytest.raises(InputError, match=r"tensor score\.weight is missing"):
        reward.load(tmp_path / "policy")
