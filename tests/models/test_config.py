"""Facts read from the config files of published models, as they are on the hub, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.errors import InputError
from jax_klrlhf.models.config import ModelConfig, Rope

LLAMA_32_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
QWEN_25 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
GEMMA_2_2B = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 10000.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
}
PUBLISHED = [LLAMA_32_1B, MISTRAL_7B, QWEN_25, GEMMA_2_2B, GEMMA_3_1B]


def test_llama_3_rope_scaling_of_old():
    config = ModelConfig.from_hf(LLAMA_32_1B)
    rope = Rope(
        theta=500000.0,
        kind="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_length=8192,
    )
    assert set(config.layer_ropes) == {rope}
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (16, 32, 8, 64)
    assert config.tied
    assert not config.qkv_bias


def test_llama_3_slows_low_frequencies_only():
    rope = ModelConfig.from_hf(LLAMA_32_1B).layer_ropes[0]
    plain = dataclasses.replace(rope, kind="default").frequencies(64)
    ratio = plain / rope.frequencies(64)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1.0)
    np.testing.assert_allclose(ratio[turns < 1], 32.0)
    between = ratio[(turns > 1) & (turns < 4)]
    assert between.size
    assert ((between > 1) & (between < 32)).all()


def test_windows():
    assert set(ModelConfig.from_hf(MISTRAL_7B).layer_windows) == {4096}
    assert set(ModelConfig.from_hf(QWEN_25).layer_windows) == {None}
    assert ModelConfig.from_hf(GEMMA_2_2B).layer_windows[:4] == (4096, None, 4096, None)
    gemma3 = ModelConfig.from_hf(GEMMA_3_1B)
    assert [w is None for w in gemma3.layer_windows[:7]] == [False] * 5 + [True, False]
    assert gemma3.layer_ropes[5].theta == 1000000.0
    assert gemma3.layer_ropes[0].theta == 10000.0


def test_a_window_over_the_context_is_no_window():
    config = ModelConfig.from_hf(MISTRAL_7B | {"sliding_window": 32768})
    assert set(config.layer_windows) == {None}


def test_qwen_2_has_biases_and_gemma_its_scales():
    qwen = ModelConfig.from_hf(QWEN_25)
    assert qwen.qkv_bias
    assert not qwen.out_bias
    gemma = ModelConfig.from_hf(GEMMA_2_2B)
    assert gemma.scale == 256**-0.5
    assert gemma.embedding_scale == 2304**0.5
    assert (gemma.attention_softcap, gemma.final_softcap) == (50.0, 30.0)
    assert (gemma.norm, gemma.post_norms, gemma.activation) == ("rms_offset", True, "gelu_tanh")


@pytest.mark.parametrize("settings", PUBLISHED, ids=lambda s: s["model_type"])
def test_to_hf_is_the_inverse(settings):
    config = ModelConfig.from_hf(settings)
    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    # transformers of old reads these keys.
    assert written["rope_theta"] == settings["rope_theta"]


def test_a_config_is_static():
    config = ModelConfig.from_hf(QWEN_25)
    traces = []

    @jax.jit
    def width(config, x):
        traces.append(config)
        return x * config.hidden_size

    width(config, jnp.float32(1))
    width(ModelConfig.from_hf(QWEN_25), jnp.float32(1))
    assert len(traces) == 1
    width(dataclasses.replace(config, remat="full"), jnp.float32(1))
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported; supported are gemma2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["linear_attention"] * 16, "model_type": "qwen3"}, "layer_types"),
    ],
)
def test_what_is_not_computed_is_refused(change, words):
    with pytest.raises(InputError, match=r"file\.json: ") as error:
        ModelConfig.from_hf(LLAMA_32_1B | change, where="file.json")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_facts_are_refused():
    good = ModelConfig.from_hf(QWEN_25)
    for change, words in [
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"windows": (1, 2)}, "windows has 2 entries"),
        ({"remat": "dots"}, "names no policy"),
    ]:
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(good, **change)


def test_facts_a_family_cannot_write_are_refused():
    """Silently written, such a folder would load as another model."""
    llama = ModelConfig.from_hf(LLAMA_32_1B)
    with pytest.raises(ValueError, match="'llama' cannot write qkv_bias=True"):
        dataclasses.replace(llama, qkv_bias=True).to_hf()
    with pytest.raises(ValueError, match="one window and one rotation per kind"):
        dataclasses.replace(llama, windows=(1, 2) * 8).to_hf()
