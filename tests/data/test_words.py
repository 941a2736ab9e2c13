"""Tokens by words are the tokenizer's own, on any text, for every kind that is cut into words."""

import gzip
import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from jax_klrlhf.data import tokenize
from jax_klrlhf.data import words as module
from jax_klrlhf.data.words import Words

REAL = Path(os.environ.get("KLRLHF_SMOLLM2", Path(__file__).parents[3] / "smollm2_135m"))
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern):
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


KINDS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "roberta": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "llama3": pre_tokenizers.Sequence(split(LLAMA)),
    "qwen": pre_tokenizers.Sequence(split(QWEN)),
    # SentencePiece's, in three forms; learned word by word, so that nothing reaches over a space.
    "llama2": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    "metaspace, split": pre_tokenizers.Metaspace(prepend_scheme="first"),
}
TEXT = (
    "What's the capital? It's 12345, they'LL say;\n\n  Human: we've  3 sea-shells!!\r\n\tdone.  \n"
) * 9


def made(name):
    """A small tokenizer of a kind, with added tokens: of spaces, and that take a space behind."""
    bytewise = not name.startswith(("llama2", "metaspace"))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=not bytewise))
    backend.pre_tokenizer = KINDS[name] if bytewise else KINDS["metaspace, split"]
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340 if bytewise else 400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if bytewise else [],
        special_tokens=["</s>", *([] if bytewise else ["▁", *single])],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    if not bytewise:  # bytes are no added tokens
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = spec["added_tokens"][:1]
        # Runs of spaces have tokens, too.
        spec["model"]["vocab"] |= {"▁▁": 500, "▁▁▁▁": 501}
        spec["model"]["merges"] += [["▁", "▁"], ["▁▁", "▁▁"]]
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        backend.pre_tokenizer = KINDS[name]
    if name == "qwen":
        backend.normalizer = normalizers.NFC()
    if name == "llama2":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        spec = json.loads(backend.to_str())
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec | {"pre_tokenizer": None}))
    backend.add_tokens(["<mood>", "    "])
    backend.add_tokens([AddedToken(token, rstrip=True) for token in ("<greedy>", "<Ñ>")])
    return backend


@pytest.fixture(scope="module")
def kinds():
    """Each with its `Words` of the beginnings of texts, and of what continues them."""
    found = {}
    for name in KINDS:
        backend = made(name)
        spec = json.loads(backend.to_str())
        later = tokenizers.Tokenizer.from_str(json.dumps(tokenize._continuing(spec)))
        if spec == json.loads(later.to_str()):
            later = backend
        found[name] = [(backend, Words(backend, later)), (later, Words(later, later))]
    return found


def theirs(backend, texts):
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


pieces = st.sampled_from(
    [
        *("'s", "'S", "'ll", "'", " ", "  ", "     ", "\n", "\r\n", "\t", "▁", "▁▁"),
        *("a", "Zed", "the", "capital", "1", "1234", "_", "-", "!!", "what's the", "3 sea-"),
        *("ª", "µ", "ß", "Ñ", "×", "÷", "\u2026", "\u2013", "\u00b0", "\u00b2", "\u00bd", "\x85"),
        *("\x0b", "\x1c", "\x00", "\x7f", "é", "\u2019", "\u00a0", "\u2003", "\u180e", "漢", "٣"),
        *("e\u0301", "\u0301", "N\u0303", "\u212a", "\u017f", "\U0001f600", "\u200d", "\ufeff"),
        *("<mood>", "</s>", "</", "<greedy>", "<N\u0303>", "<Ñ>"),
    ]
)
texts = st.lists(
    st.lists(st.one_of(pieces, st.just(" "), st.text(max_size=2)), max_size=12).map("".join),
    max_size=4,
)


@given(texts=texts)
@example([TEXT])
@example(
    ["", " ", "\n", "a \n b", "a  b", "a\n\n\nb  ", "12 345678 9", "a's A'S 'sa", "a \u180e b"]
)
@example(
    ["a\n", "a\n b", "b a\n", "a\n b a\n c", " a", "  a", "▁ a", "a ▁", "a▁", "a▁ b", "x ▁a b"]
)
@example(
    ["<greedy> a b", "a <greedy> b", "<mood>a b", "a<mood> b", "the <N\u0303> sea", "a      b"]
)
@example([("the capital " * 9).replace(" ", "_") + " says", "x" * 99 + " y " + "x" * 99])
def test_words_give_the_tokenizers_own_tokens(kinds, texts):
    for both in kinds.values():
        for backend, words in both:
            expected = theirs(backend, texts)
            for _ in range(2):  # new, and remembered
                assert words.ids(texts) == expected


def test_words_are_remembered(kinds, monkeypatch):
    """In another order, too; after double spaces and at a text's end as well."""
    for backend, words in (pair for both in kinds.values() for pair in both):
        assert words.cuts  # the short way is taken at all
        texts = [
            "What's the capital, they say,\nin  3 seas? Say it\n",
            "What's it? the capital, they",
        ]
        words.ids(texts)
        again = ["What's it? say,\nin  3 it\n", "What's the seas? Say capital, they", *texts]
        expected = theirs(backend, again)
        asked = []
        monkeypatch.setattr(module, "_asked", lambda _, new, asked=asked: asked.extend(new) or [])
        assert words.ids(again) == expected
        assert asked == []
        monkeypatch.undo()


def test_memory_is_bounded(kinds, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 20)
    for backend, words in kinds["gpt2"]:
        for number in range(50):
            text = f"one{number} two{number} {'long' * 20}{number}"
            assert words.ids([text]) == theirs(backend, [text])
            assert len(words._first) + len(words._later) <= 20 + 3
            assert not any(len(piece) > 64 for piece in (*words._first, *words._later))


@given(texts=texts)
def test_what_is_not_certain_is_left_to_the_library(kinds, texts):
    (backend, _), _ = kinds["gpt2"]
    spec = json.loads(backend.to_str())
    (sentences, _), _ = kinds["metaspace"]
    other = json.loads(sentences.to_str())
    changes = [spec | {"normalizer": {"type": "Lowercase"}}]
    # Something is left out; looks around; takes the space behind a word; is not known.
    for pattern in (
        r"\p{L}+",
        r"\p{L}+(?=a)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
        r"\p{L}+ ?| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
        r" ?\p{L}+| ?\p{N}+|\s+",
        r"\p{Han}+",
        r"(a)|b",
    ):
        step = pre_tokenizers.Sequence(split(pattern))
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        backend.pre_tokenizer = step
        changes.append(json.loads(backend.to_str()))
    # A space before every part.
    step = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(True)])
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.pre_tokenizer = step
    changes.append(json.loads(backend.to_str()))
    # A merge over a space; whole words of the vocabulary; a token of two words; no sign for spaces.
    crossing = other["model"] | {
        "vocab": other["model"]["vocab"] | {"e▁": 600},
        "merges": [["e", "▁"], *other["model"]["merges"]],
    }
    changes.append(other | {"model": crossing})
    changes.append(other | {"model": other["model"] | {"ignore_merges": True}})
    token = {**spec["added_tokens"][0], "id": 700, "content": "a b"}
    changes.append(spec | {"added_tokens": [*spec["added_tokens"], token]})
    for change in changes:
        backend = tokenizers.Tokenizer.from_str(json.dumps(change))
        words = Words(backend, backend)
        assert not words.cuts
        assert words.ids(texts) == theirs(backend, texts)


@given(texts=texts)
def test_real_tokenizer(smollm2, texts):
    backend, words = smollm2
    assert words.ids(texts) == theirs(backend, texts)


@pytest.fixture(scope="module")
def smollm2():
    if not (REAL / "tokenizer.json").is_file():
        pytest.skip(f"real chat model absent: {REAL} (set KLRLHF_SMOLLM2 to it)")
    backend = tokenizers.Tokenizer.from_file(str(REAL / "tokenizer.json"))
    words = Words(backend, backend)
    assert words.cuts
    return backend, words


def test_real_texts(kinds, smollm2, data_dir):
    """Of dialogues with double spaces and line breaks, and of stories with odd characters."""
    with gzip.open(data_dir / "preferences" / "hh_harmless.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line, _ in zip(file, range(50), strict=False)]
    texts = [text for record in records for text in record.values() if isinstance(text, str)]
    texts += (data_dir / "stories" / "heldout.txt").read_text()[:50_000].split("\n")
    backend, words = smollm2
    assert words.ids(texts) == theirs(backend, texts)
    for backend, words in (pair for both in kinds.values() for pair in both):
        assert words.ids(texts[::12]) == theirs(backend, texts[::12])


def test_merges_over_spaces_of_a_real_tokenizer_are_seen(stories_model):
    backend = tokenizers.Tokenizer.from_file(str(stories_model / "tokenizer.json"))
    assert not Words(backend, backend).cuts
