"""One record to one example, and messages that name place, column and remedy."""

import re

import numpy as np
import pytest

from jax_klrlhf.columns import Columns
from jax_klrlhf.data.examples import Example, parse
from jax_klrlhf.errors import InputError


def read(record, **columns):
    return parse(record, columns=Columns(**columns), where="a.jsonl, line 3")


def test_pair():
    got = read({"prompt": "p", "chosen": "c", "rejected": "r", "other": 1})
    assert got == Example("p", ["c", "r"], [1.0, 0.0], 1.0, 1.0, "a.jsonl, line 3")


def test_missing_or_null_prompt_is_implicit():
    assert read({"chosen": "pc", "rejected": "pr"}).prompt is None
    assert read({"prompt": None, "chosen": "pc", "rejected": "pr"}).prompt is None


def test_scored_and_ranked_responses_come_best_first():
    scored = read({"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.5, 2, -1]})
    assert (scored.responses, scored.scores) == (["b", "a", "c"], [2.0, 0.5, -1.0])
    ranked = read({"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]})
    assert (ranked.responses, ranked.scores) == (["b", "a", "c"], [-1.0, -2.0, -3.0])


def test_equal_scores_keep_their_order():
    got = read({"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 1, 2]})
    assert got.responses == ["c", "a", "b"]


def test_prompt_alone_and_single_response():
    assert read({"prompt": "p"}).responses == []
    assert read({"prompt": "p", "response": "r"}).responses == ["r"]


def test_columns_by_other_names():
    got = read(
        {"question": "p", "win": "c", "lose": "r"}, prompt="question", chosen="win", rejected="lose"
    )
    assert (got.prompt, got.responses) == ("p", ["c", "r"])


def test_label_and_weight():
    got = read({"prompt": "p", "chosen": "c", "rejected": "r", "label": 0.7, "weight": 2})
    assert (got.label, got.weight) == (0.7, 2.0)


def test_token_ids_from_arrays():
    got = read({"prompt": np.array([1, 2]), "chosen": [3], "rejected": (4,)})
    assert (got.prompt, got.responses) == ([1, 2], [[3], [4]])


USER = {"role": "user", "content": "u"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def test_chat_with_implicit_prompt_is_the_messages_in_common():
    got = read({"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]})
    assert got.prompt == [USER, YES, USER]
    assert got.responses == [[YES], [NO]]


def test_chat_with_identical_replies_keeps_a_reply():
    got = read({"chosen": [USER, YES], "rejected": [USER, YES]})
    assert (got.prompt, got.responses) == ([USER], [[YES], [YES]])


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
BAD = {
    "column missing": ({"prompt": "p", "chosen": "c"}, "'rejected' is missing beside 'chosen'"),
    "column null": ({**PAIR, "chosen": None}, "'chosen' is null beside 'rejected'"),
    "no known column": ({"text": "p"}, "no column 'prompt'.*columns found: 'text'.*columns="),
    "number": ({**PAIR, "prompt": 3}, "column 'prompt': expected text.*found 3"),
    "mixed list": ({**PAIR, "chosen": ["a", 1]}, "column 'chosen': expected text"),
    "boolean ids": ({**PAIR, "chosen": [True]}, "column 'chosen': expected text"),
    "no role": ({**PAIR, "chosen": [{"content": "x"}]}, "'role'.*found keys.*content"),
    "parts": ({**PAIR, "chosen": [{"role": "assistant", "content": []}]}, "needs text under"),
    "two replies": ({**PAIR, "chosen": [YES, NO], "prompt": [USER]}, "one assistant message"),
    "user replies": ({**PAIR, "chosen": [USER], "prompt": [YES]}, "roles .*user"),
    "chat and ids": ({**PAIR, "chosen": [YES], "prompt": [1]}, "beside token ids"),
    "lone message": ({"chosen": [YES], "rejected": [NO]}, "no message before the reply"),
    "no scores": ({"prompt": "p", "responses": ["a"]}, "exactly one of 'scores'.*neither"),
    "both": ({"prompt": "p", "responses": ["a"], "scores": [1], "ranks": [1]}, "exactly one"),
    "count": ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "1 values for 2 responses"),
    "NaN": ({"prompt": "p", "responses": ["a"], "scores": [float("nan")]}, "finite.*nan"),
    "empty list": ({"prompt": "p", "responses": [], "scores": []}, "the list is empty"),
    "text list": ({"prompt": "p", "responses": "a", "scores": [1]}, "expected a list, found 'a'"),
    "two kinds": ({**PAIR, "responses": ["a"], "scores": [1]}, "one kind of responses"),
    "label": ({**PAIR, "label": 1.5}, "'label': 1.5 is not a probability"),
    "label text": ({**PAIR, "label": "x"}, "'label': expected a finite number"),
    "weight": ({**PAIR, "weight": -1}, "weight -1.0 is negative"),
    "implicit from one": ({"response": "r"}, "no prompt.*there are 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_record_is_named_in_one_line(name):
    record, message = BAD[name]
    with pytest.raises(InputError) as caught:
        read(record)
    text = str(caught.value)
    assert text.startswith("a.jsonl, line 3")
    assert "\n" not in text
    assert re.search(message, text), text
