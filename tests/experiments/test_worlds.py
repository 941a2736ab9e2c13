"""Gold rewards, prompts and the grammar that the experiments stand on."""

import math

import numpy as np
import pytest

from experiments import gold, prompts
from experiments.quickstart import grammar
from jax_klrlhf.errors import InputError


def test_a_word_reward_adds_weights_over_the_root_of_the_word_count():
    reward = gold.WordReward({"good": 2.0, "bad": -1.0})
    found = reward(["Good, good! bad thing", "", "nothing here"])
    np.testing.assert_allclose(found, [(2 + 2 - 1) / math.sqrt(4), 0, 0], rtol=1e-6)


def test_sentiment_weights_are_the_smoothed_log_odds(tmp_path):
    (tmp_path / "positive.txt").write_text("good good plot\n")
    (tmp_path / "negative.txt").write_text("bad plot\n")
    weights = gold.fit_sentiment(tmp_path).weights
    # three words in the vocabulary; 3 + 3 and 2 + 3 smoothed tokens
    assert weights["good"] == pytest.approx(math.log((3 / 6) / (1 / 5)))
    assert weights["bad"] == pytest.approx(math.log((1 / 6) / (2 / 5)))
    assert weights["plot"] == pytest.approx(math.log((2 / 6) / (2 / 5)))


def test_a_reward_with_one_class_or_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        gold.fit_sentiment(tmp_path / "absent")
    (tmp_path / "positive.txt").write_text("good\n")
    with pytest.raises(InputError, match=r"negative\.txt: missing"):
        gold.fit_sentiment(tmp_path)
    (tmp_path / "negative.txt").write_text(" 12 \n")
    with pytest.raises(InputError, match=r"negative\.txt: no words"):
        gold.fit_sentiment(tmp_path)


def test_the_real_gold_reward_tells_the_classes_apart(data_dir):
    reward = gold.fit_sentiment(data_dir / "sentiment")
    rows = {
        name: (data_dir / "sentiment" / f"{name}.txt").read_text(errors="replace").splitlines()
        for name in ("positive", "negative")
    }
    accuracy = np.mean(
        [np.mean(reward(rows["positive"]) > 0), np.mean(reward(rows["negative"]) < 0)]
    )
    assert accuracy > 0.85  # fitted and judged on the same rows: a sanity check, chance is 0.5


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n"])
def test_prompts_are_the_distinct_first_sentences_and_end_in_a_space(tmp_path, separator):
    story = "Once there was\na little boy named Ben. He ran. "
    other = '"I want to go to the sea!" she said. Then she left. '
    path = tmp_path / "stories.txt"
    path.write_text(separator.join([story, other, story, "short."]))
    assert prompts.first_sentences(path) == [
        "Once there was a little boy named Ben. ",
        '"I want to go to the sea!" ',
    ]


def test_prompt_files_that_cannot_serve_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        prompts.first_sentences(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"empty\.txt: no sentence"):
        prompts.first_sentences(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        prompts.first_sentences(tmp_path / "binary.txt")


def test_the_split_is_disjoint_reproducible_and_refuses_too_few():
    rows = [f"prompt {i} " for i in range(10)]
    train, held_out = prompts.split(rows, train=6, held_out=4, seed=3)
    assert sorted(train + held_out) == sorted(rows)
    assert prompts.split(rows, train=6, held_out=4, seed=3) == (train, held_out)
    with pytest.raises(InputError, match=r"10 prompts, but 6 \+ 5"):
        prompts.split(rows, train=6, held_out=5, seed=3)


def test_the_grammar_leaves_room_between_pi0_and_the_optimum():
    rows = grammar.stories(400, seed=0)
    assert rows == grammar.stories(400, seed=0) != grammar.stories(400, seed=1)
    rewards = grammar.gold_reward()([response for _, response in rows])
    assert all(response.startswith(" ") and prompt.endswith(".") for prompt, response in rows)
    # a happy word needs a happy event: the mean is below the best by several deviations
    assert rewards.max() - rewards.mean() > 2 * rewards.std() > 0
    # the gold words all occur, so that no weight is dead
    text = " ".join(response for _, response in rows)
    assert all(word in text.lower() for word in grammar.gold_reward().weights)
