"""Small tokenizers of every kind that the rules must hold for."""

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jax_klrlhf.data import tokenize

TEXTS = [
    "What is the capital of France? Paris is the capital of France.",
    "Write a poem about the sea. The sea is blue and deep and wide.",
    "\n\nHuman: hello there\n\nAssistant: hello, how can I help you?",
    "one two three four five six seven eight nine ten",
] * 8

# ChatML, as Qwen writes it: the turn is closed by the end token and a line break.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> PreTrainedTokenizerBase:
    """Byte-level BPE with begin, end and pad tokens."""
    folder = tmp_path_factory.mktemp("byte_level")
    return tokenize.train_tokenizer(TEXTS, vocab_size=400, folder=folder, chat_template=CHATML)


@pytest.fixture(scope="session")
def no_begin(byte_level) -> PreTrainedTokenizerBase:
    """As Qwen's: no begin token; and pad is the end token."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def sentence_piece() -> PreTrainedTokenizerBase:
    """As Llama 2's: a space is invented before the first word of a text."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Learned word by word: no piece ends in a space, which the decoder would lose.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    backend.train_from_iterator([*TEXTS, letters, letters.upper(), " ".join(letters)], trainer)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session", params=["byte_level", "no_begin", "sentence_piece"])
def encoder(request) -> tokenize.Encoder:
    """Every kind in turn."""
    return tokenize.encoder(request.getfixturevalue(request.param))
