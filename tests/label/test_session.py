"""Who is asked what: sides, repeats, several people, rules; what labels teach, against NumPy."""

import math

import numpy as np
import pytest
import scipy.optimize

from jax_klrlhf import label, labelling
from jax_klrlhf.core import pairs
from jax_klrlhf.label import session as sessions
from jax_klrlhf.labelling import Label, pair_of
from jax_klrlhf.report import serving

PROMPTS = [f"prompt {number}" for number in range(6)]
ANSWERS = [[f"{'good ' * k}answer {k} of {number}" for k in range(4)] for number in range(6)]


@pytest.fixture(scope="module")
def pool():
    return label.Pool.of(PROMPTS, ANSWERS)


def better(ask):
    """Left or right: the one with more of a word."""
    shown = ask.shown()
    return "left" if shown["left"].count("good") > shown["right"].count("good") else "right"


def longer(session, annotator, count):
    """Answers of somebody who likes a word; the names of what was asked."""
    found = []
    for _ in range(count):
        ask = session.next(annotator)
        session.answer(annotator, ask.name, better(ask))
        found.append(ask)
    return found


def waiting(folder, count, *, each=1):
    asked = [pair_of(f"prompt {n}", f"a {n}", f"b {n}")[0] for n in range(count)]
    labelling.write_pairs(folder, asked, each=each)
    return asked


def test_sides_are_shuffled_and_neither_a_reload_nor_a_restart_changes_them(tmp_path):
    asked = waiting(tmp_path, 400)
    session = label.Session(tmp_path)
    sides = [session.side(pair.name, "Ana", 0) for pair in asked]
    # Under a fair coin 400 sides lie 5 standard errors (of 10) off with probability 6e-7.
    assert abs(sides.count("first") - 200) < 50
    other = [session.side(pair.name, "Ben", 0) for pair in asked]
    same = sum(a == b for a, b in zip(sides, other, strict=True))
    assert abs(same - 200) < 50
    ask = session.next("Ana")
    assert session.next("Ana") == ask
    shown = ask.shown()
    assert {shown["left"], shown["right"]} == {ask.pair.first, ask.pair.second}
    assert shown["left"] == getattr(ask.pair, ask.left)
    assert set(shown) == {"ask", "prompt", "left", "right"}
    session.close()
    again = label.Session(tmp_path)
    assert [again.side(pair.name, "Ana", 0) for pair in asked] == sides
    assert again.next("Ana") == ask
    again.close()


@pytest.mark.parametrize("said", ["left", "right", "tie", "skip"])
def test_an_answer_means_what_was_shown(tmp_path, said):
    waiting(tmp_path, 12)
    session = label.Session(tmp_path, repeats=0.0)
    for _ in range(12):
        ask = session.next("Ana")
        found, new = session.answer("Ana", ask.name, said)
        assert new
        texts = {"left": ask.shown()["left"], "right": ask.shown()["right"]}
        if said in texts:
            assert getattr(found.pair, found.answer) == texts[said]
        else:
            assert found.answer == said
    assert session.next("Ana") is None
    session.close()


def test_an_answer_sent_twice_is_one_label_and_is_not_changed(tmp_path):
    waiting(tmp_path, 2)
    session = label.Session(tmp_path)
    ask = session.next("Ana")
    first, new = session.answer("Ana", ask.name, "left")
    again, anew = session.answer("Ana", ask.name, "left")
    assert (new, anew) == (True, False)
    assert again == first
    with pytest.raises(serving.Refused, match="not changed"):
        session.answer("Ana", ask.name, "right")
    for name in ("nobody.0", ask.pair.name, f"{ask.pair.name}.2", f"{ask.pair.name}.x", ".0"):
        with pytest.raises(serving.Refused):
            session.answer("Ana", name, "left")
    with pytest.raises(serving.Refused, match="left, right"):
        session.answer("Ana", ask.name, "first")
    for name in ("", " ", "x" * 61, "a\nb", "\x1b[0m"):
        with pytest.raises(serving.Refused, match="a name"):
            session.next(name)
    assert len(labelling.read_labels(tmp_path)) == 1
    session.close()


def test_several_people_share_pairs_or_are_each_asked_of_all(tmp_path):
    asked = waiting(tmp_path / "shared", 6)
    session = label.Session(tmp_path / "shared", repeats=0.0)
    seen = [session.next(name).pair.name for name in ("Ana", "Ben", "Cleo")]
    assert len(set(seen)) == 3  # what one looks at is not shown to another
    for name in ("Ana", "Ben", "Cleo"):
        session.answer(name, session.next(name).name, "skip")
    longer(session, "Ana", 3)
    assert session.next("Ben") is None
    assert {x.pair.name for x in session.labels.all} == {pair.name for pair in asked}
    session.close()

    waiting(tmp_path / "each", 3, each=2)
    session = label.Session(tmp_path / "each", repeats=0.0)
    longer(session, "Ana", 3)
    longer(session, "Ben", 3)
    assert [session.next(name) for name in ("Ana", "Ben", "Cleo")] == [None] * 3
    session.close()


def test_repeats_come_with_sides_exchanged_and_measure_agreement(tmp_path):
    waiting(tmp_path, 40)
    session = label.Session(tmp_path, repeats=0.25)
    number = 0
    while (ask := session.next("Ana")) is not None:
        # Always the left one: who does not look contradicts himself, sides being exchanged.
        session.answer("Ana", ask.name, "left")
        number += 1
    said = session.labels.all
    repeated = [x for x in said if x.repeat]
    assert len({x.pair.name for x in said}) == 40
    assert len(repeated) == pytest.approx(0.25 * number, abs=1)
    firsts = {x.pair.name: (at, x) for at, x in enumerate(said) if not x.repeat}
    for at, x in enumerate(said):
        if x.repeat:
            before, first = firsts[x.pair.name]
            assert first.left != x.left
            assert at - before > sessions.GAP
    found = sessions.agreement(said)
    assert found["itself"]["share"] == 0.0
    assert found["itself"]["count"] == len(repeated)
    assert found["left"]["share"] == 1.0
    session.close()


def test_agreement_by_hand():
    pair, other = (pair_of("p", "a", text)[0] for text in ("b", "c"))
    of = lambda pair, who, answer, repeat=0: Label(pair, who, repeat, answer, "first")  # noqa: E731
    found = sessions.agreement(
        [
            of(pair, "Ana", "first"), of(pair, "Ben", "first"), of(pair, "Cleo", "second"),
            of(other, "Ana", "tie"), of(other, "Ben", "skip"), of(pair, "Ana", "first", 1),
            of(other, "Ana", "first", 1),
        ]
    )  # fmt: skip
    assert (found["itself"]["share"], found["itself"]["count"]) == (0.5, 2)
    assert (found["others"]["share"], found["others"]["count"]) == (pytest.approx(1 / 3), 3)
    assert (found["left"]["share"], found["left"]["count"]) == (0.8, 5)
    # Wilson, by its formula.
    n, p, z = 5, 0.8, 1.96
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert found["left"]["low"] == pytest.approx(centre - half)
    assert sessions.agreement([])["itself"] is None


def test_the_most_uncertain_pair_is_asked_and_what_labels_teach_is_numpys(pool, tmp_path):
    session = label.Session(tmp_path, pool=pool, repeats=0.0, ridge=0.3)
    rows = pool.rows()
    z, y = [], []
    for step in range(9):
        ask = session.next("Ana")
        # By brute force over every pair of every prompt, in float64.
        theta = _fit(z, y, 0.3, pool.features.shape[1])
        precision = 0.3 * np.eye(len(theta)) + sum(np.outer(a, a) for a in z)
        best, mine = 0.0, None
        for prompt, some in zip(PROMPTS, ANSWERS, strict=True):
            gains = {}
            for i in range(4):
                for j in range(i):
                    a, b = (pool.features[rows[repr(prompt), some[k]]] for k in (i, j))
                    d = a.astype(np.float64) - b
                    p = 1 / (1 + math.exp(-d @ theta))
                    gains[pair_of(prompt, some[i], some[j])[0].name] = (
                        p * (1 - p) * d @ np.linalg.solve(precision, d)
                    )
            mine = gains.get(ask.pair.name, mine)
            first = max(gains, key=gains.get)
            if session.labels.find(first, "Ana", 0) is None:
                best = max(best, gains[first])
        assert mine == pytest.approx(best, rel=1e-3), step
        said, _ = session.answer("Ana", ask.name, "tie" if step == 4 else better(ask))
        first, second = (
            pool.features[rows[repr(ask.pair.prompt), text]].astype(np.float64)
            for text in (ask.pair.first, ask.pair.second)
        )
        z.append(first - second)
        y.append({"first": 1.0, "second": 0.0, "tie": 0.5}[said.answer])
    found = session.teaching()
    theta = _fit(z, y, 0.3, len(theta))
    precision = 0.3 * np.eye(len(theta)) + sum(np.outer(a, a) for a in z)
    information = np.linalg.slogdet(precision)[1] - len(theta) * math.log(0.3)
    curve = found["curve"]
    assert curve["count"] == list(range(10))
    assert curve["information"][-1] == pytest.approx(information, rel=1e-3)
    assert curve["information"][0] == pytest.approx(0, abs=1e-4)
    assert all(np.diff(curve["information"]) > 0)
    assert all(np.diff(curve["width"]) <= 1e-6)
    hessian = 0.3 * np.eye(len(theta))
    for a in z:
        p = 1 / (1 + math.exp(-a @ theta))
        hessian += p * (1 - p) * np.outer(a, a)
    features = pool.features.astype(np.float64).reshape(6, 4, -1)
    centred = features - features.mean(1, keepdims=True)
    for row in found["answers"]:
        number = PROMPTS.index(row["prompt"])
        phi = centred[number, ANSWERS[number].index(row["text"])]
        assert row["reward"] == pytest.approx(phi @ theta, abs=2e-3)
        assert row["stderr"] == pytest.approx(math.sqrt(phi @ np.linalg.solve(hessian, phi)), 1e-3)
    # Somebody who likes a word is understood, also of answers that were not compared.
    best = found["answers"][0]
    assert best["text"].count("good") == 3
    session.close()


def _fit(z, y, ridge, dim):
    if not z:
        return np.zeros(dim)
    z, y = np.array(z), np.array(y)

    def objective(theta):
        margin = z @ theta
        loss = np.logaddexp(0, -margin) * y + np.logaddexp(0, margin) * (1 - y)
        p = 1 / (1 + np.exp(-margin))
        return loss.sum() + ridge / 2 * theta @ theta, z.T @ (p - y) + ridge * theta

    return scipy.optimize.minimize(objective, np.zeros(dim), jac=True, tol=1e-12).x


def test_best_and_worst_is_asked_by_what_labels_have_taught(pool, tmp_path):
    rule = pairs.otherwise(pairs.best_worst, pairs.sampled)
    session = label.Session(tmp_path, pool=pool, rule=rule, repeats=0.0)
    asked = longer(session, "Ana", 12)
    # Round the prompts.
    assert len({ask.pair.prompt for ask in asked[:6]}) == 6
    rewards = {(a["prompt"], a["text"]): a["reward"] for a in session.teaching()["answers"]}
    ask = session.next("Ana")
    of_prompt = {text: r for (prompt, text), r in rewards.items() if prompt == ask.pair.prompt}
    two = {max(of_prompt, key=of_prompt.get), min(of_prompt, key=of_prompt.get)}
    seen = any({x.pair.first, x.pair.second} == two for x in session.labels.all)
    assert seen or {ask.pair.first, ask.pair.second} == two
    session.close()


def test_every_pair_is_asked_once_and_then_none(pool, tmp_path):
    session = label.Session(tmp_path, pool=pool, rule=pairs.sampled, repeats=0.0)
    asked = longer(session, "Ana", 36)
    assert len({ask.pair.name for ask in asked}) == 36
    assert session.next("Ana") is None
    assert session.next("Ben") is None
    session.close()
    # A page that was open when the server was restarted is still answered.
    again = label.Session(tmp_path, pool=pool, rule=pairs.sampled, each=2)
    assert again.answer("Ben", asked[0].name, "tie")[1]
    again.close()


def test_word_features_are_principal_components_of_the_words():
    answers = [("p", text) for text in ("a b", "a b c", "c c d", "d", "")]
    found = label.pool.word_features(answers, dim=3)
    counts = np.log1p(
        np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 2, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    )
    table = counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12)
    table -= table.mean(0)
    left, values, _ = np.linalg.svd(table, full_matrices=False)
    np.testing.assert_allclose(np.abs(found[:, :3]), np.abs(left * values)[:, :3], atol=1e-9)
    wide = label.pool.word_features([("p", f"w{k} x{k} y{k}") for k in range(3)], dim=2)
    assert wide.shape == (3, 3)
    assert np.isfinite(wide).all()


def test_a_pool_reads_what_generate_eval_and_preferences_write(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"prompt": "p", "model": "m", "answers": ["a", "b"], "tokens": [1, 1]}\n'
        '{"prompt": "p", "model": "n", "answers": ["b", "c"], "tokens": [1, 1]}\n'
        '{"prompt": "q", "policy": ["d"], "reference": ["e"], "policy/reward": [1.0]}\n'
        '{"prompt": [{"role": "user", "content": "r"}], '
        '"chosen": [{"role": "assistant", "content": "f"}], "rejected": "g"}\n'
        '{"prompt": "s", "policy": "a name", "text": "h"}\n'
    )
    pool = label.Pool.read(path)
    assert list(pool.prompts) == ["p", "q", [{"role": "user", "content": "r"}]]
    assert list(pool.answers) == [["a", "b", "c"], ["d", "e"], ["f", "g"]]
    assert np.linalg.norm(pool.features, axis=1).max() == pytest.approx(1, rel=1e-6)
    path.write_text('{"prompt": "p", "answers": ["a", 3]}\n')
    with pytest.raises(label.labelling.InputError, match=r"line 1, column 'answers'"):
        label.Pool.read(path)
    path.write_text('{"prompt": "p", "answers": ["a"]}\n')
    with pytest.raises(label.labelling.InputError, match="no prompt has two"):
        label.Pool.read(path)
