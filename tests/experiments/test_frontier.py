"""The frontier experiment: its statistics against independent ones, and a toy run of every part.

The runs share one toy world and one laboratory, so that every program is compiled once.
"""

import base64
import dataclasses
import json
import math
import os
import re
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from experiments.frontier import (
    cells,
    evaluate,
    judges,
    laboratory,
    methods,
    options,
    proxy,
    report,
    run,
    statements,
)
from experiments.frontier import world as worlds
from experiments.frontier.cells import Name
from experiments.frontier.statements import Curve
from experiments.quickstart import grammar
from experiments.quickstart import world as quickstart
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.training.rounds.parts import ragged
from tests.experiments import small
from tests.models import toy

SIZES = options.Sizes(
    labels=16,
    rounds=2,
    train_prompts=8,
    held_out_prompts=6,
    new_tokens=6,
    explore=2,
    propose=2,
    eval_samples=2,
    steps=4,
    batch=8,
    tokens=20,
)
CONFIG = options.Config(
    seeds=2,
    rates=(1e-3,),
    coefficients=(0.5,),
    rejection_coefficients=(0.5,),
    best_of=(2,),
    sizes=SIZES,
)


def _run(config, lab):
    with Progress(console=Console(quiet=True)) as progress:
        return run.run(config, lab, progress)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    rows = grammar.stories(60, seed=0)
    tokenizer = tokenize.train_tokenizer(
        (a + b for a, b in rows), vocab_size=300, folder=tmp_path_factory.mktemp("tokenizer")
    )
    encoder = tokenize.encoder(tokenizer)
    model = toy.language_model(vocab=encoder.vocab_size)
    world = quickstart.World(
        name="toy",
        model=model,
        params=model.init(jax.random.key(0)),
        encoder=encoder,
        gold=grammar.gold_reward(),
        prompts=list(dict.fromkeys(prompt for prompt, _ in rows)),
        pad_id=0,
    )
    other = [prompt.replace("was", "is not") for prompt in world.prompts]
    return worlds.build(world, other, gold_scale=2.0, max_prompt_tokens=48)


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A whole run of one seed, and its laboratory."""
    folder = tmp_path_factory.mktemp("frontier")
    lab = laboratory.laboratory(CONFIG, place, output=folder)
    return folder, lab, _run(dataclasses.replace(CONFIG, seeds=1), lab)


@pytest.mark.slow
def test_every_method_leaves_its_cell_and_spends_the_same_labels(finished):
    _, _, found = finished
    assert {name.method for name in found} == {cells.PI0, cells.BEST_OF, *methods.DEFAULT}
    for name, cell in found.items():
        assert cell.held_out.gold.shape == cell.ood.gold.shape == (SIZES.held_out_prompts,)
        # KL is a sum of exact divergences: never negative, but for rounding.
        assert cell.held_out.kl.min() > -1e-4
        asked = sum(r["labels/count"].value for r in cell.rounds if "labels/count" in r)
        if name.method.startswith("online GSHF-DPO") or name.method == "moving reference":
            assert asked == SIZES.labels
        elif name.method == "hybrid GSHF-DPO":
            assert asked == SIZES.labels // 2
            assert len(cell.rounds) == 1 + SIZES.rounds
        elif name.method == "offline DPO, best and worst":
            assert asked == SIZES.labels // 2
            assert len(cell.rounds) == 2
        else:
            assert asked == 0
    chain = found[Name("multi-step RSO", 0.5, 0)].rounds[-1]
    rates = [chain[f"rejection/acceptance/{i}"].value for i in (1, 2)]
    assert all(0 < rate <= 1 for rate in rates)
    base = found[Name(cells.PI0, 0.0, 0)].held_out
    assert np.abs(base.kl).max() < 1e-4
    best = found[Name(cells.BEST_OF, 2.0, 0)].held_out
    np.testing.assert_allclose(best.kl, math.log(2) - 1 / 2)
    assert np.isnan(best.entropy).all()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_comes_to_the_same_cells(finished, place, monkeypatch):
    folder, lab, found = finished
    name = Name("online GSHF-DPO", 0.5, 0)
    path = folder / "cells" / f"{name.stem}.json"
    # What is on disk is what was returned, and is not computed again.
    kept = lab.read(name)
    for at in ("held_out", "ood"):
        for one, two in zip(getattr(kept, at), getattr(found[name], at), strict=True):
            np.testing.assert_array_equal(one, two)
    path.unlink()

    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "judge", killed)
        with pytest.raises(KeyboardInterrupt):
            lab.run(name)
    assert not path.exists()
    rounds_folder = folder / "cells" / f"{name.stem}.rounds"
    phases = {p: p.stat().st_mtime_ns for p in rounds_folder.rglob("fit.safetensors")}
    assert len(phases) == SIZES.rounds
    ran = []
    inner = methods.METHODS[name.method]

    def watched(parts, cell):
        outcome = inner.run(parts, cell)
        ran.extend(outcome.computed)
        return outcome

    with monkeypatch.context() as patched:
        patched.setitem(methods.METHODS, name.method, inner._replace(run=watched))
        again = _run(dataclasses.replace(CONFIG, seeds=1), lab)
    assert ran == []  # every phase was read
    assert not rounds_folder.exists()
    for one, two in zip(again[name].held_out, found[name].held_out, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_a_cell_made_of_something_else_or_damaged_is_refused_by_name(finished, place):
    folder, lab, _ = finished
    other = dataclasses.replace(CONFIG, sizes=dataclasses.replace(SIZES, gold_scale=1.0))
    name = Name(cells.PI0, 0.0, 0)
    changed = cells.Lab.__new__(cells.Lab)
    changed.__dict__.update(lab.__dict__)
    changed._identity = lab._identity | {"sizes": dataclasses.asdict(other.sizes)}
    with pytest.raises(InputError, match=r"pi0_0_0\.json: made with another sizes"):
        changed.read(name)
    path = folder / "cells" / f"{name.stem}.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(InputError, match=r"pi0_0_0\.json: damaged"):
        lab.read(name)
    path.write_text(whole)


@pytest.mark.slow
def test_the_program_writes_results_and_one_self_contained_page(finished, place, monkeypatch):
    folder, lab, _ = finished
    monkeypatch.setattr(laboratory, "place", lambda config, progress: place)
    monkeypatch.setattr(laboratory, "laboratory", lambda config, place, output: lab)
    console = Console(width=220, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        path = run.main(dataclasses.replace(CONFIG, seeds=1, output=folder), console=console)
    found = json.loads(path.read_text())["metrics"]
    for method in methods.DEFAULT:
        assert found[f"held-out/{method} kl_coef=0.5/gold"]["n"] == SIZES.held_out_prompts
    assert found["rounds/RSO kl_coef=0.5/rejection_acceptance_1"]["value"] > 0
    # Of one coefficient, no two methods share an interval of KL, and nothing has a number.
    assert not any(name.startswith("statement/") for name in found)
    page = (folder / "report.html").read_text()
    assert "multi-step RSO above RSO, at equal KL" in page
    assert "both have policies on 0.00 nats only" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 4
    assert all(base64.b64decode(i).startswith(b"\x89PNG") for i in images)
    # Nothing else is loaded.
    assert len(re.findall(r"\bsrc=|\bhref=|@import|<script|<link", page)) == len(images)
    assert "undecided" in page  # one seed decides nothing
    assert "undecided" in console.export_text()


@pytest.mark.slow
def test_a_method_takes_the_rate_of_its_least_training_loss(place, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, rates=(1e-3, 1e-2), methods=("offline DPO",), seeds=1)
    lab = laboratory.laboratory(config, place, output=tmp_path)
    found = _run(config, lab)
    stem = Name("offline DPO", 0.5, cells.PILOT).stem
    kept = {rate: tmp_path / "cells" / f"rate_{stem}_{rate:g}.json" for rate in config.rates}
    losses = {rate: json.loads(path.read_text())["loss"] for rate, path in kept.items()}
    best = min(losses, key=lambda rate: losses[rate])
    assert losses[1e-3] != losses[1e-2]
    assert found[Name("offline DPO", 0.5, 0)].rate == best
    assert found[Name(cells.PI0, 0.0, 0)].rate is None
    # Chosen once: what is on disk decides, and no pilot is run again.
    other = next(rate for rate in config.rates if rate != best)
    there = json.loads(kept[other].read_text())
    kept[other].write_text(json.dumps(there | {"loss": -1.0}))
    monkeypatch.setattr(cells.Lab, "_outcome", None)
    assert lab.rate("offline DPO") == other


def test_the_second_judge_knows_the_other_sentences_and_pairs_of_words(tmp_path):
    (tmp_path / "positive.txt").write_text("good day\nnot bad\ngood sun\nnot bad\n")
    (tmp_path / "negative.txt").write_text("bad day\nnot good\nbad rain\nnot good\n")
    found = judges.build(tmp_path)
    # Gold: even lines. By hand: 4 words a class, 5 different ones in all, smoothed by 1.
    assert found.gold.weights["good"] == pytest.approx(math.log(3 / 1))
    assert set(found.gold.weights) == {"good", "bad", "day", "sun", "rain"}
    # The second: odd lines, whose single words say the contrary and whose pairs do not.
    assert found.second.weights["good"] < 0 < found.second.weights["bad"]
    assert found.second.weights["not bad"] > 0 > found.second.weights["not good"]
    assert judges.grams("Not bad, at all") == [
        "not", "bad", "at", "all", "not bad", "bad at", "at all",
    ]  # fmt: skip
    assert found.second(["", "not bad"])[0] == 0


@pytest.mark.slow
def test_a_run_cut_short_is_balanced_and_goes_on(finished, monkeypatch):
    found = cells.names(sweeps={"a": [3.0, 1.0], "b": [0.5]}, best_of=[2], seeds=range(2))
    assert found[:5] == [
        Name(cells.PI0, 0.0, 0),
        Name(cells.BEST_OF, 2.0, 0),
        Name("a", 3.0, 0),
        Name("b", 0.5, 0),
        Name("a", 1.0, 0),
    ]
    assert [name.seed for name in found] == [0] * 5 + [1] * 5
    # Statements use the seeds at which both methods are whole.
    there = dict.fromkeys(found[:-1])
    assert report._seeds(there, "a", "b") == [0]
    assert report._seeds(there, "b") == [0, 1]
    _, lab, kept = finished
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(run.time, "perf_counter", lambda: float(next(clock)))
    reported = []
    with Progress(console=Console(quiet=True)) as progress:
        short = run.run(  # every look at the clock is 100 s later
            dataclasses.replace(CONFIG, minutes=1.0), lab, progress,
            after_seed=lambda there: reported.append(len(there)),
        )  # fmt: skip
    assert short.keys() == kept.keys()  # what was on disk, and no cell of seed 1 begun
    assert reported == [len(kept)]


@pytest.mark.slow
def test_seeds_are_divided_over_processes(tmp_path, monkeypatch):
    rows = small.story_model(tmp_path)
    (tmp_path / "gold").mkdir()
    (tmp_path / "gold" / "positive.txt").write_text("a happy day\nshe smiled\n")
    (tmp_path / "gold" / "negative.txt").write_text("a sad day\nshe cried\n")
    (tmp_path / "other.txt").write_text("\n".join(a + "not " for a, _ in rows))
    asked = dataclasses.replace(
        CONFIG, output=tmp_path / "out", model=tmp_path / "model", workers=2, methods=(),
        prompts=tmp_path / "stories.txt", gold=tmp_path / "gold", ood=tmp_path / "other.txt",
    )  # fmt: skip

    def nothing_left(lab, name):
        raise AssertionError(f"{name} was left to the first process")

    monkeypatch.setattr(cells.Lab, "run", nothing_left)
    before = dict(os.environ)
    path = run.main(asked, console=Console(quiet=True))
    assert os.environ == before
    assert {p.stem for p in (tmp_path / "out" / "cells").glob("*.json")} == {
        f"{name}_{seed}" for name in ("pi0_0", "best-of-n_2") for seed in (0, 1)
    }
    assert json.loads(path.read_text())["seeds"] == [0, 1]


def test_a_failure_in_a_process_is_said_in_one_line(tmp_path):
    absent = tmp_path / "absent"
    asked = dataclasses.replace(
        CONFIG, output=tmp_path / "out", model=absent, prompts=absent, gold=absent, ood=absent,
        workers=2,
    )  # fmt: skip
    with pytest.raises(InputError, match="absent"):
        run.main(asked, console=Console(quiet=True))


def test_rounds_take_turns_of_the_prompts():
    at = methods.portions(ragged(np.arange(5)[:, None], np.ones(5)), 2)
    asked = [at(number).ids[:, 0].tolist() for number in (0, 1, 2, 3)]
    assert asked == [[0, 1], [0, 1], [2, 3], [4, 0]]


def test_best_of_n_keeps_what_is_believed_best():
    """Against the maximum of all draws, taken at once."""

    def draw(key, params, prompts):
        del params
        ids = jax.random.randint(key, (len(prompts.lengths), 3, 2), 0, 100)
        return ragged(ids, np.full(ids.shape[:2], 2))

    def score(prompts, responses):
        del prompts
        return rounds_scored(np.asarray(responses.ids).sum(-1).astype(np.float32))

    def rounds_scored(reward):
        return evaluate.Scored(reward, np.zeros_like(reward))

    prompts, key = ragged([[1], [2]], [1, 1]), jax.random.key(3)
    kept = evaluate.best_of(draw, None, score, n=4)(key, prompts)
    every = np.stack([draw(jax.random.fold_in(key, i), None, prompts).ids for i in range(4)])
    np.testing.assert_array_equal(kept.ids.sum(-1), every.sum(-1).max(0))


@pytest.mark.parametrize("hidden", [False, True])
def test_whitened_features_have_unit_mean_variance_within_prompts(place, hidden):
    world = place.world
    prompts = place.encode(world.prompts[:6])
    draw = np.random.default_rng(0)
    responses = ragged(draw.integers(3, 30, (6, 12, 5)), np.full((6, 12), 5))
    features, dim = proxy.whitened_features(
        world.model, world.params, prompts, responses, tokens=10, hidden=hidden, rows=6
    )
    assert (dim > 10) if hidden else (dim == 10)
    found = features(prompts, responses).astype(np.float64)
    within = found - found.mean(1, keepdims=True)
    covariance = np.einsum("bkd,bke->de", within, within) / (6 * 11)
    # C is shrunk: directions of mean variance have 1 / (1 + shrinkage) of it, smaller ones less.
    assert np.linalg.eigvalsh(covariance * dim).max() < 1
    assert 0.3 < np.trace(covariance) < 1
    np.testing.assert_allclose(found.mean((0, 1)), 0, atol=1e-4)


def test_shares_count_the_tokens_that_are_asked_for():
    responses = ragged([[[5, 7, 5, 9], [7, 7, 7, 7]], [[0, 0, 0, 0], [9, 8, 0, 0]]],
                       [[4, 2], [0, 2]])  # fmt: skip
    found = proxy.shares(responses, np.array([7, 5, 30]))
    np.testing.assert_allclose(found, [[[0.25, 0.5, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]])


@pytest.mark.slow
def test_a_reward_model_can_be_the_proxy(place, tmp_path):
    config = dataclasses.replace(
        CONFIG, seeds=1, first_seed=3, proxy="reward-model", methods=("RSO",),
        rejection_labels="order",
    )  # fmt: skip
    config.check()
    lab = laboratory.laboratory(config, place, output=tmp_path)
    found = _run(config, lab)
    assert {name.seed for name in found} == {3}
    judged = found[Name("RSO", 0.5, 3)]
    assert judged.rounds[-1]["rejection/order"].value == 1  # no two rewards are equal
    assert np.isfinite(judged.held_out.proxy_gain).all()
    assert -1 <= judged.agreement <= 1
    # A folder of cells knows whose proxy they were made with, and what labelled RSO's pairs.
    linear = laboratory.laboratory(
        dataclasses.replace(config, proxy="linear"), place, output=tmp_path
    )
    with pytest.raises(InputError, match="made with another proxy"):
        linear.read(Name("RSO", 0.5, 3))
    soft = dataclasses.replace(config, rejection_labels="expected")
    with pytest.raises(InputError, match=r"labels of RSO's pairs \(order there, expected now\)"):
        laboratory.laboratory(soft, place, output=tmp_path).read(Name("RSO", 0.5, 3))


def test_distinct_n_counts_different_n_grams():
    responses = ragged([[[1, 2, 1, 2], [1, 2, 9, 9]], [[4, 9, 9, 9], [5, 9, 9, 9]]],
                       [[4, 2], [1, 1]])  # fmt: skip
    # 1 2 1 2 | 1 2: two tokens of six; 12 21 12 | 12: two pairs of four
    np.testing.assert_allclose(evaluate.distinct(responses, 1), [2 / 6, 1.0])
    np.testing.assert_allclose(evaluate.distinct(responses, 2), [2 / 4, 0.0])


def _curve(slope, *, seed=0, noise=0.0, coefs=3, prompts=50):
    """pi0 and coefficients at KL 1, 2, ..., whose gain is ``slope`` to the root of the KL."""
    draw = np.random.default_rng(seed)
    kl = np.arange(coefs + 1)[:, None] + 0.1 * draw.normal(size=(coefs + 1, prompts))
    kl = kl - kl.mean(1, keepdims=True) + np.arange(coefs + 1)[:, None]
    clean = slope * np.arange(coefs + 1)[:, None] ** 0.5
    error = noise * draw.normal(size=(coefs + 1, prompts))
    return Curve(kl, clean + error - error.mean(1, keepdims=True))


def test_frontiers_are_compared_over_the_kl_that_both_reach():
    better, worse = [_curve(2.0, seed=s, coefs=4) for s in (1, 2)], [_curve(0.5)] * 2
    found = statements.compare("", better, worse)
    # f1 - f2 = 1.5 sqrt(u) on [0, 3]: mean 1.5 (2 / 3) sqrt(3)
    assert found.difference.value == pytest.approx(3**0.5)
    assert found.shared_kl == pytest.approx(3)
    assert found.verdict == "held"
    assert statements.compare("", worse, better).verdict == "not held"
    # The order of coefficients says nothing.
    shuffled = [Curve(c.kl[::-1], c.gain[::-1]) for c in better]
    assert statements.compare("", shuffled, worse).difference.value == pytest.approx(3**0.5)
    # A method whose points lie farther apart on the same curve is as good.
    sparse = [Curve(c.kl[[0, 4]], c.gain[[0, 4]]) for c in better]
    assert statements.compare("", sparse, better).difference.value == pytest.approx(0, abs=1e-12)


def test_the_difference_is_the_integral_over_the_kl_of_two_broken_lines():
    """Against a fine Riemann sum, with knots that interlace."""
    draw = np.random.default_rng(5)
    one, two = ((np.r_[0, np.sort(draw.uniform(1, 3, 4))], draw.normal(size=5)) for _ in range(2))
    one[0][0], two[0][0] = 0.2, 0.4  # no policy nearer: nothing is compared below 0.4
    value, low, top = statements._difference(one, two)
    grid = low + (np.arange(200_000) + 0.5) / 200_000 * (top - low)
    assert low == 0.4
    first, second = (np.interp(grid**0.5, kl**0.5, gain) for kl, gain in (one, two))
    assert top == min(one[0].max(), two[0].max())
    assert value == pytest.approx((first - second).mean(), abs=1e-6)


def test_noise_one_seed_or_no_shared_kl_leave_a_statement_undecided():
    noisy = [_curve(1.0, seed=s, noise=40.0) for s in range(3)]
    even = [_curve(1.0, seed=9 + s, noise=40.0) for s in range(3)]
    found = statements.compare("", noisy, even)
    assert found.verdict == "undecided"
    # Over prompts alone: gains of deviation 40 over 50 prompts, the mean of two errors a seed.
    assert 1 < found.difference.stderr < 10
    clear = [_curve(2.0)], [_curve(0.5)]
    assert statements.compare("", *clear).verdict == "undecided"
    # One method's policies end where the other's begin.
    far = [Curve(c.kl + 10, c.gain) for c in noisy]
    apart = statements.compare("", far, noisy)
    assert apart.verdict == "undecided"
    assert not apart.compared
    assert found.compared
    # No number is published where nothing was compared.
    nowhere: Any = SimpleNamespace(accuracy=None)
    one: Any = {Name(report.PI0, 0.0, 0): SimpleNamespace(agreement=0.5)}
    for finding, count in ((apart, 0), (found, 5)):
        flat = report.metrics([], [finding], one, nowhere)
        assert sum(name.startswith("statement/") for name in flat) == count
    still = [Curve(0 * c.kl, c.gain) for c in noisy]
    assert statements.compare("", still, noisy).verdict == "undecided"
    # Seeds that disagree widen the interval by Student's t: 12.7 of two seeds.
    apart = statements.compare("", [_curve(2.0), _curve(3.0)], [_curve(0.5)] * 2)
    stderr = (2.5 - 1.5) / 2 * 3**0.5 * 2 / 3
    assert apart.difference.stderr == pytest.approx(stderr)
    assert apart.high - apart.low == pytest.approx(2 * 12.706 * stderr, rel=1e-3)


def test_the_loss_out_of_distribution_is_the_gain_in_less_the_gain_out():
    def judged(gain):
        ones = np.ones(4)
        return evaluate.Judged(*[ones] * 10)._replace(gold_gain=gain * ones)

    found = [cells.Found(judged(3.0), judged(1.0), [], 0.0, 0.0, None)]
    curve = report._curve({Name("a", 1.0, 0): found[0]}, "a", 0, report._loss)
    assert curve.less is not None
    assert curve.gain.mean() - curve.less.mean() == -2  # minus the loss: more is better


def test_prompts_of_another_source_are_read_and_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"ask": " Add  2. "}, {"ask": "Add 2."}, {"ask": "Go."}]))
    assert worlds.other_prompts(path, column="ask") == ["Add 2. ", "Go. "]
    with pytest.raises(InputError, match="record 0 has no text in column instruction"):
        worlds.other_prompts(path, column="instruction")
    path.write_text("[{")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        worlds.other_prompts(path, column="ask")
    path.write_text('{"ask": 1}')
    with pytest.raises(InputError, match="not a list of records"):
        worlds.other_prompts(path, column="ask")
    lines = tmp_path / "rows.txt"
    lines.write_text("One.\n\nTwo.\nOne.\n")
    assert worlds.other_prompts(lines, column="ask") == ["One. ", "Two. "]
    lines.write_text("\n")
    with pytest.raises(InputError, match="no prompt"):
        worlds.other_prompts(lines, column="ask")
    with pytest.raises(InputError, match="no such file"):
        worlds.other_prompts(tmp_path / "absent", column="ask")


def test_splits_are_disjoint_and_too_few_prompts_are_refused(place):
    found = worlds.split(place, train=8, held_out=6, seed=0)
    rows = [tuple(row) for part in (found.train, found.held_out) for row in part.ids.tolist()]
    assert len(set(rows)) == 14
    again = worlds.split(place, train=8, held_out=6, seed=1)
    assert again.train.ids.tolist() != found.train.ids.tolist()
    with pytest.raises(InputError, match="more prompts"):
        worlds.split(place, train=8, held_out=1000, seed=0)
    few = dataclasses.replace(place, other=place.other[:5])
    with pytest.raises(InputError, match="out-of-distribution prompts"):
        worlds.split(few, train=8, held_out=6, seed=0)
    with pytest.raises(InputError, match="at most 1 tokens"):
        worlds.build(place.world, place.other, gold_scale=1.0, max_prompt_tokens=1)


def test_the_embedded_world_has_openings_that_its_grammar_never_makes(monkeypatch, place):
    monkeypatch.setattr(quickstart, "embedded", lambda **given: place.world)
    with Progress(console=Console(quiet=True)) as progress:
        _, other = worlds.embedded(stories=50, steps=1, progress=progress)
    assert len(set(other)) == len(other) > 40
    assert not any("was a" in text for text in other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "absent"], "--prompts, --gold, --ood missing"),
        (["--methods", "magic"], "choose from offline DPO"),
        (["--sizes.labels", "100"], "multiple of twice the rounds"),
        (["--sizes.steps", "2"], "fewer than the 3 steps"),
        (["--coefficients", "0"], "positive"),
        (["--rejection-coefficients", "-1"], "positive"),
        (["--best-of", "1"], "at least 2"),
        (["--rates", "0"], "--rates: positive"),
        (["--first-seed", "-1"], "--first-seed -1: must be at least 0"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--workers", "2"], "--workers 2 needs --model, --prompts, --gold and --ood"),
        (["--proxy", "reward-model"], "no uncertainty, which offline GSHF, online GSHF-DPO, en"),
        (
            ["--model", "m", "--prompts", "p", "--gold", "g", "--ood", "absent.txt"],
            "absent.txt: no such file",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_compute(
    tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["frontier", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run.cli()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
