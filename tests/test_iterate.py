"""``klrlhf iterate``: every setting at a toy size, killed and resumed, and what it refuses."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from jax_klrlhf import cli, finished, label, labelling, models
from jax_klrlhf.data import tokenize
from jax_klrlhf.models import lora
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.programs import (
    belief_config,
    iterate,
    iterate_config,
    iterate_parts,
    rows,
)
from jax_klrlhf.training.rounds import grouped, journal, oracle
from tests.label.asking import post

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "mat", "tree"]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """What is looked at here is files and messages: compile fast, run slowly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with prompts, recorded preferences, two heaps of sentences, a model, a judge."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    say = lambda count: " ".join(rng.choice(WORDS, count))  # noqa: E731
    asked = [say(rng.integers(2, 5)) + f" {number} " for number in range(14)]
    (folder / "prompts.txt").write_text("\n".join(asked) + "\n")
    rows = [
        {"prompt": prompt, "chosen": say(2) + f" good {k}", "rejected": say(3) + f" bad {k}"}
        for prompt in asked
        for k in range(2)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heaps").mkdir()
    (folder / "heaps" / "positive.txt").write_text("good a cat sat\nthe tree\n")
    (folder / "heaps" / "negative.txt").write_text("bad dog ran\nbird under\n")
    texts = [text for row in rows for text in row.values()]
    tokenizer = tokenize.train_tokenizer(texts, vocab_size=300, folder=folder / "tokenizer")
    config = models.ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        max_length=32,
    )
    params = models.language_model(config).init(jax.random.key(0))
    models.save(folder / "model", config, params, tokenizer)
    head = rewards.init_head(jax.random.key(1), dim=16, scale=1.0)
    rewards.save(folder / "judge", config, rewards.RewardParams(params, head), tokenizer)
    return folder


def options(place: Path, output: Path, **changed):
    given = {
        "model": place / "model",
        "prompts": place / "prompts.txt",
        "reward": place / "heaps",
        "output": output,
        "max-prompt-length": 12,
        "max-response-length": 6,
        "samples": 4,
        "rounds": 2,
        "rows": 8,
        "held-out": 4,
        "eval-samples": 2,
        "fit.steps": 3,
        "fit.batch-size": 8,
        "fit.learning-rate": 1e-3,
        "mesh.data": 8,
        "mesh.fsdp": 1,
    } | changed
    found = {name: value for name, value in given.items() if value is not None}
    words = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
    return ["iterate", *(str(t) for n, v in found.items() for t in (f"--{n}", *words(v)))]


def lines(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder: Path):
    return json.loads((folder / "results.json").read_text())["metrics"]


ONLINE = {
    "belief.kind": "linear",
    "pairs.rule": "enhancer",
    "improve.method": "pessimistic",
    "prompts-per-round": 8,
}


@pytest.fixture(scope="module")
def online(place, tmp_path_factory):
    """Online GSHF with every part of the theory: ellipsoid, enhancer, pessimism."""
    output = tmp_path_factory.mktemp("online") / "run"
    assert cli.main(options(place, output, **ONLINE, **{"best-of": 2})) == 0
    return output


def test_a_run_leaves_a_policy_a_line_for_each_round_and_results(online, place):
    found = metrics(online)
    assert [row["step"] for row in lines(online)] == [1, 2]
    for row in lines(online):
        assert row["labels/count"] <= 8
        assert row["eval/kl/ref"] >= -1e-6
        # Rounding in float32, over at most six tokens.
        assert 0 <= row["eval/sampler_scorer_mismatch"] < 1e-4
        assert {"loss", "eval/reward", "eval/wins", "eval/length"} <= row.keys()
    for name in ("pi0", "round-1", "round-2", "best-of-2"):
        assert found[f"{name}/pessimistic/eval/reward"]["n"] == 4
    # pi0 is judged against its own responses: wins and losses cancel exactly.
    assert found["pi0/pessimistic/eval/wins"]["value"] == 0.5
    trained, start = models.load(online / "model"), models.load(place / "model")
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), trained.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-5
    assert trained.tokenizer is not None
    assert trained.generation == start.generation
    assert models.stop_tokens(trained.tokenizer, trained.generation) == (
        start.tokenizer.eos_token_id,
    )


def test_the_saved_configuration_is_the_run(online):
    config = cli.parse("iterate", ["--config", str(online / "config.json")])
    assert cli.program("iterate") is iterate.iterate
    assert config.belief == belief_config.Linear()
    assert config.pairs.rule == "enhancer"
    assert config.prompts_per_round == 8
    assert finished.plain(config) | {"command": "iterate"} == json.loads(
        (online / "config.json").read_text()
    )


class Killed(BaseException):
    """Nothing in the library catches it."""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits_and_then_further(
    online, place, tmp_path, monkeypatch, capsys
):
    write = journal.Journal._write
    arguments = options(place, tmp_path, **ONLINE)

    def breaking(self, base, *rest):
        if (base.parent.name, base.name) == ("round-002", "label"):
            raise Killed
        return write(self, base, *rest)

    monkeypatch.setattr(journal.Journal, "_write", breaking)
    with pytest.raises(Killed):
        cli.main(arguments)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(journal.Journal, "_write", write)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("rounds/*/*.json")}
    assert len(before) == 9  # six phases of a round, three of the next
    assert cli.main([*arguments, "--kl-coef", "0.3"]) == 2
    assert "started with kl_coef 0.1, now it is 0.3" in capsys.readouterr().err
    # One round more than the whole run had: its two are the same to the bit.
    assert cli.main([*arguments, "--rounds", "3"]) == 0
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    # The name of what the fit came to is a hash of every bit of it.
    at = Path("rounds") / "round-002" / "fit.json"
    ours, theirs = (json.loads((folder / at).read_text()) for folder in (tmp_path, online))
    assert ours["content"] == theirs["content"]
    assert (
        ours["content"]
        != json.loads((tmp_path / "rounds/round-003/fit.json").read_text())["content"]
    )
    without_time = lambda rows: [{k: v for k, v in row.items() if k != "time"} for row in rows]  # noqa: E731
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert without_time(lines(tmp_path))[:2] == without_time(lines(online))


@pytest.mark.slow
def test_offline_labels_pairs_of_pi0_and_improves_by_multi_step_rejection(place, tmp_path):
    changed = {
        "setting": "offline",
        "rounds": None,
        "belief.kind": "given",
        "belief.model": place / "judge",
        "improve.method": "rso",
        "improve.chain": 2,
        "improve.ranking": "tournament",
        "improve.labels": "order",
        "kl-coef": 1.0,
        "annotator.labels": "expected",
    }
    assert cli.main(options(place, tmp_path, **changed)) == 0
    (row,) = lines(tmp_path)
    assert row["step"] == 0
    # The last step accepts less, or as much: its target is sharper.
    assert 0 < row["rejection/acceptance/2"] <= 1
    assert 0 <= row["rejection/bound_error/1"] <= 1
    assert row["rejection/order"] == 1  # the judge of a model knows no equal rewards
    labelled = safetensors.numpy.load_file(
        tmp_path / "before" / "round-000" / "offline.safetensors"
    )
    assert len(labelled["label"]) <= 10  # one pair of each prompt that is not held out
    assert set(np.unique(labelled["label"])) - {0.0, 1.0}  # soft


@pytest.mark.slow
def test_hybrid_on_recorded_pairs_with_pi0_as_the_second_agent(place, tmp_path):
    changed = {
        "setting": "hybrid",
        "data": place / "pairs.jsonl",
        "reward": place / "judge",
        "offline-share": 0.5,
        "belief.steps": 2,
        "pairs.rule": "between",
        "pairs.other": "pi0",
        "pairs.samples": 2,
        "pairs.first": "best",
        "reference": "previous",
        "improve.objective": "rpo",
        "belief.length-penalty": 0.01,
        "belief.transform": "centred",
    }
    arguments = options(place, tmp_path, **changed)
    assert cli.main([*arguments, "--improve.options", "sft_coef", "0.5"]) == 0
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2]
    drawn = safetensors.numpy.load_file(tmp_path / "rounds" / "round-001" / "sample.safetensors")
    np.testing.assert_array_equal(drawn["agent"], [[0, 0, 0, 0, 1, 1]] * 10)
    assert any(name.startswith("round-2/preference/eval/") for name in metrics(tmp_path))


@pytest.mark.slow
def test_recorded_labels_are_asked_for_a_round_at_a_time(place, tmp_path):
    changed = {
        "reward": "recorded",
        "data": place / "pairs.jsonl",
        "prompts": None,
        "samples": None,
        "belief.kind": "implicit",
        "held-out": 0,
        "eval-samples": None,
        "prompts-per-round": 7,
        "pairs.rule": "sampled",
    }
    assert cli.main(options(place, tmp_path, **changed)) == 0
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    asked = 0
    tokenizer = tokenize.encoder(tokenize.load(place / "tokenizer"))
    for number in (1, 2):
        folder = tmp_path / "rounds" / f"round-{number:03d}"
        found = safetensors.numpy.load_file(folder / "label.safetensors")
        asked += len(found["label"])
        lengths, ids = found["responses/lengths"], found["responses/ids"]
        for pair, length, said in zip(ids, lengths, found["label"], strict=True):
            first, second = (
                tokenizer.decode(r[:n].tolist()) for r, n in zip(pair, length, strict=True)
            )
            # Cut to six tokens; what is left begins as the recorded one.
            better = [r["chosen"] for r in rows if r["chosen"].startswith(first)]
            assert bool(better) == (said == 1.0)
            assert first != second
    # Of a prompt's four recorded responses, two of the six pairs were labelled; the others
    # are abstained from.
    assert 0 < asked < 14


@pytest.mark.slow
def test_a_run_asks_people_waits_and_goes_on(place, tmp_path, monkeypatch, capsys):
    changed = {
        "reward": "human",
        "belief.kind": "implicit",
        "held-out": 0,
        "eval-samples": None,
        "prompts-per-round": 8,
        "pairs.rule": "sampled",
        "rounds": 1,
    }
    arguments = options(place, tmp_path, **changed)
    folder = tmp_path / "labels"

    def killed(seconds):
        raise Killed

    # Waiting, the run is killed; what it asks lies in the folder.
    monkeypatch.setattr(oracle.time, "sleep", killed)
    with pytest.raises(Killed):
        cli.main(arguments)
    asked = labelling.read_pairs(folder).pairs
    assert len(asked) > 4
    assert f"labelled 0 of {len(asked)} pairs: klrlhf label --output {folder}" in (
        capsys.readouterr().out
    )
    session = label.Session(folder, repeats=0.3)
    with label.serve(session) as served:

        def answers(count):
            for _ in range(count):
                ask = post(served.port, "/api/next", {"annotator": "Ana"})
                if ask["ask"] is None:
                    return
                # The one first in the alphabet; of one pair, nothing.
                said = "left" if ask["left"] < ask["right"] else "right"
                said = "skip" if ask["ask"].startswith(asked[0].name) else said
                answer = {"annotator": "Ana", "ask": ask["ask"], "answer": said}
                post(served.port, "/api/answer", answer)

        answers(3)
        # Started again, it asks for the same, and goes on waiting.
        with pytest.raises(Killed):
            cli.main(arguments)
        assert labelling.read_pairs(folder).pairs == asked
        assert "labelled 3 of" in capsys.readouterr().out
        # The last labels come while it waits.
        waited = []
        monkeypatch.setattr(
            oracle.time, "sleep", lambda seconds: waited.append(seconds) or answers(4)
        )
        assert cli.main(arguments) == 0
        assert waited
    session.close()
    found = safetensors.numpy.load_file(tmp_path / "rounds" / "round-001" / "label.safetensors")
    assert len(found["label"]) == len(asked) - 1
    encoder = tokenize.encoder(tokenize.load(place / "tokenizer"))
    both = zip(found["responses/ids"], found["responses/lengths"], found["label"], strict=True)
    for pair, length, said in both:
        first, second = (encoder.decode(r[:n].tolist()) for r, n in zip(pair, length, strict=True))
        assert (first < second) == (said == 1.0)
    assert set(found["weight"]) == {1.0}
    assert (tmp_path / "model").is_dir()


def test_pairs_are_turned_to_the_preferred_one_without_changing_what_they_say():
    seen = []

    def improve(key, situation):
        seen.append(situation.data.sources[0])
        return iterate_parts.Improved({}, {})

    data = iterate_parts.Comparisons(
        rows.padded([(1, 2), (3,)]),
        iterate_parts.ragged([[[5, 6], [7, 0]], [[8, 0], [9, 4]]], [[2, 1], [1, 2]]),
        np.array([0.25, 1.0], np.float32),
        np.ones(2, np.float32),
    )
    mixture = iterate_parts.rounds.Mixture([data], None)
    situation = iterate_parts.Situation(None, None, mixture, data.prompts, None, None)
    iterate_parts.preferred_first(improve)(None, situation)
    (turned,) = seen
    np.testing.assert_array_equal(turned.label, [0.75, 1.0])
    np.testing.assert_array_equal(turned.responses.ids, [[[7, 0], [5, 6]], [[8, 0], [9, 4]]])
    np.testing.assert_array_equal(turned.responses.lengths, [[1, 2], [1, 2]])


def _learns(given):
    """How many of two rounds' sets are learned from."""
    old, new = given["offline"], given["offline"]._replace(label=1 - given["offline"].label)
    sources = given["setting"](given["offline"], [old, new]).sources
    assert sources[-1] is new
    return len(sources)


handed = {}
"""What the functions of :mod:`rounds` were called with, by their names."""

BUILDS = {
    "ensemble": (
        {"belief.kind": "ensemble", "belief.members": 2, "belief.combine": "worst"},
        lambda given: len(given["reward"].init) == 2,
    ),
    "variance": (
        {"belief.kind": "ensemble", "belief.combine": "variance", "belief.variance-coef": 0.5},
        lambda given: len(given["reward"].init) == 3,
    ),
    "rejection": ({"improve.method": "rejection", "improve.chain": 2, "improve.keep": 2}, None),
    "until": (
        {"improve.method": "rso", "improve.passes": "until", "improve.keep": 2},
        lambda given: handed["rso"]["passes"] == "until" and handed["rso"]["keep"] == 2,
    ),
    "until, rejection": (
        {"improve.method": "rejection", "improve.passes": "until", "improve.keep": 2},
        lambda given: handed["rejection_sampling"]["passes"] == "until",
    ),
    "weighted": ({"improve.method": "weighted", "improve.proposals": 3}, None),
    "own draws": ({"improve.method": "reinforce_pp", "improve.prompts": 4}, None),
    "composed": (
        {
            "improve.method": "clipped",
            "improve.options": (
                "advantage",
                "leave_one_out",
                "low",
                0.2,
                "high",
                0.28,
                "mean",
                "constant",
                "penalty",
                "k2",
                "sequence",
                "yes",
            ),
        },
        None,
    ),
    "temperature": (
        {"pairs.other": "temperature", "pairs.temperature": 1.5, "pairs.rule": "tournament"},
        None,
    ),
    "earlier": ({"pairs.other": "earlier", "pairs.back": 2}, None),
    "from pi0": (
        {"reference": "previous", "start": "pi0"},
        lambda given: given["start"](1, 2) == 1 and given["reference"](1, 2) == 2,
    ),
    "all alike": (
        {"setting": "hybrid", "data": "pairs.jsonl"},
        lambda given: given["setting"](given["offline"], []).shares is None,
    ),
    "newest": ({"setting": "newest", "data": "pairs.jsonl"}, lambda given: _learns(given) == 1),
    "own start": ({"data": "pairs.jsonl"}, lambda given: _learns(given) == 2),
}


@pytest.mark.parametrize("case", BUILDS)
def test_every_choice_builds_its_part(case, place, tmp_path, monkeypatch):
    changed, holds = BUILDS[case]
    monkeypatch.chdir(place)
    found = {}

    def taking(key, policy, **given):
        found.update(given)
        raise Killed

    monkeypatch.setattr(iterate.rounds, "iterate", taking)
    for name in ("rso", "rejection_sampling"):
        function = getattr(iterate_parts.rounds, name)

        def noting(*given, name=name, function=function, **named):
            handed[name] = named
            return function(*given, **named)

        monkeypatch.setattr(iterate_parts.rounds, name, noting)
    with pytest.raises(Killed):
        cli.main(options(place, tmp_path, **{"held-out": 0, "eval-samples": None}, **changed))
    assert holds is None or holds(found)


ADAPTED = {"lora.rank": 2, "fit.learning-rate": 0.1, "fit.steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_an_adapter_is_trained_alone_and_the_base_is_written_once(
    devices, place, tmp_path, monkeypatch
):
    """Killed in the second round; on one device (safetensors) and on eight (Orbax)."""
    if devices == 8:
        arguments = options(place, tmp_path, **ADAPTED)
    else:
        arguments = options(place, tmp_path, **ADAPTED, **{"mesh.data": None, "mesh.fsdp": None})
        monkeypatch.setattr(iterate.runs, "devices", lambda config: None)
    write = journal.Journal._write
    written = {}

    def breaking(self, base, value, *rest):
        written[base.parent.name, base.name] = value
        if (base.parent.name, base.name) == ("round-002", "label"):
            raise Killed
        return write(self, base, value, *rest)

    monkeypatch.setattr(journal.Journal, "_write", breaking)
    with pytest.raises(Killed):
        cli.main(arguments)
    monkeypatch.setattr(journal.Journal, "_write", write)
    assert cli.main(arguments) == 0
    first = tmp_path / "rounds" / "round-001" / "fit.json"
    given = json.loads(first.read_text())["given"]
    base = models.load(place / "model")
    names = {journal.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(base.params)}
    assert set(given) == {f"base/{name}" for name in names}
    if devices == 1:
        kept = safetensors.numpy.load_file(first.with_suffix(".safetensors"))
        assert kept
        assert all(name.startswith("lora/") for name in kept)
    # The whole model is the base with the adapter in it, and no longer the base.
    facts, adapter = lora.load(tmp_path / "adapter", base.config)
    want = lora.merge({"base": base.params, "lora": adapter}, facts)
    have = models.load(tmp_path / "model").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), have, want)
    kernel = lambda params: np.asarray(params["layers"]["query"]["kernel"])  # noqa: E731
    assert np.abs(kernel(have) - kernel(base.params)).max() > 1e-3
    # Round 2 went on from round 1's adapter: what was drawn is not pi0's alone.
    assert (lines(tmp_path)[1]["step"], len(lines(tmp_path))) == (2, 2)


GRPO = {
    "belief.kind": "annotator",
    "improve.method": "grpo",
    "improve.iterations": 2,
    "improve.importance-limit": 2.0,
    "rounds": 1,
    "fit.steps": 4,
    "fit.save-every": 2,
    "held-out": 0,
    "eval-samples": None,
}


@pytest.mark.slow
def test_own_draws_killed_between_two_of_them_go_on_from_there(place, tmp_path, monkeypatch):
    """GRPO killed after its first draw's steps; the same bits are test_on_policy's to see."""
    arguments = [*options(place, tmp_path, **GRPO), "--improve.options", "clip", "0.1"]
    portion, drawn = grouped._portion, []

    def dies(prompts, number, count):
        drawn.append((number, count))
        if len(drawn) == 2:
            raise Killed
        return portion(prompts, number, count)

    monkeypatch.setattr(grouped, "_portion", dies)
    with pytest.raises(Killed):
        cli.main(arguments)
    assert cli.main(arguments) == 0
    assert drawn == [(0, 16), (1, 16), (1, 16)]  # two steps of 8 prompts; the first draw is kept
    (row,) = lines(tmp_path)
    assert 0 <= row["drawn/sampler_scorer_mismatch"] < 1e-4
    assert {"kl/drawn", "reward/drawn", "groups/informative"} <= row.keys()


BAD = {
    "no clip": (
        {"improve.method": "rloo", "improve.options": ("clip", 0.2)},
        "options: rloo takes no 'clip'; it takes divergence",
    ),
    "no word": (
        {"improve.method": "clipped", "improve.options": ("advantage", "mean")},
        "options: advantage mean: it is one of leave_one_out, group_mean",
    ),
    "needs": ({"improve.method": "clipped"}, "options: clipped needs 'advantage'"),
    "no number": (
        {"improve.method": "grpo", "improve.options": ("clip", "much")},
        "options: clip is much; give a number",
    ),
    "range": (
        {"improve.method": "grpo", "improve.options": ("clip", 1.5)},
        "improve.method grpo: low must lie in (0, 1), got 1.5",
    ),
    "no kl": ({"improve.method": "dapo", "kl-coef": 0.2}, "--improve.method dapo has no KL in it"),
    "kl none": (
        {"improve.method": "dr_grpo", "improve.options": ("kl", "none"), "kl-coef": 0.2},
        "--kl-coef: --improve.method dr_grpo has no KL",
    ),
    "weights": (
        {"improve.method": "rebel", "improve.importance-limit": 2.0},
        "--improve.importance-limit: rebel keeps its law",
    ),
    "draws": (
        {"improve.method": "rloo", "improve.iterations": 2},
        "--fit.steps 3 cannot be divided among --improve.iterations 2",
    ),
    "quantiles": (
        {"improve.method": "rloo", "improve.quantiles": 4},
        "--improve.quantiles is read by no run with --improve.method rloo",
    ),
    "no prompts": ({"prompts": None}, "--prompts is missing"),
    "no file": ({"prompts": "absent.txt"}, "absent.txt: not readable"),
    "no model": ({"model": "absent/folder"}, "absent/folder"),
    "no reward": ({"reward": "absent/folder"}, "absent/folder"),
    "neither": ({"reward": "tokenizer"}, "neither a reward model"),
    "no head": ({"reward": "model"}, "score.weight is missing"),
    "one heap": ({"reward": "half"}, "negative.txt: missing"),
    "context": ({"max-prompt-length": 30}, "exceed the model's context of 32"),
    "few": ({"held-out": 14}, "14 different prompts, of which --held-out 14"),
    "portion": ({"prompts-per-round": 11}, "--prompts-per-round is 11; there are 10"),
    "stop": ({"stop": "<never>"}, "stop: '<never>' is neither a token of the vocabulary nor"),
    "batch": ({"fit.batch-size": 12}, "--fit.batch-size 12 must be a multiple of 8"),
    "mesh": ({"mesh.data": 3}, "mesh data=3"),
    "rounds": ({"rounds": 0}, "--rounds is 0"),
    "kl": ({"kl-coef": 0}, "--kl-coef is 0.0; it must be positive"),
    "nan": ({"kl-coef": "nan"}, "--kl-coef is nan; it must be positive"),
    "for ever": ({"temperature": "inf"}, "--temperature is inf"),
    "clip": ({"fit.clip": -1}, "--fit.clip is -1.0; it must be positive"),
    "radius": ({"belief.kind": "linear", "belief.radius": 0}, "--belief.radius is 0.0"),
    "no radius": ({"belief.kind": "linear", "belief.radius": "nan"}, "--belief.radius is nan"),
    "negative radius": ({"belief.kind": "linear", "belief.radius": -1}, "--belief.radius is -1.0"),
    "endless radius": ({"belief.kind": "linear", "belief.radius": "inf"}, "--belief.radius is inf"),
    "until": (
        {"improve.method": "rso", "improve.passes": "until"},
        "--improve.passes until needs --improve.keep",
    ),
    "bound": (
        {
            "improve.method": "rso",
            "improve.passes": "until",
            "improve.keep": 2,
            "improve.reward-bound": 1.0,
        },
        "--improve.reward-bound: with --improve.passes until",
    ),
    "keep": (
        {"improve.method": "rso", "improve.keep": 5},
        "--improve.keep is 5, of 4 proposals",
    ),
    "passes": (
        {"improve.passes": "until", "improve.keep": 2},
        "is read by no run with --improve.method preference",
    ),
    "no adapter": ({"lora.alpha": 8}, "--lora.alpha: of an adapter; give --lora.rank"),
    "rank": ({"lora.rank": -1}, "--lora.rank is -1; 0 trains all parameters"),
    "targets": ({"lora.rank": 2, "lora.targets": "all"}, "targets=('all',)"),
    "ridge": ({"belief.kind": "linear", "belief.ridge": 0}, "--belief.ridge is 0.0"),
    "random": ({"seed": -1}, "--seed is -1"),
    "unread": ({"belief.members": 4}, "--belief.members is read by no run with --belief.kind rew"),
    "offline": ({"setting": "offline"}, "--rounds is read by no run with --setting offline"),
    "share": ({"offline-share": 0.5}, "--offline-share is read by no run with --setting online"),
    "features": ({"pairs.rule": "enhancer"}, "give --belief.kind linear"),
    "coin": ({"improve.labels": "drawn"}, "--improve.labels is read by no run with --improve.meth"),
    "certain": ({"improve.method": "pessimistic"}, "a belief that knows its uncertainty"),
    "second": ({"pairs.rule": "between"}, "needs a second agent"),
    "one": ({"samples": 1}, "--samples is 1"),
    "given": ({"belief.kind": "given"}, "needs --belief.model"),
    "noise": ({"annotator.noise": 0.7}, "--annotator.noise lies in"),
    "objective": ({"improve.objective": "dpo"}, "objective 'dpo': there are sigmoid"),
    "labels": ({"reward": "recorded", "samples": None}, "--reward recorded needs --data"),
    "people's noise": (
        {"reward": "human", "annotator.noise": 0.1},
        "--annotator.noise: people label as they like",
    ),
    "no people": ({"annotator.each": 2}, "--annotator.each: it is of people"),
    "people's mind": (
        {"reward": "human", "belief.kind": "annotator"},
        "people have no reward that could be",
    ),
    "seed": ({"newest-share": 0.5, "setting": "hybrid"}, "goes with --offline-share"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_two(case, place, tmp_path, capsys, monkeypatch):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "positive.txt").write_text("good\n")
    for name in ("tokenizer", "model"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    changed, message = BAD[case]

    def computing(*arguments, **named):
        raise AssertionError("something was computed")

    monkeypatch.setattr(iterate_parts.rounds.Draw, "__call__", computing)
    assert cli.main(options(place, tmp_path / "run", **changed)) == 2
    error = capsys.readouterr().err
    assert error.startswith("klrlhf: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run" / "rounds").exists()


def test_default_lengths_are_cut_to_the_models_context_and_said(
    place, tmp_path, monkeypatch, capsys
):
    def taking(key, policy, **given):
        raise Killed

    monkeypatch.setattr(iterate.rounds, "iterate", taking)
    free = {"max-prompt-length": None, "max-response-length": None, "held-out": 0}
    given = options(place, tmp_path / "run", **free, **{"eval-samples": None})
    with pytest.raises(Killed):
        cli.main(given)
    said = "context is 32 tokens: --max-prompt-length is 16, --max-response-length 16"
    assert said in capsys.readouterr().out
    with pytest.raises(Killed):
        cli.main([*given, "--max-response-length", "6", "--output", str(tmp_path / "other")])
    assert "--max-prompt-length is 26, --max-response-length 6" in capsys.readouterr().out
    # Nothing is left for a prompt.
    given = [*given, "--max-response-length", "32", "--output", str(tmp_path / "third")]
    assert cli.main(given) == 2
    assert "exceed the model's context of 32" in capsys.readouterr().err


def test_the_table_fits_eighty_columns(tmp_path, capsys):
    number = iterate.mean([-0.11, -0.2, 10.3])
    found = dict.fromkeys(iterate.COLUMNS, number)
    config = iterate_config.IterateConfig(
        model="m", reward="r", prompts="p", output=tmp_path, best_of=8
    )
    iterate._finish(config, tmp_path, Console(width=80), found, {1: found}, found, 1.0)
    rows = capsys.readouterr().out.splitlines()
    assert max(map(len, rows)) <= 80
    # Each row is one line: nothing is folded or cut.
    (row,) = [row for row in rows if row.startswith("best of 8")]
    assert row.count("±") == 3
    assert "…" not in row


def test_a_finished_run_is_left_alone_and_loses_no_round(online, place, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", None)
    before = {path: path.read_bytes() for path in online.rglob("*") if path.is_file()}
    arguments = options(place, online, **ONLINE, **{"best-of": 2})
    assert cli.main(arguments) == 0
    assert "finished already, nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in online.rglob("*") if path.is_file()} == before
    assert cli.main([*arguments, "--rounds", "1"]) == 2
    assert "2 rounds are done, --rounds asks for 1" in capsys.readouterr().err


def test_help_says_what_is_for_python_alone(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["iterate", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "From Python alone" in text
    for option in ("--reward", "--setting", "--belief.kind", "--pairs.rule", "--improve.method"):
        assert option in text


@pytest.mark.slow
def test_a_real_model_learns_from_a_fitted_gold_reward(stories_model, data_dir, tmp_path):
    text = (data_dir / "stories" / "train.txt").read_text().split("<|endoftext|>")
    openings = [" ".join(story.split())[:60].rsplit(" ", 1)[0] + " " for story in text[:80]]
    (tmp_path / "prompts.txt").write_text("\n".join(openings))
    changed = {
        "model": stories_model,
        "prompts": tmp_path / "prompts.txt",
        "reward": data_dir / "sentiment",
        "max-prompt-length": 24,
        "max-response-length": 16,
        "rounds": 1,
        "rows": 32,
        "held-out": 16,
        "kl-coef": 0.1,
        "belief.kind": "annotator",
        "annotator.labels": "expected",
        "fit.steps": 12,
        "fit.batch-size": 32,
        "fit.learning-rate": 1e-3,
    }
    assert cli.main(options(tmp_path, tmp_path / "run", **changed)) == 0
    (row,) = lines(tmp_path / "run")
    # Twelve steps on the best and the worst of four by the gold reward itself: margins towards
    # the labels grow from 0, and the policy leaves pi0.
    assert row["rewards/accuracies"] > 0.6
    assert row["eval/kl/ref"] > 0.01
    assert models.load(tmp_path / "run" / "model").config.vocab_size == 2048
