"""Real preferences: parsed, prepared, described and batched."""

import numpy as np
import pytest

from jax_klrlhf.data import batch, prepare, sources, statistics, tokenize


@pytest.fixture(scope="module")
def harmless_tokenizer(data_dir, tmp_path_factory):
    path = data_dir / "preferences" / "hh_harmless.jsonl.gz"
    texts = (
        text
        for example in sources.open_source(path).examples()
        for text in (example.prompt, *example.responses)
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenize.train_tokenizer(texts, vocab_size=4096, folder=folder)


@pytest.fixture(scope="module")
def prepared(data_dir, harmless_tokenizer, tmp_path_factory):
    home = tmp_path_factory.mktemp("prepared")

    def build(name):
        return prepare.build(
            data_dir / "preferences" / f"{name}.jsonl.gz",
            harmless_tokenizer,
            home / name,
            max_prompt_length=384,
            max_response_length=256,
        )["train"]

    return {name: build(name) for name in ("hh_harmless", "polite", "qa_feedback")}


@pytest.mark.parametrize(
    ("name", "rows", "prompts"),
    [("hh_harmless", 2308, None), ("polite", 1094, 1069), ("qa_feedback", 2616, 488)],
)
def test_every_row_is_kept_and_counted(prepared, data_dir, name, rows, prompts):
    split = prepared[name]
    assert split.manifest["examples"] == rows
    dropped = sum(entry["count"] for entry in split.manifest["dropped"].values())
    assert len(split) + dropped == rows
    facts = statistics.describe_prepared(split)
    assert facts.rows == len(split)
    assert facts.responses == {2: len(split)}
    if prompts is not None:  # counted on the text
        assert facts.prompts == prompts


def test_rows_read_as_the_text(prepared, data_dir, harmless_tokenizer):
    encoder = tokenize.encoder(harmless_tokenizer)
    path = data_dir / "preferences" / "hh_harmless.jsonl.gz"
    examples = list(sources.open_source(path).examples())
    for row in prepared["hh_harmless"].fetch(range(0, 2308, 100)):
        example = examples[row.number]
        assert example.prompt.endswith(encoder.decode(row.prompt).lstrip("�"))
        for ids, text in zip(row.responses, example.responses, strict=True):
            assert text.startswith(encoder.decode(ids).rstrip("�"))
            assert (ids[-1] == encoder.end) == (encoder.decode(ids) == text)


@pytest.mark.parametrize("name", ["hh_harmless", "polite", "qa_feedback"])
def test_an_epoch_of_batches_holds_every_token_once(prepared, name):
    split = prepared[name]
    loader = split.loader(seed=0, token_budget=8192)
    stream = batch.Stream(loader)
    tokens, seen = 0, []
    for _ in range(loader.steps_per_epoch):
        got = next(stream)
        real = got.weight > 0
        tokens += int(got.prompts.lengths[real].sum() + got.responses.lengths[real].sum())
        seen += got.row[real].tolist()
    assert sorted(seen) == list(range(len(split)))
    assert tokens == split.lengths.prompts.sum() + split.lengths.responses.sum()
    assert len(loader.shapes) <= 8


def test_shapes_fit_to_the_data_pad_far_less_than_the_longest_row(prepared):
    # The layout itself leaves what a pair's shorter response lacks of the longer one; shapes add
    # to that floor, and each further one adds less.
    lengths = prepared["hh_harmless"].lengths
    tokens = lengths.prompts.sum() + lengths.responses.sum()
    floor = 1 - tokens / (lengths.prompts + 2 * lengths.longest).sum()
    one, eight, many = (
        prepared["hh_harmless"].loader(seed=0, token_budget=8192, max_shapes=count).padding_fraction
        for count in (1, 8, 32)
    )
    assert floor < many < eight < one
    assert (1 - one) * 2 < 1 - eight  # less than half the slots
    assert np.isclose(one, 1 - tokens / (-(-len(lengths.prompts) // 9) * 9 * (384 + 2 * 256)))
