"""A judge with a tokenizer of its own reads the same text as one with the policy's."""

import numpy as np
import pytest

from jax_klrlhf.data import tokenize
from jax_klrlhf.programs.iterate_parts import translation
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.parts import ragged

TEXTS = ["the cat sat on the mat", "a bat ate the rat", "no, never", "that hat"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    made = []
    for texts, size in ((TEXTS, 300), (TEXTS[::-1] * 3 + ["that bat"], 275)):
        folder = tmp_path_factory.mktemp("tokenizer")
        made.append(
            tokenize.encoder(tokenize.train_tokenizer(texts, vocab_size=size, folder=folder))
        )
    return made


def rows(lists):
    width = max(map(len, lists)) + 2
    return [[*row, *[7] * (width - len(row))] for row in lists], [len(row) for row in lists]


def test_a_judge_of_another_vocabulary_reads_the_text(encoders):
    ours, theirs = encoders
    assert ours.continuation.get_vocab() != theirs.continuation.get_vocab()
    prompts = [ours.prompt(text) for text in TEXTS[:2]]
    answers = [ours.response(" " + text) for text in TEXTS]
    answers[3] = answers[3][:-1]  # cut off: no end token
    seen = []

    def judge(asked, said):
        """Counts letters a, and says what it read."""
        assert np.asarray(said.ids).shape[1] == 1
        found = []
        for row, length, reply, size in zip(
            asked.ids, asked.lengths, said.ids[:, 0], said.lengths[:, 0], strict=True
        ):
            reply = reply[:size].tolist()
            text = theirs.decode(reply)
            seen.append((theirs.decode(row[:length].tolist()), text, theirs.end in reply))
            found.append([text.count("a")])
        return np.array(found, np.float32)

    ids, lengths = rows(answers)
    read = oracle.retokenized(judge, translation(ours, theirs), longest=64)
    responses = ragged(np.reshape(ids, (2, 2, -1)), np.reshape(lengths, (2, 2)))
    found = read(ragged(*rows(prompts)), responses)
    assert seen == [(TEXTS[k // 2], " " + text, k != 3) for k, text in enumerate(TEXTS)]
    assert found.tolist() == [[text.count("a") for text in TEXTS[k : k + 2]] for k in (0, 2)]


def test_what_is_too_long_for_the_judge_loses_the_beginning_of_its_prompt():
    kept = []

    def judge(prompts, responses):
        kept.append((prompts, responses))
        return np.zeros(responses.lengths.shape)

    same = lambda prompt, answer: (prompt, answer)  # noqa: E731
    read = oracle.retokenized(judge, same, longest=8)
    read(ragged([[1, 2, 3, 4, 5, 6]], [6]), ragged([[list(range(3)), [9] * 3]], [[3, 1]]))
    read(ragged([[1, 2]], [2]), ragged([[list(range(20)), [9] * 20]], [[20, 0]]))
    first, second = kept
    assert [row[:n].tolist() for row, n in zip(first[0].ids, first[0].lengths, strict=True)] == [
        [2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6],
    ]
    assert second[0].ids[0, : second[0].lengths[0]].tolist() == [2]
    assert second[1].lengths.tolist() == [[7], [0]]
