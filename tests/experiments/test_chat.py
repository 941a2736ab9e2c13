"""experiments/chat: its parts by hand, and the whole of it on a toy model."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.chat import cells, human, judges, measure, methods, report, run
from jax_klrlhf import models
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric
from jax_klrlhf.training.state import path_name

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """What is looked at here is whether the parts fit: compile fast, run slowly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_dialogue_is_read_turn_by_turn():
    assert human.turns("\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:") == (
        ("user", "a\nb"), ("assistant", "c"), ("user", "d"),
    )  # fmt: skip
    assert human.turns("Question: why?\nAnswer:") == (("user", "Question: why?"),)


def test_a_prompt_is_in_one_part_alone():
    listed = [human.Pair((("user", f"p{n % 40}"),), f"a{n}", "b") for n in range(120)]
    parts = human.divide(listed)
    assert sum(map(len, parts.values())) == 120
    prompts = [{p.prompt for p in part} for part in parts.values()]
    assert all(prompts)
    assert not any(a & b for a, b in itertools.combinations(prompts, 2))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    believed, gold = rng.normal(size=(2, 3, 5))
    subsets = list(itertools.combinations(range(5), n))
    expected = [
        np.mean([g[max(subset, key=b.__getitem__)] for subset in subsets])
        for b, g in zip(believed, gold, strict=True)
    ]
    np.testing.assert_allclose(measure.best_of(believed, gold, n), expected, rtol=1e-12)


def test_refusals_are_told_by_how_an_answer_begins():
    assert measure.refuses("I’m sorry, but no.")
    assert measure.refuses("As an AI, I have no car.")
    assert not measure.refuses("Take two eggs." + " " * 120 + "I can't say more.")


def test_a_fit_finds_the_reward_that_labelled():
    """Of 400 pairs; the posterior covers the truth in chi-square's own scatter (3 sd)."""
    rng = np.random.default_rng(1)
    theta, phi = np.array([1.5, -1.0, 0.0, 0.5]), rng.normal(size=(400, 2, 4))
    wins = rng.random(400) < 1 / (1 + np.exp(-(phi[:, 0] - phi[:, 1]) @ theta))
    phi = np.where(wins[:, None, None], phi, phi[:, ::-1]).astype(np.float32)
    found = judges.fit(phi, members=3, seed=0)
    error = found.theta - theta
    distance = error @ np.asarray(found.belief.precision) @ error
    assert distance < 4 + 3 * np.sqrt(2 * 4)
    assert len(np.unique(found.members[:, 0])) == 3
    assert found.ridge < max(judges.RIDGES)


def test_components_are_white_where_they_were_made():
    hidden = np.random.default_rng(2).normal(size=(50, 2, 7)) @ np.diag([1, 2, 3, 4, 5, 6, 7.0])
    phi = judges.components(hidden, dim=5)(hidden).reshape(100, -1)
    np.testing.assert_allclose(np.cov(phi[:, :-1].T, bias=True), np.eye(4), atol=1e-4)
    np.testing.assert_allclose(phi[:, -1].std(), 1, rtol=1e-4)


def test_a_verdict_is_its_intervals():
    # Student's t of 3 seeds is 4.30; of 9, 2.31.
    said = [report.verdict(Metric(x, 1.0, 9)) for x in (2.4, 2.2, -2.2, -2.4)]
    assert report.verdict(Metric(4.2, 1.0, 3)) == "undecided"
    assert said == ["held", "undecided", "undecided", "not held"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A chat model of one layer, and two sources of pairs."""
    folder = tmp_path_factory.mktemp("toy")
    names = ("ball", "cat", "kite", "tree", "house", "boat", "lamp", "song")
    for name, ask in (("a", "\n\nHuman: {} {}?\n\nAssistant:"), ("b", "Question: {} {}\nAnswer:")):
        rows = [
            {"prompt": ask.format(x, y), "chosen": f" {x} is good", "rejected": f" {y} bad bad"}
            for x, y in itertools.product(names, names)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = [" ".join(names), "is good bad Question: user assistant"]
    tokenizer = tokenize.train_tokenizer(
        texts, vocab_size=300, folder=folder / "tokenizer", chat_template=CHATML
    )
    facts = models.ModelConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, layers=1, heads=2,
        kv_heads=2, head_dim=4, max_length=96,
    )  # fmt: skip
    params = jax.jit(models.language_model(facts).init)(jax.random.key(0))
    models.save(folder / "model", facts, params, tokenizer)
    sizes = run.Sizes(
        labels=8, rounds=2, train_prompts=6, held_out=4, human=24, judged=12, prompt_tokens=64,
        human_prompt_tokens=64, human_tokens=16, new_tokens=5, explore=2, eval_samples=2, draws=4,
        steps=2, batch=4, rank=2, gold_components=6, proxy_components=4, members=2,
    )  # fmt: skip
    return run.Config(
        model=str(folder / "model"), data=folder / "a.jsonl", ood=folder / "b.jsonl",
        output=folder / "out", seeds=1, coefficients=(0.1,), rates=(1e-3, 1e-2), sizes=sizes,
        methods=(methods.SFT, methods.OFFLINE, methods.ONLINE, "RSO, worst"),
        every_rate=(methods.OFFLINE, methods.ONLINE),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(toy):
    return json.loads(run.main(toy, console=Console(quiet=True)).read_text())["metrics"]


@pytest.mark.slow
def test_the_whole_of_it(made, toy):
    for place in cells.PLACES:
        assert made[f"{place}/pi0/kl"]["value"] == 0
        for row in (methods.SFT, f"{methods.ONLINE}, 0.1", "RSO, worst, 0.1"):
            assert made[f"{place}/{row}/kl"]["value"] > 0
    # Best of n by gold itself is the most that any proxy can reach.
    for by in judges.PROXIES:
        ours, best = (made[f"best-of-n/held out/{x}/2/gold_gain"]["value"] for x in (by, "gold"))
        assert ours <= best + 1e-6
    assert "ball" in (toy.output / "answers.html").read_text()
    assert (toy.output / "ten.html").is_file()
    assert (toy.output / "frontier.png").stat().st_size > 10_000


def test_the_rate_is_the_smallest_within_one_standard_error_of_the_least():
    losses = {1.0: Metric(0.9, 0.3, 9), 2.0: Metric(0.74, 0.1, 9), 3.0: Metric(0.7, 0.05, 9)}
    assert cells.smallest(losses) == 2.0  # 0.9 is farther from 0.7 than 0.05, though not than 0.3.
    assert cells.smallest(losses | {3.0: Metric(0.7, 0.03, 9)}) == 3.0
    assert cells.smallest(losses | {4.0: Metric(0.6, None, 1)}) == 4.0
    assert cells.smallest(losses | {1.0: Metric(math.inf)}) == 2.0


@pytest.mark.slow
def test_rates_are_told_with_the_losses_they_were_chosen_by(made, toy):
    chosen = {
        key.removeprefix("learning rate/"): metric["value"]
        for key, metric in made.items()
        if key.startswith("learning rate/")
    }
    assert set(chosen) == {methods.LIKELIHOOD, methods.GOLD, methods.PROXY}
    for objective, rate in chosen.items():
        losses = [made[f"pilot/{objective}/{r:g}"] for r in toy.rates]
        assert losses[0] != losses[1]
        assert all(loss["stderr"] > 0 for loss in losses)
        least = min(losses, key=lambda loss: loss["value"])
        near = [loss["value"] <= least["value"] + least["stderr"] for loss in losses]
        assert rate == toy.rates[near.index(True)]


@pytest.mark.slow
def test_a_method_at_every_rate_is_compared_at_equal_rates(made, toy):
    chosen = made[f"learning rate/{methods.GOLD}"]["value"]
    (other,) = {*toy.rates} - {chosen}
    claim = "held out: online beats offline at equal labels, kl_coef 0.1"
    for rate, suffix in ((chosen, ""), (other, f", rate {other:g}")):
        ours, theirs = (
            json.loads((toy.output / "cells" / f"{stem}_0.1_{rate:g}_0.json").read_text())
            for stem in ("online-GSHF-DPO", "offline-DPO")
        )
        value = [
            np.mean(np.subtract(at["held out"]["gold"], np.multiply(0.1, at["held out"]["kl"])))
            for at in (ours, theirs)
        ]
        found = made[f"claims/{claim}{suffix}"]["value"]
        np.testing.assert_allclose(found, value[0] - value[1], rtol=1e-6)
        assert f"held out/{methods.ONLINE}, 0.1{suffix}/kl" in made
    # Of another objective than preferences', likelihood has its own rate.
    assert (
        f"claims/held out: preferences beat likelihood on the preferred, kl_coef 0.1{suffix}"
        in made
    )
    assert f"rate {other:g}" in (toy.output / "answers.html").read_text()


@pytest.mark.slow
def test_a_run_goes_on_from_its_cells_and_refuses_those_of_another(made, toy, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(cells.Lab, "_cell", refuse)
    again = json.loads(run.main(toy, console=Console(quiet=True)).read_text())["metrics"]
    assert again == made
    other = dataclasses.replace(toy, rates=(1e-3,))
    with pytest.raises(InputError, match="other options"):
        run.main(other, console=Console(quiet=True))


@pytest.mark.slow
def test_cells_are_divided_over_processes(toy, tmp_path, monkeypatch):
    def nothing_left(*args):
        raise AssertionError("left to the first process")

    monkeypatch.setattr(cells.Lab, "_outcome", nothing_left)
    monkeypatch.setattr(cells.Lab, "_cell", nothing_left)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # Theirs too.
    asked = dataclasses.replace(
        toy, output=tmp_path, workers=2, methods=(methods.SFT,), every_rate=()
    )
    run.main(asked, console=Console(quiet=True))
    there = {p.stem for p in (tmp_path / "cells").glob("*.json")}
    pilots = {"pilot_likelihood_0.001", "pilot_likelihood_0.01"}
    (made,) = there - {"accuracy", "pi0_0_0_0"} - pilots
    assert there > pilots
    assert made in {"SFT-on-chosen_0_0.001_0", "SFT-on-chosen_0_0.01_0"}


def test_too_few_short_prompts_are_refused_before_any_compute(toy, tmp_path):
    sizes = dataclasses.replace(toy.sizes, prompt_tokens=5, human_prompt_tokens=64)
    asked = dataclasses.replace(toy, sizes=sizes, output=tmp_path)
    with pytest.raises(InputError, match=r"a\.jsonl: 0 prompts of at most 5 tokens for judge, 4"):
        run.main(asked, console=Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_all_parameters_are_trained_or_the_adapter_alone(toy, tmp_path, rank):
    sizes = dataclasses.replace(toy.sizes, rank=rank)
    asked = dataclasses.replace(toy, output=tmp_path, sizes=sizes)
    lab = cells.Lab(asked, console=Console(quiet=True))
    name = cells.Name(methods.SFT, 0.0, 1e-2, 0)
    after = lab._outcome(name, lab.fittings[1e-2]).policy
    moved = {
        path_name(path): bool(np.any(np.asarray(a) != np.asarray(b)))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(lab.pi0), strict=True
        )
    }
    assert any(moved.values())
    assert rank == 0 or not any(m for path, m in moved.items() if path.startswith("base/"))
    assert rank or not any(path.startswith("lora/") for path in moved)


def test_rates_that_all_diverge_are_refused(toy, tmp_path, monkeypatch):
    asked = dataclasses.replace(toy, output=tmp_path)
    lab = cells.Lab(asked, console=Console(quiet=True))
    monkeypatch.setattr(cells.Lab, "_outcome", lambda *args: None)
    monkeypatch.setattr(methods, "loss", lambda outcome, which: Metric(math.nan))
    with pytest.raises(InputError, match="likelihood diverges at all of them"):
        _ = lab.rates


def test_what_cannot_run_is_refused_before_any_compute(toy):
    for change, said in (
        ({"methods": ("PPO",)}, "PPO"),
        ({"data": toy.output / "no.jsonl"}, "no such file"),
        ({"sizes": dataclasses.replace(toy.sizes, labels=7)}, "multiple"),
        ({"rates": ()}, "positive"),
        ({"every_rate": (methods.HYBRID,)}, "every-rate"),
        ({"sizes": dataclasses.replace(toy.sizes, rank=-1)}, "rank may be 0"),
        ({"sizes": dataclasses.replace(toy.sizes, steps=1)}, "steps at least 2"),
    ):
        with pytest.raises(InputError, match=said):
            dataclasses.replace(toy, **change).check()
