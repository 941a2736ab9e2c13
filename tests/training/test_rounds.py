"""An iterative run: what it leaves on disk, and that a killed one goes on to the same bits.

Where the run is broken off: in every phase of every round, before its arrays are written, between
arrays and manifest, and after both; inside a fit; and by SIGKILL, in a process of its own.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_klrlhf.core import pairs
from jax_klrlhf.errors import InputError
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import journal, oracle, settings
from jax_klrlhf.training.rounds.parts import ragged
from tests.training import rounds_world as world

PHASES = ("sample", "score", "pair", "label", "believe", "fit")
ALL = ["0/believe", "0/fit"] + [f"{number}/{phase}" for number in (1, 2) for phase in PHASES]
ROUND = {
    "sampler": rounds.main_agent(world.DRAW),
    "reward": rounds.linear(world.counts, dim=world.VOCAB, ridge=1.0, radius=0.5),
    "pair_rule": pairs.best_worst,
    "oracle": oracle.bradley_terry(world.gold),
}
IMPROVE = rounds.pessimistic_dpo(world.MODEL, kl_coef=world.KL_COEF, fitting=world.FITTING)


def make_offline():
    """Pairs of pi0's own draws, two of its four at random."""
    return rounds.collect(
        jax.random.key(9), world.PARAMS, prompts=world.PROMPTS,
        **{**ROUND, "pair_rule": pairs.sampled},
    )  # fmt: skip


@pytest.fixture(scope="module")
def offline():
    return make_offline()


def run(output, offline, **changes):
    return rounds.iterate(
        jax.random.key(3), world.PARAMS, prompts=world.PROMPTS, offline=offline, output=output,
        setting=settings.hybrid(0.5),
        **{**ROUND, "improve": IMPROVE, "rounds": 2, "config": world.KL_COEF, **changes},
    )  # fmt: skip


def same(first, second):
    """Every number that comes out of two runs, to the bit."""
    trees = [
        (r.policy, r.belief, list(r.comparisons), list(r.policies), [dict(m) for m in r.metrics])
        for r in (first, second)
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def whole(offline):
    """The run in memory, never interrupted."""
    return run(None, offline)


class Killed(BaseException):
    """Nothing in the library catches it."""


@pytest.mark.parametrize(
    "where", ["before", *(pytest.param(at, marks=pytest.mark.slow) for at in ("between", "after"))]
)
def test_a_run_broken_off_in_any_phase_goes_on_to_the_same_bits(
    where, tmp_path, offline, whole, monkeypatch
):
    assert whole.computed == ALL
    write, write_json = journal.Journal._write, journal.write_json
    for number, broken in enumerate(ALL):
        folder = tmp_path / str(number)
        place = folder / f"round-{int(broken[0]):03d}" / broken[2:]

        def breaking(self, base, *rest, place=place):
            if base != place:
                return write(self, base, *rest)
            if where == "before":
                raise Killed
            if where == "between":
                monkeypatch.setattr(journal, "write_json", die)
            write(self, base, *rest)
            raise Killed

        def die(*arguments):
            raise Killed

        monkeypatch.setattr(journal.Journal, "_write", breaking)
        with pytest.raises(Killed):
            run(folder, offline)
        monkeypatch.setattr(journal.Journal, "_write", write)
        monkeypatch.setattr(journal, "write_json", write_json)
        resumed = run(folder, offline)
        left = ALL[number + 1 :] if where == "after" else ALL[number:]
        assert resumed.computed == left
        same(resumed, whole)


def test_the_belief_is_of_all_comparisons_so_far_and_scores_what_is_drawn(
    offline, tmp_path, capsys
):
    run(tmp_path, offline)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert [line.split()[1] for line in lines] == ["0/2", "1/2", "2/2"]
    known = [offline]
    for number in (0, 1, 2):
        folder = tmp_path / f"round-{number:03d}"
        if number:
            score = journal.safetensors.numpy.load_file(folder / "score.safetensors")
            drawn = journal.safetensors.numpy.load_file(folder / "sample.safetensors")
            expected = ROUND["reward"].score(
                belief,
                world.policies(),
                *(ragged(drawn[f"{x}/ids"], drawn[f"{x}/lengths"]) for x in ROWS),
            )
            np.testing.assert_array_equal(score["reward"], expected.reward)
            np.testing.assert_array_equal(score["uncertainty"], expected.uncertainty)
            label = journal.safetensors.numpy.load_file(folder / "label.safetensors")
            rows = (ragged(label[f"{x}/ids"], label[f"{x}/lengths"]) for x in ROWS)
            known.append(rounds.Comparisons(*rows, label["label"], label["weight"]))
        belief = ROUND["reward"].fit(None, None, known, world.policies())
        found = journal.safetensors.numpy.load_file(folder / "believe.safetensors")
        np.testing.assert_array_equal(found["theta"], belief.theta)
        assert np.any(found["theta"] != 0)


ROWS = ("prompts", "responses")


def refuse(*arguments):
    raise AssertionError("asked to compute what is on disk")


def test_a_finished_run_is_read_and_not_run_again(tmp_path, offline, whole):
    run(tmp_path, offline)
    parts = dict.fromkeys(("sampler", "oracle", "pair_rule", "improve"), refuse)
    reward = dataclasses.replace(ROUND["reward"], fit=refuse, score=refuse)
    again = run(tmp_path, offline, reward=reward, **parts)
    assert again.computed == []
    same(again, whole)
    manifest = json.loads((tmp_path / "round-001" / "label.json").read_text())
    assert set(manifest) == {"inputs", "content", "seconds", "metrics", "seal"}
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("fits")]


def test_another_run_and_a_damaged_result_are_refused_by_name(tmp_path, offline):
    run(tmp_path, offline)
    with pytest.raises(InputError, match="another config"):
        run(tmp_path, offline, config=0.1)
    with pytest.raises(InputError, match="another offline data"):
        run(tmp_path, offline._replace(label=1 - offline.label))
    for file, change, error in [
        ("label.safetensors", lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:], "damaged"),
        ("sample.safetensors", lambda b: b[: len(b) // 2], "damaged"),
    ]:
        path = tmp_path / "round-001" / file
        kept = path.read_bytes()
        path.write_bytes(change(kept))
        with pytest.raises(InputError, match=error):
            run(tmp_path, offline)
        path.write_bytes(kept)
    (tmp_path / "round-001" / "pair.json").unlink()
    resumed = run(tmp_path, offline)  # The same inputs give the same pairs: what follows fits.
    assert resumed.computed == ["1/pair"]
    path = tmp_path / "round-001" / "score.json"
    path.write_text(path.read_text().replace('"inputs": "', '"inputs": "x'))
    with pytest.raises(InputError, match="damaged or edited"):
        run(tmp_path, offline)


def test_a_fit_broken_off_goes_on_from_its_own_checkpoint(tmp_path, offline, whole):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        if len(seen) == 2:
            raise Killed
        return {}

    fitting = dataclasses.replace(world.FITTING, save_every=2, evaluate_every=2, evaluate=evaluate)
    improve = rounds.pessimistic_dpo(world.MODEL, kl_coef=world.KL_COEF, fitting=fitting)
    changes = {"improve": improve, "rounds": 0}
    with pytest.raises(Killed):
        run(tmp_path, offline, **changes)
    resumed = run(tmp_path, offline, **changes)
    assert seen == [2, 4, 4, 6]  # Killed when it looked at step 4, which had been saved: made up.
    assert resumed.computed == ["0/fit"]
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(resumed.policy),
        jax.device_get(whole.policies[1]),
    )


def test_every_part_is_handed_the_policies_and_data_of_its_round(offline):
    seen = []

    def improve(key, situation):
        seen.append(situation)
        params = jax.tree.map(lambda x: x + 1, situation.policies.current)
        return rounds.Improved(params, {})

    def at(number):
        """pi0 after so many rounds, each of which adds 1."""
        return jax.tree.map(lambda x: x + np.float32(number), world.PARAMS)

    def same(first, second):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # noqa: E731
        jax.tree.map(close, first, second)

    asked = []

    def prompts(number):
        asked.append(number)
        return world.PROMPTS

    found = {}
    for name, reference in (("pi0", rounds.pi0), ("previous", rounds.previous)):
        seen.clear()
        found[name] = rounds.iterate(
            jax.random.key(3), world.PARAMS, prompts=prompts, offline=offline, rounds=2,
            reference=reference, **{**ROUND, "improve": improve},
        )  # fmt: skip
        for number, situation in enumerate(seen):
            # The reference is pi0 in every round, unless the run is the named ablation.
            anchor = at(number if name == "previous" else 0)
            same(situation.policies.reference, anchor)
            same(situation.start, anchor)
            same(situation.policies.current, at(number))
            same(situation.policies.base, world.PARAMS)
            assert len(situation.data.sources) == 1 + number
            assert len(situation.policies.earlier) == 4  # Looked at after the run: all there are.
    assert set(asked) == {0, 1, 2}
    for number, params in enumerate(found["pi0"].policies):
        same(params, at(number))
    with pytest.raises(ValueError, match="nothing to learn from"):
        rounds.iterate(
            jax.random.key(0), world.PARAMS, prompts=world.PROMPTS, rounds=0,
            **{**ROUND, "improve": improve},
        )  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_by_the_system_goes_on_to_the_same_bits(tmp_path, offline, whole):
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_rounds", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": "."},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = run(tmp_path, offline)
    assert resumed.computed == ALL[ALL.index("1/label") :]
    same(resumed, whole)


def main(folder: str) -> None:
    """In the child: SIGKILL while the labels of round 1 are being written."""
    save = journal.safetensors.numpy.save_file

    def breaking(tensors, path):
        save(tensors, path)
        if path.name.startswith("label"):
            os.kill(os.getpid(), signal.SIGKILL)

    journal.safetensors.numpy.save_file = breaking
    run(Path(folder), make_offline())


if __name__ == "__main__":
    main(sys.argv[1])
