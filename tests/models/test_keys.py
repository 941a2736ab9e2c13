"""Every key of every family's config class: read, refused, or without effect, as torch has it."""

import dataclasses
import functools

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from jax_klrlhf.errors import InputError
from jax_klrlhf.models import keys
from jax_klrlhf.models.config import ModelConfig

SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"sliding_window": 3, "layer_types": [SLIDING, FULL]}
BASE = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 9},
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": LLAMA | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "gemma2": LLAMA | WINDOWS | {"query_pre_attn_scalar": 8},
    "gemma3_text": LLAMA | WINDOWS | {"query_pre_attn_scalar": 8},
    "gpt2": {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
# Another value of every key: what a config could hold instead.
OTHER = {
    "activation_function": "relu",
    "attention_bias": True,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0,
    "head_dim": 6,
    "hidden_act": "relu",
    "hidden_activation": "relu",
    "hidden_size": 32,
    "initializer_range": 0.5,
    "intermediate_size": 40,
    "layer_norm_epsilon": 0.5,
    "layer_types": [SLIDING, SLIDING],
    "max_position_embeddings": 32,
    "max_window_layers": 0,
    "mlp_bias": True,
    "n_embd": 32,
    "n_head": 2,
    "n_inner": 20,
    "n_layer": 1,
    "n_positions": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 2,
    "rms_norm_eps": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
    "sliding_window": 2,
    "tie_word_embeddings": None,  # The opposite of what it was.
    "use_sliding_window": False,
    "vocab_size": 17,
    # Without effect, or refused.
    "attention_dropout": 0.5,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "attn_pdrop": 0.5,
    "pretraining_tp": 2,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 3,
    "eos_token_id": 3,
    "add_cross_attention": True,
    "reorder_and_upcast_attn": True,
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False,
    "use_bidirectional_attention": True,
    "is_causal": False,
    "is_encoder_decoder": True,
    "partial_rotary_factor": 0.5,
    "per_layer_config": {"0": {"num_key_value_heads": 1}},
    "quantization_config": {"bits": 4},
    "compression_config": {"bits": 4},
    "transformers_weights": "other.safetensors",
    "auto_map": {"AutoModelForCausalLM": "code.Model"},
}
# They change the weights' shapes or nothing that is computed, and are read all the same.
SHAPES = {
    "head_dim", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings",
    "n_embd", "n_inner", "n_layer", "n_positions", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "tie_word_embeddings", "vocab_size",
}  # fmt: skip


def settings(family, key=None):
    """A tiny config, at another value of one key."""
    base = {"model_type": family, **BASE[family]}
    if key is None:
        return base
    value = OTHER[key]
    if key == "num_hidden_layers":
        base.pop("layer_types", None)
    if key == "tie_word_embeddings":
        value = not CONFIG_MAPPING[family]().tie_word_embeddings
    if key == "rope_parameters" and family == "gemma3_text":
        value = {FULL: value, SLIDING: value}
    return {**base, key: value}


def function_of(config):
    """What of a config decides the logits at given weights."""
    return dataclasses.replace(config, init_scale=0.0, max_length=64)


@pytest.mark.parametrize("family", keys.FAMILIES)
def test_every_key_of_the_class_is_in_one_table(family):
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
    tables = keys.HONOURED[family], keys.IGNORED[family], set(keys.REQUIRED[family])
    assert fields <= set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables))
    # Nothing is said of a key that the class does not have, but what transformers asks any config.
    beyond = (tables[0] | tables[1]) - fields
    assert beyond <= {"head_dim"}


@pytest.mark.parametrize("family", keys.FAMILIES)
def test_read_refused_or_without_effect(family):
    plain = ModelConfig.from_hf(settings(family))
    for key in keys.HONOURED[family] & SHAPES:
        assert ModelConfig.from_hf(settings(family, key)) != plain, key
    for key in keys.HONOURED[family] - SHAPES:
        assert function_of(ModelConfig.from_hf(settings(family, key))) != function_of(plain), key
    for key in keys.IGNORED[family] & OTHER.keys():
        assert ModelConfig.from_hf(settings(family, key)) == plain, key
    for key in keys.REQUIRED[family]:
        with pytest.raises(InputError, match=f"^here: {key}=") as error:
            ModelConfig.from_hf(settings(family, key), where="here")
        assert "\n" not in str(error.value)


def strays(family):
    """Keys of other families that this one's class does not have."""
    cls = CONFIG_MAPPING[family]
    own = {field.name for field in dataclasses.fields(cls)} | cls.attribute_map.keys()
    return sorted(set().union(*keys.HONOURED.values()) - own - keys.HONOURED[family])


@pytest.mark.parametrize("family", keys.FAMILIES)
def test_keys_of_other_families_are_ignored(family):
    """A Llama with the ``sliding_window`` of the Qwen that it was made from is a plain Llama."""
    plain = ModelConfig.from_hf(settings(family))
    assert len(strays(family)) > 3
    for key in strays(family):
        assert ModelConfig.from_hf(settings(family, key)) == plain, key


def test_a_key_of_a_newer_transformers_is_refused_unless_at_its_default(monkeypatch):
    monkeypatch.setitem(keys.IGNORED, "llama", keys.IGNORED["llama"] - {"pretraining_tp"})
    ModelConfig.from_hf(settings("llama"))
    with pytest.raises(InputError, match="pretraining_tp=2 is not known to this library; only 1"):
        ModelConfig.from_hf(settings("llama", "pretraining_tp"))


@pytest.mark.parametrize("family", keys.FAMILIES)
def test_torch_agrees_on_what_has_an_effect(family):
    """Logits of transformers move with a key exactly where our config does."""
    torch = pytest.importorskip("torch", reason="parity needs torch (the `parity` extra)")
    import transformers

    rows = torch.tensor(np.random.default_rng(0).integers(3, 31, (1, 14)))

    @functools.cache
    def model(key):
        given = settings(family, key)
        config = transformers.AutoConfig.for_model(**given)
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        return made.float().eval()

    def logits(key):
        """At the plain model's weights, what it lacks at 0.3."""
        made, weights = model(key), model(None).state_dict()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(weights[name] if name in weights else torch.tensor(0.3))
            return made(rows, use_cache=False).logits.numpy()

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model(None).parameters():
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape))
    plain, ours = logits(None), ModelConfig.from_hf(settings(family))
    tables = keys.HONOURED[family] | keys.IGNORED[family] | set(strays(family))
    for key in sorted(tables & OTHER.keys() - SHAPES):
        moved = np.abs(logits(key) - plain).max() > 1e-4
        read = function_of(ModelConfig.from_hf(settings(family, key))) != function_of(ours)
        assert moved == read, f"{key}: torch's logits {'do' if moved else 'do not'} move with it"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": -16}, "hidden_size=-16"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776"),
        ({"num_attention_heads": 0}, "llama config"),
        ({"num_key_value_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; at most 4096"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"head_dim": 3}, "head_dim=3"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": "ten"}, "rope_theta='ten'"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": ["default"], "rope_theta": 1.0}}, "rope"),
        ({"model_type": ["llama"]}, "model_type=['llama'] is not supported"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        ({"model_type": "qwen2", "layer_types": [SLIDING, SLIDING]}, "sliding_window=None"),
        ({"model_type": "qwen2", "layer_types": [FULL]}, "layer_types"),
        ({"model_type": "gemma2", "final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0"),
        ({"model_type": "gemma3", "text_config": 3}, "text_config is 3"),
        ({"model_type": "gemma3", "text_config": {}, "quantization_config": {}}, "quantization"),
        ({"model_type": "gpt2", "hidden_size": 10}, "n_embd=10 is not a multiple"),
        ({"auto_map": {"AutoModel": "a.B"}}, "code of a model's own is never run"),
    ],
    ids=str,
)
def test_a_bad_value_is_one_line_that_names_it(change, words):
    with pytest.raises(InputError, match=r"^file\.json: ") as error:
        ModelConfig.from_hf({**LLAMA, "model_type": "llama", **change}, where="file.json")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
