"""``klrlhf generate`` and ``klrlhf eval``: answers, and numbers against independent ones."""

import dataclasses
import io
import itertools
import json

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from rich.console import Console

from jax_klrlhf import cli, models
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import tokenize
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models import sampling, scoring, streaming
from jax_klrlhf.programs import evaluate, evaluate_proxy, generate, policies
from jax_klrlhf.programs import run as runs
from jax_klrlhf.training.rounds import known_text, oracle
from jax_klrlhf.training.rounds.parts import Policies, ragged

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = ["the cat sat on the mat", "a good dog ran", "a bad bird flew", "user assistant tree"]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """What is looked at here is text and files: compile fast, run slowly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two policies of one tokenizer with a chat template, a reward model, heaps, prompts."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = tokenize.train_tokenizer(
        WORDS, vocab_size=300, folder=folder / "tokenizer", chat_template=TEMPLATE
    )
    config = models.ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        max_length=64,
    )
    for number, name in enumerate(("ours", "theirs")):
        params = models.language_model(config).init(jax.random.key(number))
        # Sharp enough that two policies differ.
        params = jax.tree.map(lambda x: 3 * x, params)
        models.save(folder / name, config, params, tokenizer)
    head = rewards.init_head(jax.random.key(2), dim=16, scale=1.0)
    rewards.save(folder / "judge", config, rewards.RewardParams(params, head), tokenizer)
    (folder / "heaps").mkdir()
    (folder / "heaps" / "positive.txt").write_text("good cat\n")
    (folder / "heaps" / "negative.txt").write_text("bad dog\n")
    (folder / "prompts.txt").write_text("the cat \na good \nthe cat \nbird \n")
    (folder / "my_reward.py").write_text(
        "def shortest(prompts, texts):\n"
        "    assert len(prompts) == len(texts)\n"
        "    return [-len(text) - 100 * ('bird' in p) for p, text in zip(prompts, texts)]\n"
        "def longest(prompts, texts):\n"
        "    return [0.5 * len(text) for text in texts]\n"
        "def one(prompts, texts):\n"
        "    return [0.0]\n"
    )
    return folder


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("warps", [{}, {"temperature": 0.7, "top_k": 40}, {"temperature": 0.0}])
def test_a_stream_is_what_the_sampler_draws(place, warps):
    loaded = models.load(place / "ours")
    prompt = loaded.tokenizer("the cat ").input_ids
    drawn = sampling.generate(
        jax.random.key(3),
        loaded.model,
        loaded.params,
        ragged([prompt], [len(prompt)]),
        samples=1,
        max_new_tokens=12,
        stop=(7, 9, 11),
        **warps,
    ).responses
    streamed = list(
        streaming.stream(
            jax.random.key(3),
            loaded.model,
            loaded.params,
            prompt,
            max_new_tokens=12,
            stop=(7, 9, 11),
            **warps,
        )
    )
    length = int(drawn.lengths[0, 0])
    assert streamed == np.asarray(drawn.ids)[0, 0, :length].tolist()


def test_answers_of_several_policies_to_the_prompts_of_a_file(place, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    arguments = ["generate", "--models", place / "ours", place / "theirs", "--samples", 2]
    arguments += ["--prompts", place / "prompts.txt", "--max-response-length", 6, "--rows", 8]
    assert run(*arguments, "--output", out, "--mesh.data", 8, "--mesh.fsdp", 1) == 0
    found = records(out)
    # The third line repeats the first.
    assert [row["prompt"] for row in found] == ["the cat ", "a good ", "bird "] * 2
    assert [row["model"] for row in found] == [
        str(place / n) for n in ("ours",) * 3 + ("theirs",) * 3
    ]
    for row in found:
        assert len(row["answers"]) == 2
        assert all(1 <= count <= 6 for count in row["tokens"])
    assert found[0]["answers"] != found[3]["answers"]
    said = capsys.readouterr().out
    assert "6 records in" in said
    assert policies.printable(found[0]["answers"][0].strip()) in said


def test_one_answer_is_streamed_in_the_chat_template(place, monkeypatch):
    asked = []
    stream = streaming.stream

    def watched(key, model, params, prompt, **options):
        asked.append((list(prompt), options["stop"]))
        return stream(key, model, params, prompt, **options)

    monkeypatch.setattr(streaming, "stream", watched)
    monkeypatch.setattr(runs, "mesh_of", lambda sizes: None)
    screen = io.StringIO()
    config = generate.GenerateConfig(
        models=(str(place / "ours"),), text=("a good dog",), chat=True, max_response_length=8
    )
    (record,) = generate.generate(config, console=Console(file=screen))
    tokenizer = tokenize.load(place / "ours")
    ((ids, stop),) = asked
    assert tokenizer.decode(ids) == "user: a good dog</s>assistant: "
    assert tokenizer.eos_token_id in stop
    assert policies.printable(record["answers"][0]) in screen.getvalue()


def test_a_conversation_remembers_until_it_is_told_not_to(place):
    config = generate.GenerateConfig(
        models=(str(place / "ours"),), chat=True, max_prompt_length=48, max_response_length=4
    )
    policy = policies.load(config.models[0], dtype="float32", stop=None, mesh=None)
    screen = io.StringIO()
    talk = lambda *lines: generate.converse(  # noqa: E731
        jax.random.key(0), policy, config, Console(file=screen), lines=iter(lines)
    )
    turns = talk("the cat", "", "a dog")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in turns[::2]] == ["the cat", "a dog"]
    assert [turn["content"] for turn in talk("the cat", "/new", "a dog")[::2]] == ["a dog"]
    # What no longer fits is forgotten from its beginning, and said.
    turns = talk(*["the cat sat on the mat"] * 6)
    assert len(turns) < 12
    assert turns[0]["role"] == "user"
    assert "no longer fit" in screen.getvalue()
    assert talk("word " * 60) == []


def test_a_prompt_may_be_read_in_pieces(place, monkeypatch):
    seen, load = [], policies.load

    def watched(*arguments, **options):
        policy = load(*arguments, **options)
        seen.append(policy.loaded.config.prefill_chunk)
        return policy

    monkeypatch.setattr(policies, "load", watched)
    config = generate.GenerateConfig(
        models=(str(place / "ours"),), text=("the cat sat on the mat",), samples=2,
        max_response_length=6,
    )  # fmt: skip
    quiet = Console(quiet=True)
    whole = generate.generate(config, console=quiet)
    pieces = generate.generate(dataclasses.replace(config, prefill_chunk=3), console=quiet)
    assert seen == [None, 3]
    assert [one["answers"] for one in pieces] == [one["answers"] for one in whole]


def test_a_models_text_has_no_say_over_the_terminal():
    assert (
        policies.printable("\x1b[31mred\x07 [/red]\n\ttab") == "\ufffd[31mred\ufffd [/red]\n\ttab"
    )


BAD = {
    "no prompt": ({}, "no prompt: give --text"),
    "both": ({"text": "a", "prompts": "p.txt"}, "--text and --prompts"),
    "greedy": ({"text": "a", "temperature": 0, "top-k": 3}, "--top-k: at --temperature 0"),
    "greedy many": ({"text": "a", "temperature": 0, "samples": 3}, "all answers are one"),
    "cold": ({"text": "a", "temperature": -1}, "--temperature is -1.0"),
    "context": (
        {"text": "a", "max-prompt-length": 60, "max-response-length": 60},
        "exceed the model's context of 64",
    ),
    "seed": ({"text": "a", "seed": -1}, "--seed is -1"),
    "model": ({"text": "a", "models": "absent/model"}, "absent/model"),
    "stop": ({"text": "a", "stop": "no such token"}, "neither a token of the vocabulary"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_generate_refuses(case, place, capsys):
    changed, message = BAD[case]
    given = {"models": place / "ours", **changed}
    assert run("generate", *(t for n, v in given.items() for t in (f"--{n}", v))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def evaluated(place, tmp_path, **changed):
    given = {
        "model": place / "ours",
        "against": place / "theirs",
        "prompts": place / "prompts.txt",
        "reward": "my_reward:shortest",
        "samples": 3,
        "max-response-length": 6,
        "output": tmp_path / "out",
        "mesh.data": 8,
        "mesh.fsdp": 1,
        "rows": 8,
    } | changed
    return run("eval", *(t for n, v in given.items() for t in (f"--{n}", v)))


def test_eval_against_numbers_from_its_own_answers(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert evaluated(place, tmp_path) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    rows = records(tmp_path / "out" / "answers.jsonl")
    assert [row["prompt"] for row in rows] == ["the cat ", "a good ", "bird "]
    gains, wins = [], []
    for row in rows:
        reward = {
            role: [-len(text) - 100 * ("bird" in row["prompt"]) for text in row[role]]
            for role in ("policy", "reference")
        }
        assert row["policy/reward"] == reward["policy"]
        # For the page: pieces that add up to the text, and KL that adds up to the answer's.
        for text, pieces, nats, total in zip(
            row["policy"], row["policy/tokens"], row["kl/tokens"], row["kl"], strict=True
        ):
            assert "".join(pieces) == text
            assert len(pieces) == len(nats)
            assert sum(nats) == pytest.approx(total, abs=1e-4 * len(nats))
        gains.append(np.mean(reward["policy"]) - np.mean(reward["reference"]))
        pairs = [(a, b) for a in reward["policy"] for b in reward["reference"]]
        wins.append(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))
    metric = found["eval/difference/reward"]
    assert metric["value"] == pytest.approx(np.mean(gains))
    assert metric["stderr"] == pytest.approx(np.std(gains, ddof=1) / np.sqrt(3))
    assert found["eval/difference/wins"]["value"] == pytest.approx(np.mean(wins))
    assert found["eval/difference/kl"]["value"] == pytest.approx(np.mean([r["kl"] for r in rows]))
    assert found["eval/difference/kl"]["value"] > 0
    out = capsys.readouterr().out
    assert "win rate at equal length" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80 or str(place) in out


def test_a_proxy_says_how_far_it_was_over_optimized_and_whether_it_ranks_as_the_judge(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    assert evaluated(place, tmp_path, proxy="my_reward:longest") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    rows = records(tmp_path / "out" / "answers.jsonl")
    excess, alike, errors = [], [], []
    for row in rows:
        assert row["policy/proxy"] == [0.5 * len(text) for text in row["policy"]]
        gain = {
            name: np.mean(row[f"policy/{name}"]) - np.mean(row[f"reference/{name}"])
            for name in ("reward", "proxy")
        }
        excess.append(gain["proxy"] - gain["reward"])
        hits = []
        for a, b in itertools.combinations(range(3), 2):
            d, true = (row[f"policy/{n}"][a] - row[f"policy/{n}"][b] for n in ("proxy", "reward"))
            hits.append(0.5 if d == 0 else 0.0)  # the judge likes short ones, the proxy long ones
            # P(the proxy's favourite is the judge's) against the proxy's confidence.
            confidence = 1 / (1 + np.exp(-abs(d)))
            right = 1 / (1 + np.exp(-true * np.sign(d))) if d else 0.5
            errors.append((min(int((confidence - 0.5) * 20), 9), right - confidence))
        alike.append(np.mean(hits))
    over = found["eval/difference/over_optimization"]
    assert over["value"] == pytest.approx(np.mean(excess))
    assert over["stderr"] == pytest.approx(np.std(excess, ddof=1) / np.sqrt(3))
    assert found["eval/policy/proxy_agreement"]["value"] == pytest.approx(np.mean(alike))
    by_bin = [sum(gap for at, gap in errors if at == number) for number in range(10)]
    ece = found["eval/policy/proxy_calibration"]
    assert ece["value"] == pytest.approx(sum(map(abs, by_bin)) / len(errors), rel=1e-5)
    assert 0 <= ece["stderr"] < 0.5
    assert "over-optimization" in capsys.readouterr().out
    # A judge that is its own proxy is perfect, but for float32.
    same = {
        role: np.array([row[f"{role}/reward"] for row in rows]) for role in ("policy", "reference")
    }
    metrics = evaluate_proxy.by_proxy(same, same)
    assert metrics["difference/over_optimization"].value == 0
    assert metrics["policy/proxy_calibration"].value < 1e-6
    one = {role: values[:, :1] for role, values in same.items()}
    assert set(evaluate_proxy.by_proxy(one, one)) == {
        "policy/proxy", "reference/proxy", "difference/proxy", "difference/over_optimization",
    }  # fmt: skip


def test_a_policy_against_itself_is_at_no_distance(place, tmp_path, capsys):
    changed = {"against": place / "ours", "reward": place / "heaps", "count": 2}
    assert evaluated(place, tmp_path, **changed) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert abs(found["eval/difference/kl"]["value"]) < 1e-6
    assert found["eval/difference/kl"]["n"] == 2


@pytest.mark.slow
def test_a_reward_model_judges_text_as_it_judges_tokens(place):
    config = evaluate.EvalConfig(
        model="m", against="m", prompts="p", reward="r", max_response_length=8, rows=8
    )
    judge = evaluate.make_judge(str(place / "judge"), config, None)
    asked = [policies.Asked(evaluate_example(text), text) for text in ("the cat ", "a good ")]
    texts = [["sat on", "ran"], ["dog ran", ""]]
    found = judge(asked, texts)
    loaded = rewards.load(place / "judge")
    encoder = tokenize.encoder(tokenize.load(place / "judge"))
    for row, prompt in enumerate(("the cat ", "a good ")):
        for column, text in enumerate(texts[row]):
            ids = encoder.response(text)
            p = encoder.prompt(prompt)
            expected = rewards.reward(
                loaded.model,
                loaded.params,
                *jax.tree.map(
                    jax.numpy.asarray, (ragged([p], [len(p)]), ragged([[ids]], [[len(ids)]]))
                ),
            )
            np.testing.assert_allclose(found[row, column], expected[0, 0], rtol=1e-4, atol=1e-5)


def evaluate_example(text):
    return policies.Example(text, [], [])


def test_win_rate_at_equal_length_against_an_optimizer():
    rng = np.random.default_rng(0)
    longer = rng.normal(2, 5, (60, 3, 3))
    truth = scipy.special.expit(0.4 + 1.2 * np.tanh(longer / longer.std()))
    wins = (rng.random(truth.shape) < truth).astype(float)
    found = evaluate.wins_at_equal_length(wins, longer)
    x = np.tanh(longer / longer.std()).ravel()

    def loss(w):
        margin = w[0] + w[1] * x
        return (np.logaddexp(0, margin) - wins.ravel() * margin).sum() + 0.5e-3 * (w @ w)

    best = scipy.optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    assert found.value == pytest.approx(scipy.special.expit(best[0]), abs=1e-5)
    # Independent draws: the error is the model's own, within its noise over 60 prompts.
    p = scipy.special.expit(best[0] + best[1] * x)
    design = np.stack([np.ones_like(x), x], 1)
    model = np.linalg.inv((design.T * (p * (1 - p))) @ design)[0, 0] ** 0.5
    assert found.stderr == pytest.approx(found.value * (1 - found.value) * model, rel=0.4)
    # Won where longer, lost where shorter: at equal length nothing is left of it.
    even = np.stack([np.full((40, 1, 1), 3.0), np.full((40, 1, 1), -3.0)]).reshape(80, 1, 1)
    assert evaluate.wins_at_equal_length((even > 0) * 1.0, even).value == pytest.approx(0.5)
    # All won at one length: finite.
    assert 0.9 < evaluate.wins_at_equal_length(np.ones((9, 2, 2)), np.zeros((9, 2, 2))).value <= 1


def test_distinct_2_counts_pairs_of_words():
    assert evaluate.distinct_2(["a b c", "A B"]) == pytest.approx(2 / 3)
    assert evaluate.distinct_2(["one", ""]) == 1.0


def test_kl_is_that_of_scoring(place, monkeypatch):
    config = evaluate.EvalConfig(model="m", against="m", prompts="p", reward="r", rows=8)
    loaded = {
        role: policies.load(str(place / name), dtype="float32", stop=None, mesh=None)
        for role, name in (("policy", "ours"), ("reference", "theirs"))
    }
    prompts = ragged([[4, 5, 6], [7, 8, 0]], [3, 2])
    responses = ragged([[[5, 6], [9, 0]], [[3, 4], [5, 5]]], [[2, 1], [2, 2]])
    found = evaluate._kl(loaded, prompts, responses, config, None)
    ours, theirs = loaded["policy"].loaded, loaded["reference"].loaded
    laws = []
    for model in (ours, theirs):
        hidden = scoring._predicting_hidden(
            model.model, model.params, Ragged(*map(jax.numpy.asarray, prompts)),
            Ragged(*map(jax.numpy.asarray, responses)),
        )  # fmt: skip
        logits = np.asarray(model.model.unembed(model.params, hidden), np.float64)
        laws.append(logits - scipy.special.logsumexp(logits, -1, keepdims=True))
    each = (np.exp(laws[0]) * (laws[0] - laws[1])).sum(-1)
    where = np.arange(2) < np.asarray(responses.lengths)[..., None]
    np.testing.assert_allclose(found, each * where, rtol=1e-4, atol=1e-6)


def test_ones_own_reward_reads_text(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    tokenizer = tokenize.encoder(tokenize.load(place / "ours"))
    prompts, answers = ["the cat ", "bird "], [["a", "sat on"], ["dog", "mat"]]
    asked = [tokenizer.prompt(text) for text in prompts]
    said = [[tokenizer.response(text) for text in row] for row in answers]
    pad = lambda ids, n: [*ids, *[0] * (n - len(ids))]  # noqa: E731
    given = (
        ragged([pad(p, 8) for p in asked], list(map(len, asked))),
        ragged([[pad(r, 8) for r in row] for row in said], [[len(r) for r in row] for row in said]),
    )
    seen = []

    def reward(prompts, texts):
        seen.extend(zip(prompts, texts, strict=True))
        return np.arange(4.0)

    np.testing.assert_array_equal(
        oracle.prompted(reward, tokenizer.decode)(*given), [[0, 1], [2, 3]]
    )
    assert seen == [(p, text) for p, row in zip(prompts, answers, strict=True) for text in row]
    scored = known_text(reward, tokenizer.decode).score((), Policies((), (), (), ()), *given)
    np.testing.assert_array_equal(scored.reward, [[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="one number to each"):
        oracle.prompted(lambda prompts, texts: [1.0], tokenizer.decode)(*given)
    with pytest.raises(ValueError, match="the reward of text 1"):
        oracle.prompted(lambda p, t: [0, np.nan, 0, 0], tokenizer.decode)(*given)
    for spec, message in {
        "my_reward:absent": "my_reward has no function 'absent'",
        "my_reward:one": "returned shape (1,)",
    }.items():
        assert evaluated(place, tmp_path, reward=spec, count=2) == 2
        assert message in capsys.readouterr().err
