"""Ranked responses to pairs and back, against counting by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_klrlhf.data import arrange, prepare, sources
from jax_klrlhf.data.examples import Example

RANKED = Example("p", ["a", "b", "c", "d"], [3.0, 1.0, 1.0, 0.0], where="line 1")


def responses(examples):
    return [tuple(example.responses) for example in examples]


def test_best_against_worst():
    alone = Example("q", ["a"], [0.0])
    tied = Example("q", ["a", "b"], [1.0, 1.0])
    (pair,) = arrange.best_worst([RANKED, alone, tied])
    assert pair == Example("p", ["a", "d"], [3.0, 0.0], where="line 1")


def test_all_pairs_but_the_tied():
    want = [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    assert responses(arrange.all_pairs([RANKED])) == want


@given(
    scores=st.lists(st.integers(0, 9), min_size=2, max_size=6, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_pairs_of_a_ranking_group_back_to_it(scores, order):
    ranking = sorted(scores, reverse=True)
    example = Example("p", [f"r{s}" for s in ranking], [float(s) for s in ranking])
    pairs = list(arrange.all_pairs([example]))
    order.shuffle(pairs)
    (back,) = arrange.grouped(pairs)
    assert back.responses == example.responses
    assert back.scores == sorted(back.scores, reverse=True)


def test_groups_keep_prompts_apart_and_implicit_prompts_alone():
    pairs = [
        Example("p", ["a", "b"], [1.0, 0.0], weight=1.0),
        Example("q", ["a", "b"], [1.0, 0.0]),
        Example("p", ["b", "c"], [1.0, 0.0], weight=3.0),
        Example(None, ["pa", "pb"], [1.0, 0.0]),
        Example(None, ["pa", "pb"], [1.0, 0.0]),
    ]
    got = list(arrange.grouped(pairs))
    assert responses(got) == [("a", "b", "c"), ("a", "b"), ("pa", "pb"), ("pa", "pb")]
    assert got[0].scores == [1.0, 0.0, -1.0]
    assert got[0].weight == 2.0


def test_arrangement_is_part_of_the_recipe(byte_level, tmp_path):
    records = [{"prompt": "p", "responses": [" a", " b", " c"], "scores": [3, 2, 1]}]
    lengths = {"max_prompt_length": 8, "max_response_length": 8}
    folder = tmp_path / "out"
    split = prepare.build(records, byte_level, folder, arrange=arrange.all_pairs, **lengths)
    assert len(split["train"]) == 3
    with pytest.raises(prepare.InputError, match=r"arrange .*all_pairs .now .*as_is"):
        prepare.build(records, byte_level, folder, **lengths)
    with pytest.raises(ValueError, match="no name of its own"):
        prepare.build(records, byte_level, folder, arrange=lambda e: iter(e), **lengths)


def test_real_pairs_of_a_ranking_are_all_in_its_order(data_dir):
    # Every human comparison of qa_feedback must agree with the row that it was grouped into.
    pairs = list(sources.open_source(data_dir / "preferences/qa_feedback.jsonl.gz").examples())
    groups = {example.prompt: example for example in arrange.grouped(pairs)}
    assert len(groups) == 488
    assert {len(example.responses) for example in groups.values()} <= {2, 3, 4}
    for pair in pairs:
        group = groups[pair.prompt]
        rank = [group.scores[group.responses.index(response)] for response in pair.responses]
        assert rank[0] > rank[1]
