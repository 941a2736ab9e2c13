"""Tokens by words are the tokenizer's own, on any text, for every family's expression."""

import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from jax_klrlhf.data.words import Words

REAL = Path(os.environ.get("KLRLHF_SMOLLM2", Path(__file__).parents[3] / "smollm2_135m"))
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")
KINDS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
TEXT = (
    "What's the capital? It's 12345, they'LL say;\n\n  Human: we've  3 sea-shells!!\r\n\tdone.  \n"
) * 9


@pytest.fixture(scope="module")
def kinds():
    made = {}
    for name, step in KINDS.items():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = step
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=340,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["</s>"],
            show_progress=False,
        )
        backend.train_from_iterator([TEXT], trainer)
        backend.add_tokens(["<mood>"])
        made[name] = backend, Words(backend)
    return made


def theirs(backend, texts):
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


pieces = st.sampled_from(
    [
        *(
            "'s",
            "'S",
            "'ll",
            "'",
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "a",
            "Zed",
            "1",
            "1234",
            "_",
            "-",
            "!!",
        ),
        *("ª", "µ", "ß", "Ñ", "×", "÷", "\u2026", "\u2013", "\u00b0", "\u00b2", "\u00bd", "\x85"),
        *("\x0b", "\x1c", "\x00", "\x7f", "é", "\u2019", "\u00a0", "\u2003", "漢", "٣"),
        *("<mood>", "</s>", "</"),
    ]
)


@given(texts=st.lists(st.lists(pieces, max_size=12).map("".join), max_size=4))
@example([TEXT])
@example(["", " ", "\n", "a \n b", "a  b", "a\n\n\nb  ", "12 345678 9", "a's A'S 'sa"])
def test_words_give_the_tokenizers_own_tokens(kinds, texts):
    for backend, words in kinds.values():
        for _ in range(2):  # new, and remembered
            assert words.ids(texts) == theirs(backend, texts)


def test_words_are_remembered(kinds, monkeypatch):
    for _, words in kinds.values():
        assert words._expression is not None  # the short way is taken at all
        words.ids([TEXT])
        asked = []
        monkeypatch.setattr(words, "_asked", lambda texts, asked=asked: asked.extend(texts) or [])
        words.ids([TEXT, TEXT[:40]])
        assert len(asked) <= 1  # at most the word that the cut made


@given(texts=st.lists(st.lists(pieces, max_size=12).map("".join), max_size=4))
def test_expression_that_leaves_something_out_or_looks_around_is_no_trap(kinds, texts):
    backend, _ = kinds["gpt2"]
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    for pattern in (r"\p{L}+", r"\p{N}+(?=a)|\p{L}+|\s", r"(?<=a) |[^ ]+"):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        words = Words(backend)
        assert words._expression is not None
        assert words.ids(texts) == theirs(backend, texts)


def test_what_is_not_certain_is_left_to_the_library(sentence_piece):
    assert Words(sentence_piece.backend_tokenizer)._expression is None
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = KINDS["gpt2"]
    assert Words(backend)._expression is None
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    for pattern in (r"\p{Han}+", r"(a)|b", r"\P{L}+"):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        assert Words(backend)._expression is None


@given(texts=st.lists(st.lists(pieces, max_size=12).map("".join), max_size=4))
def test_real_tokenizer(smollm2, texts):
    backend, words = smollm2
    assert words.ids(texts) == theirs(backend, texts)


@pytest.fixture(scope="module")
def smollm2():
    if not (REAL / "tokenizer.json").is_file():
        pytest.skip(f"real chat model absent: {REAL} (set KLRLHF_SMOLLM2 to it)")
    backend = tokenizers.Tokenizer.from_file(str(REAL / "tokenizer.json"))
    words = Words(backend)
    assert words._expression is not None
    return backend, words
