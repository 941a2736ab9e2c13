"""A real chat model, SmolLM2-135M-Instruct, on every path; skipped where its folder is absent.

Thirty layers and a vocabulary of 49,152. The reference is transformers on torch, in float32.
"""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import models
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import packing, tokenize
from jax_klrlhf.models import lora, packed, pretrained, sampling, scoring
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.batch import Batch

CHAT = Path(os.environ.get("KLRLHF_SMOLLM2", Path(__file__).parents[3] / "smollm2_135m"))
pytestmark = pytest.mark.skipif(
    not (CHAT / "model.safetensors").is_file(),
    reason=f"real chat model absent: no folder {CHAT} (set KLRLHF_SMOLLM2 to it)",
)
ASKED = ["What is the capital of France?", "Say hello."]
ANSWERS = [["The capital of France is Paris.", "I do not know."], ["Hello!", "No, thank you."]]


@pytest.fixture(scope="module")
def loaded():
    return models.load(CHAT)


@pytest.fixture(scope="module")
def batch(loaded):
    """Two chats with two answers each, by the tokenizer's own template."""
    encoder = tokenize.encoder(loaded.tokenizer)
    prompts = [encoder.chat_prompt([{"role": "user", "content": text}]) for text in ASKED]
    answers = [encoder.response(text) for pair in ANSWERS for text in pair]
    rows, columns = (max(map(len, x)) for x in (prompts, answers))
    ids = np.zeros((2, rows), np.int32), np.zeros((4, columns), np.int32)
    for table, found in zip(ids, (prompts, answers), strict=True):
        for row, tokens in zip(table, found, strict=True):
            row[: len(tokens)] = tokens
    lengths = [np.array(list(map(len, x)), np.int32) for x in (prompts, answers)]
    return (
        Ragged(jnp.asarray(ids[0]), jnp.asarray(lengths[0])),
        Ragged(jnp.asarray(ids[1].reshape(2, 2, -1)), jnp.asarray(lengths[1].reshape(2, 2))),
    )


@pytest.fixture(scope="module")
def scored(loaded, batch):
    """Log-probability of each answer's tokens."""
    program = jax.jit(scoring.token_log_prob, static_argnums=0)
    return program(loaded.model, loaded.params, *batch)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch", reason="parity needs torch (the `parity` extra)")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32)
    return model.eval()


def test_scores_are_those_of_transformers(batch, scored, theirs):
    import torch

    prompts, responses = batch
    for b, k in np.ndindex(2, 2):
        n, c = int(prompts.lengths[b]), int(responses.lengths[b, k])
        row = np.concatenate([prompts.ids[b, :n], responses.ids[b, k, :c]]).astype(np.int64)
        with torch.no_grad():
            table = torch.log_softmax(theirs(torch.tensor(row[None])).logits[0], -1).numpy()
        expected = table[np.arange(n - 1, n - 1 + c), row[n:]]
        np.testing.assert_allclose(scored[b, k, :c], expected, atol=1e-3)


def test_saved_it_is_the_same_model_to_transformers(loaded, theirs, tmp_path):
    """Bit by bit, in the file's own bfloat16, with its template and where its answers end."""
    import torch
    import transformers

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    config = dataclasses.replace(loaded.config, param_dtype=jnp.bfloat16)
    folder = models.save(
        tmp_path / "m", config, half, loaded.tokenizer, generation=loaded.generation
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, expected = again.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert again.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    # The same function of the same weights.
    row = torch.tensor([[1, 4093, 198, 5]])
    with torch.no_grad():
        assert torch.equal(again.eval()(row).logits, theirs(row).logits)


def test_in_streams_without_padding_the_scores_are_the_same(loaded, batch, scored):
    prompts, responses = batch
    part = Batch(
        prompts=jax.tree.map(np.asarray, prompts),
        responses=jax.tree.map(np.asarray, responses),
        label=np.ones(2, np.float32),
        weight=np.ones(2, np.float32),
        scores=np.zeros((2, 2), np.float32),
        row=np.arange(2, dtype=np.int32),
    )
    tokens = int(prompts.lengths.sum() + responses.lengths.sum())
    streams = packing.pack([part], streams=1, tokens=tokens, answers=int(responses.lengths.sum()))
    streams = jax.tree.map(jnp.asarray, streams.packed)
    program = jax.jit(packed.token_log_prob, static_argnums=0)
    (found,) = program(loaded.model, loaded.params, streams)
    np.testing.assert_allclose(found.reshape(scored.shape), scored, atol=1e-3)


def test_an_untrained_adapter_and_a_reward_head(loaded, batch, scored):
    """LoRA at its start is the model; a reward is the head on the last hidden state."""
    facts = lora.Lora(rank=2)
    adapted = lora.language_model(loaded.config, facts)
    params = {
        "base": loaded.params,
        "lora": lora.init(jax.random.key(0), loaded.config, facts),
    }
    head = rewards.init_head(jax.random.key(1), dim=loaded.config.hidden_size)

    @jax.jit
    def both(params, head):
        given = rewards.RewardParams(params, head)
        reward = rewards.reward(adapted, given, *batch)
        return scoring.token_log_prob(adapted, params, *batch), reward

    found, reward = both(params, head)
    np.testing.assert_allclose(found, scored, atol=1e-3)
    assert np.isfinite(reward).all()
    assert len(np.unique(np.asarray(reward).round(3))) == 4


def test_sampling_stops_where_generate_does_and_agrees_with_scoring(loaded, batch, theirs):
    import torch

    prompts = batch[0]
    stop = models.stop_tokens(loaded.tokenizer, loaded.generation)
    drawn = sampling.generate(
        jax.random.key(0), loaded.model, loaded.params, prompts, samples=1, max_new_tokens=14,
        temperature=0.0, stop=stop,
    )  # fmt: skip
    for b in range(2):
        row = torch.tensor(np.asarray(prompts.ids)[b, : int(prompts.lengths[b])][None].astype(int))
        with torch.no_grad():
            whole = theirs.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=14, do_sample=False
            )
        expected = whole[0, row.shape[1] :].tolist()
        length = int(drawn.responses.lengths[b, 0])
        assert drawn.responses.ids[b, 0, :length].tolist() == expected
        assert bool(drawn.finished[b, 0]) == (expected[-1] in stop)
    assert drawn.finished.any()  # A turn that ends, and is seen to.
    program = jax.jit(scoring.token_log_prob, static_argnums=0)
    scored = program(loaded.model, loaded.params, prompts, drawn.responses)
    assert float(sampling.mismatch(drawn, scored).max()) < 1e-2
    assert pretrained.dtypes(jnp.bfloat16)["dtype"] == jnp.float32
