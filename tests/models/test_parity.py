"""Every family against the torch implementation in transformers, and back.

Weights are random and large (norms, biases and all), and each sequence is longer than the windows.
That a feature is exercised is asserted too: without it the logits move.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import partition, pretrained, weights
from jax_klrlhf.models.transformer import language_model

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="parity needs torch (the `parity` extra)")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # Tiny products: a pool of threads only spins.

VOCAB, P, C, K, KL_COEF = 61, 9, 11, 2, 0.3
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
SLIDING, FULL = "sliding_attention", "full_attention"
# name: (model_type, its settings, our config's settings without which the logits must move)
CASES = {
    "llama": ("llama", {"tie_word_embeddings": True}, [{"ropes": None}]),
    "llama_biased": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR},
        [],
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, []),
    "mistral": ("mistral", {"sliding_window": 5}, [{"windows": None}]),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        [{"windows": None}],
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, []),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        [
            {"windows": None},
            {"attention_softcap": None},
            {"final_softcap": None},
        ],
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 5,
            "layer_types": [SLIDING, FULL, SLIDING],
            "query_pre_attn_scalar": 8,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10.0},
            },
        },
        [{"windows": None}],
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB,
            "n_embd": 24,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            **{f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")},
        },
        [],
    ),
}


@functools.cache
def case(name):
    """(torch model, its settings), with weights that leave no norm at one and no bias at zero."""
    family, settings, _ = CASES[name]
    common = {} if family == "gpt2" else COMMON
    config = transformers.AutoConfig.for_model(
        family, **{"tie_word_embeddings": False, **common, **settings}
    )
    if family == "gpt2":
        config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            centre = parameter if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape))
    return model.eval().float()


def batch():
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, VOCAB, (2, P)).astype(np.int32)
    responses = rng.integers(3, VOCAB, (2, K, C)).astype(np.int32)
    return (
        Ragged(jnp.asarray(prompts), jnp.asarray([P, 5], jnp.int32)),
        Ragged(jnp.asarray(responses), jnp.asarray([[C, 8], [3, C]], jnp.int32)),
    )


def torch_rows():
    """One concatenated, unpadded row per response: its ids and the number of prompt tokens."""
    prompts, responses = batch()
    for b, k in np.ndindex(2, K):
        n, c = int(prompts.lengths[b]), int(responses.lengths[b, k])
        ids = np.concatenate([prompts.ids[b, :n], responses.ids[b, k, :c]])
        yield b, k, n, c, torch.tensor(ids[None].astype(np.int64))


def torch_logits(model):
    """``[2, K, C, V]``: the logits that predict each response token; zero at padding."""
    rows = torch.zeros((2, K, C, VOCAB))
    for b, k, n, c, ids in torch_rows():
        rows[b, k, :c] = model(ids).logits[0, n - 1 : n - 1 + c]
    return rows


def torch_loss(model):
    """DPO (arXiv 2305.18290, eq. 7) with reference log-probabilities 0."""
    log_prob = torch.zeros((2, K))
    for b, k, n, c, ids in torch_rows():
        table = torch.log_softmax(model(ids).logits[0, n - 1 : n - 1 + c], -1)
        chosen = table.gather(-1, ids[0, n:, None])
        log_prob = log_prob + chosen.sum() * torch.nn.functional.one_hot(
            torch.tensor(b * K + k), 2 * K
        ).reshape(2, K)
    margin = KL_COEF * (log_prob[:, 0] - log_prob[:, 1])
    return -torch.nn.functional.logsigmoid(margin).mean()


def ours(config, params):
    """Logits of :func:`torch_logits`, and our DPO loss."""
    model = language_model(config)
    prompts, responses = batch()
    prefix = model.prefill(params, prompts)
    after = model.extend(params, prefix, responses.ids[..., :-1])
    first = jnp.broadcast_to(prefix.hidden[:, None, None], (2, K, 1, config.hidden_size))
    logits = model.unembed(params, jnp.concatenate([first, after], axis=2))
    logits = jnp.where(responses.mask[..., None], logits, 0.0)
    table = jax.nn.log_softmax(logits, axis=-1)
    tokens = jnp.take_along_axis(table, responses.ids[..., None], axis=-1)[..., 0]
    log_prob = jnp.where(responses.mask, tokens, 0.0).sum(-1)
    margin = KL_COEF * (log_prob[:, 0] - log_prob[:, 1])
    return -jax.nn.log_sigmoid(margin).mean(), logits


value_and_grad = jax.jit(
    lambda config, params: jax.value_and_grad(lambda p: ours(config, p), has_aux=True)(params),
    static_argnums=0,
)
forward = jax.jit(ours, static_argnums=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_gradients_and_round_trip(name, tmp_path):
    model = case(name)
    model.save_pretrained(tmp_path / "theirs")
    loaded = pretrained.load(tmp_path / "theirs")
    config = dataclasses.replace(loaded.config, remat="full")
    (loss, logits), grads = value_and_grad(config, loaded.params)

    with torch.no_grad():
        expected = torch_logits(model).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)

    model.zero_grad()
    their_loss = torch_loss(model)
    their_loss.backward()
    np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters()}
    for tensor, grad in on_disk(config, grads).items():
        found = theirs[tensor]
        error = np.abs(grad - found).max() / max(np.abs(found).max(), 1e-6)
        assert error < 1e-3, f"gradient of {tensor}: relative error {error:.1e}"

    pretrained.save(tmp_path / "ours", loaded.config, loaded.params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        np.testing.assert_allclose(torch_logits(back).numpy(), logits, atol=1e-4, rtol=0)
    again = pretrained.load(tmp_path / "ours")
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize(
    ("name", "change"), [(n, c) for n, (_, _, changes) in CASES.items() for c in changes], ids=str
)
def test_every_feature_is_exercised(name, change, tmp_path):
    model = case(name)
    model.save_pretrained(tmp_path)
    loaded = pretrained.load(tmp_path)
    with torch.no_grad():
        expected = torch_logits(model).numpy()
    _, logits = forward(dataclasses.replace(loaded.config, **change), loaded.params)
    assert np.abs(logits - expected).max() > 1e-2


def on_disk(config, params):
    """Our tree of gradients as their tensors."""
    leaves = {
        partition.path_name(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    found = {}
    for name, source in weights.sources(config).items():
        stacked = "{}" in source.name
        for layer in range(config.layers if stacked else 1):
            leaf = leaves[name][layer] if stacked else leaves[name]
            found.setdefault(source.name.format(layer), []).append(weights.write(source, leaf))
    return {name: np.concatenate(parts, axis=-1) for name, parts in found.items()}
