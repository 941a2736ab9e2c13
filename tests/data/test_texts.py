"""A batch of texts is what the library's own preparation makes of them."""

import numpy as np
import pytest

from jax_klrlhf import data
from jax_klrlhf.data import rows, sources, tokenize
from jax_klrlhf.data.batch import collate
from jax_klrlhf.data.buckets import Shape
from jax_klrlhf.errors import InputError

CHAT = [{"role": "user", "content": "is it?"}]


def equal(left, right):
    for a, b in zip(left, right, strict=True):
        if a is not None or b is not None:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def leaves(batch):
    return [*batch.prompts, *batch.responses, batch.label, batch.weight, batch.scores, batch.row]


@pytest.mark.parametrize(
    ("prompt", "replies"),
    [("is it?", [" yes", " no, never"]), (CHAT, ["yes", "no"]), ([5, 6], [[7, 8, 9], [10]])],
)
def test_batch_is_that_of_prepared_rows(encoder, prompt, replies):
    if prompt is CHAT and not encoder.tokenizer.chat_template:
        with pytest.raises(InputError, match=r"prompt 0: .*no chat template"):
            data.batch_of_texts(encoder, [prompt], [replies])
        return
    record = {"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}
    (row,) = rows.encode(
        encoder,
        sources.open_source([record]).examples(),
        max_prompt_length=99,
        max_response_length=99,
    )
    assert isinstance(row, rows.Row)
    width = max(map(len, row.responses))
    expected = collate(
        [row],
        Shape(1, -(-len(row.prompt) // 8) * 8, 2, -(-width // 8) * 8),
        numbers=np.zeros(1, np.int64),
        weight=np.ones(1, np.float32),
        pad=encoder.tokenizer.pad_token_id or 0,
    )
    got = data.batch_of_texts(encoder, [prompt], [replies])
    equal(leaves(got), leaves(expected))
    equal(leaves(data.batch_of_texts(encoder.tokenizer, [prompt], [replies])), leaves(got))


def test_order_scores_and_what_training_would_drop_are_kept(byte_level):
    encoder = tokenize.encoder(byte_level)
    got = data.batch_of_texts(
        encoder,
        ["a", "b"],
        [[" same", " same", ""], [" one"]],
        scores=[[0.5, 2.0, -1.0], [3.0]],
        weight=[1.0, 0.25],
        label=[0.75, 1.0],
        max_response_length=2,
    )
    assert got.responses.ids.shape == (2, 3, 8)
    assert got.responses.lengths.tolist() == [[2, 2, 1], [2, 0, 0]]
    assert got.responses.ids[0, 2, 0] == encoder.end
    assert got.responses.ids[0, 0, :2].tolist() == encoder.response(" same")[:2]
    assert got.scores.tolist() == [[0.5, 2.0, -1.0], [3.0, 0.0, 0.0]]
    assert (got.weight.tolist(), got.label.tolist()) == ([1.0, 0.25], [0.75, 1.0])
    pair = data.batch_of_texts(encoder, ["a"], [[" x", " y"]])
    assert pair.scores.tolist() == [[1.0, 0.0]]
    alone = data.batch_of_texts(encoder, ["a b c d"], [[]], max_prompt_length=3)
    assert alone.responses.ids.shape[1] == 0
    assert alone.prompts.lengths.tolist() == [3]


def test_a_raw_tokenizer_would_have_gone_wrong(byte_level):
    got = data.batch_of_texts(byte_level, ["a"], [[" yes</s>"]])
    raw = byte_level(" yes</s>")["input_ids"]
    ids = got.responses.ids[0, 0, : got.responses.lengths[0, 0]].tolist()
    assert raw[0] == byte_level.bos_token_id
    assert ids != raw
    assert ids.count(byte_level.eos_token_id) == 1  # its own, not the word's
    assert ids[-1] == byte_level.eos_token_id


def test_what_does_not_fit_is_named(byte_level, no_begin):
    with pytest.raises(ValueError, match="responses has 1 entries for 2 prompts"):
        data.batch_of_texts(byte_level, ["a", "b"], [["c"]])
    with pytest.raises(ValueError, match="prompt 0 has 1 responses, 2 scores"):
        data.batch_of_texts(byte_level, ["a"], [["c"]], scores=[[1.0, 2.0]])
    with pytest.raises(InputError, match="prompt 1: empty"):
        data.batch_of_texts(no_begin, ["a", ""], [["c"], ["d"]])
    with pytest.raises(InputError, match=r"prompt 0.*surrogate"):
        data.batch_of_texts(byte_level, ["\ud800"], [["c"]])
    with pytest.raises(ValueError, match="no prompt"):
        data.batch_of_texts(byte_level, [], [])
