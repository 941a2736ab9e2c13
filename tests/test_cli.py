"""The command line: what it writes, what it refuses, and that a file says what the shell said."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import jax_klrlhf
from jax_klrlhf import cli, models
from jax_klrlhf.core.objectives import Scores
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import lora
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.programs import DpoConfig, losses
from jax_klrlhf.programs import config as configs

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "mat", "tree"]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """What is looked at here is files and messages: compile fast, run slowly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def sentence(rng, length):
    return " ".join(rng.choice(WORDS, length))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Preferences for short answers that end in "good"."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": sentence(rng, rng.integers(2, 6)) + " ",
            "chosen": sentence(rng, rng.integers(1, 4)) + " good",
            "rejected": sentence(rng, rng.integers(2, 6)) + " bad",
        }
        for _ in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, pairs):
    """A random Llama with a tokenizer of its own, saved as a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    texts = (row[key] for row in rows for key in ("prompt", "chosen", "rejected"))
    words = folder.with_name("tokenizer")
    tokenizer = tokenize.train_tokenizer(texts, vocab_size=300, folder=words)
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
    params = models.language_model(config).init(jax.random.key(0))
    models.save(folder, config, params, tokenizer)
    return folder


def options(tiny, pairs, output, **changed):
    given = {
        "model": tiny,
        "data": pairs,
        "output": output,
        "batch-size": 16,
        "max-prompt-length": 16,
        "max-response-length": 12,
        "mesh.data": 8,
        "mesh.fsdp": 1,
        "max-shapes": 1,
        "steps": 4,
        "log-every": 2,
        "save-every": 2,
        "test-fraction": 0.3,
        "learning-rate": 1e-3,
    } | changed
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def results(folder: Path):
    return json.loads((folder / "results.json").read_text())


def history(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dpo_run(tiny, pairs, tmp_path_factory):
    """`klrlhf dpo` with all that it writes, on eight devices."""
    output = tmp_path_factory.mktemp("dpo") / "run"
    arguments = options(tiny, pairs, output, **{"kl-prompts": 8, "kl-coef": 0.5})
    arguments += ["--mesh.data", "4", "--mesh.fsdp", "2"]
    assert cli.main(["dpo", *arguments, "--tensorboard"]) == 0
    return output, arguments


def test_dpo_trains_and_leaves_everything(dpo_run, tiny):
    output, _ = dpo_run
    found = results(output)
    assert found["name"] == "dpo"
    assert found["seeds"] == [0]
    assert found["config"]["kl_coef"] == 0.5
    metrics = found["metrics"]
    for name in (
        "train/sigmoid/loss",
        "train/sigmoid/rewards/margins",
        "train/sigmoid/perf/padding_fraction",
        "eval/sigmoid/loss",
        "eval/sigmoid/rewards/accuracies",
        "eval/sigmoid/calibration_error",
        "eval/sigmoid/kl/ref",
        "eval/sigmoid/entropy",
        "eval/sigmoid/sampler_scorer_mismatch",
    ):
        assert isinstance(metrics[name]["value"], float), name
    assert metrics["eval/sigmoid/kl/ref"]["value"] > 0
    assert metrics["eval/sigmoid/kl/ref"]["stderr"] > 0
    rows = history(output)
    assert [row["step"] for row in rows] == [2, 4, 4]
    # The policy began at the reference, scored by another program: the first margins are those of
    # two steps, not of two models.
    assert abs(rows[0]["loss"] - np.log(2)) < 0.1
    assert rows[1]["rewards/margins"] > rows[0]["rewards/margins"]
    assert any((output / "tensorboard").iterdir())
    trained = models.load(output / "model")
    start = models.load(tiny)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), trained.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert trained.config.vocab_size == start.config.vocab_size


def test_the_saved_configuration_is_the_run(dpo_run, tmp_path, capsys):
    output, _ = dpo_run
    saved = output / "config.json"
    config = cli.parse("dpo", ["--config", str(saved), "--kl-coef", "0.25"])
    assert isinstance(config, DpoConfig)
    assert config.kl_coef == 0.25
    assert config.batch_size == 16
    assert config.output == output
    assert config.lora == configs.Adapter()
    yaml = tmp_path / "run.yaml"
    yaml.write_text("model: m\ndata: d\noutput: o\noptions: {label_smoothing: 0.1}\n")
    assert cli.parse("dpo", [f"--config={yaml}"]).options == {"label_smoothing": 0.1}
    assert cli.main(["sft", "--config", str(saved)]) == 2
    assert "a configuration of klrlhf dpo, not of sft" in capsys.readouterr().err


def test_a_run_goes_on_or_refuses_another_configuration(dpo_run, capsys):
    output, arguments = dpo_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", None)  # nothing is loaded, let alone trained
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        arguments = [*arguments, "--tensorboard"]
        assert cli.main(["dpo", *arguments]) == 0
        said = capsys.readouterr().out
        assert "finished already" in said
        # Said in other words it is read first, and is as finished.
        assert cli.main(["dpo", "--tensorboard", *arguments[:-1]]) == 0
        assert capsys.readouterr().out == said
        assert str(output / "model") in said
        # What a finished run would not read is refused by name.
        assert cli.main(["dpo", *arguments, "--kl-prompts", "9"]) == 2
        assert "--kl-prompts would be read by nothing" in capsys.readouterr().err
        assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert cli.main(["dpo", *arguments, "--learning-rate", "1e-4"]) == 2
    error = capsys.readouterr().err
    assert "started with learning_rate 0.001, now it is 0.0001" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_finished_run_takes_more_steps(tiny, pairs, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = options(tiny, pairs, output, **{"kl-prompts": 0, "test-fraction": 0})
    assert cli.main(["dpo", *arguments]) == 0
    assert f"The result is in {output / 'model'}" in " ".join(capsys.readouterr().out.split())
    first = models.load(output / "model").params
    more = [*arguments, "--steps", "6"]
    assert cli.main(["dpo", *more]) == 0
    assert "going on from step 4 of 6" in capsys.readouterr().out
    assert [row["step"] for row in history(output)] == [2, 4, 6]
    moved = jax.tree.map(
        lambda a, b: float(abs(a - b).max()), first, models.load(output / "model").params
    )
    assert max(jax.tree.leaves(moved)) > 0
    assert cli.main(["dpo", *more]) == 0
    assert "finished already" in capsys.readouterr().out
    assert cli.main(["dpo", *arguments]) == 2
    assert "has taken 6 steps already" in capsys.readouterr().err


def test_an_objective_of_ones_own(tiny, pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_objective.py").write_text(
        "import jax\n"
        "def squared(chosen_log_ratio, rejected_log_ratio, *, kl_coef, goal=1.0):\n"
        "    return (kl_coef * (chosen_log_ratio - rejected_log_ratio) - goal) ** 2\n"
        "def of_scores(scores):\n"
        "    return jax.nn.softplus(-scores.log_ratio[..., 0])\n"
        "def scalar(scores):\n"
        "    return scores.log_prob.sum()\n"
        "def other(temperature):\n"
        "    return temperature\n"
    )
    monkeypatch.chdir(tmp_path)
    scores = Scores(
        jax.numpy.array([[-3.0, -5.0]]),
        jax.numpy.array([[-4.0, -4.0]]),
        jax.numpy.array([[3, 4]]),
    )
    name = "mine_objective:squared"
    loss, needs = losses.objective(name, kl_coef=0.5, options={"goal": 3.0})
    assert needs
    np.testing.assert_allclose(loss(scores), [(0.5 * 2 - 3) ** 2])
    loss, needs = losses.objective("mine_objective:of_scores", kl_coef=0.5, options={})
    np.testing.assert_allclose(loss(scores), np.log1p(np.exp([-1.0])), rtol=1e-6)
    assert needs
    for function, message in {
        "scalar": "a loss is [pairs]",
        "other": "its argument 'temperature' is nothing that a pair has",
        "absent": "mine_objective has no function 'absent'",
    }.items():
        given = ["dpo", *options(tiny, pairs, tmp_path / "run")]
        assert cli.main([*given, "--objective", f"mine_objective:{function}"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*given, "--objective", "absent_module:f"]) == 2
    assert "absent_module cannot be imported" in capsys.readouterr().err


def test_another_models_reference_cache_is_refused_by_name(dpo_run, tiny, pairs, tmp_path, capsys):
    output, _ = dpo_run
    other = tmp_path / "other"
    loaded = models.load(tiny)
    params = jax.tree.map(lambda x: x * 1.5, loaded.params)
    models.save(other, loaded.config, params, loaded.tokenizer)
    arguments = options(other, pairs, tmp_path / "run")
    cache = ["--reference-cache", str(output / "reference.safetensors")]
    assert cli.main(["dpo", *arguments, *cache]) == 2
    error = capsys.readouterr().err
    assert "computed with another model" in error
    assert "reference-train.safetensors" in error


@pytest.mark.slow
def test_lora_with_the_base_as_reference(tiny, pairs, tmp_path):
    arguments = options(tiny, pairs, tmp_path, **{"lora.rank": 2, "reference": "live"})
    assert cli.main(["dpo", *arguments, "--kl-prompts", "0", "--learning-rate", "1e-2"]) == 0
    rows = history(tmp_path)
    assert rows[0]["rewards/margins"] != 0
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(np.abs(value).max() > 0 for name, value in tensors.items() if "lora_B" in name)
    assert "eval/sigmoid/kl/ref" not in results(tmp_path)["metrics"]
    # The whole model beside it is the base with the adapter in it, and opens like any other.
    merged, base = models.load(tmp_path / "model"), models.load(tiny)
    facts, adapter = lora.load(tmp_path / "adapter", base.config)
    want = lora.merge({"base": base.params, "lora": adapter}, facts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.params, want)
    assert any(
        np.abs(a - b).max() > 1e-4
        for a, b in zip(jax.tree.leaves(merged.params), jax.tree.leaves(base.params), strict=True)
    )


@pytest.mark.slow
def test_dpo_in_streams_without_padding(dpo_run, tiny, pairs, tmp_path):
    output = tmp_path / "packed"
    arguments = options(tiny, pairs, output, **{"layout": "packed", "kl-prompts": 0})
    assert cli.main(["dpo", *arguments, "--lora.rank", "2", "--lora.no-merged"]) == 0
    assert (output / "adapter").is_dir()
    assert not (output / "model").exists()
    rows = history(output)
    # The cached reference was scored in padded batches: the policy begins at it all the same.
    assert abs(rows[0]["loss"] - np.log(2)) < 0.1
    packed, padded = (found[0]["perf/padding_fraction"] for found in (rows, history(dpo_run[0])))
    assert packed < 0.8 * padded


@pytest.mark.slow
def test_sft_then_reward_from_a_configuration_alone(tiny, pairs, tmp_path):
    arguments = options(tiny, pairs, tmp_path / "sft", weights="random", steps=8)
    assert cli.main(["sft", *arguments, "--learning-rate", "1e-2"]) == 0
    rows = history(tmp_path / "sft")
    losses = [row["loss"] for row in rows if "loss" in row]
    # From random weights the first loss is about that of the uniform law over the vocabulary.
    vocabulary = models.load(tiny).config.vocab_size
    assert abs(losses[0] - np.log(vocabulary)) < 0.5
    assert losses[-1] < losses[0] - 0.3

    arguments = options(tmp_path / "sft" / "model", pairs, tmp_path / "rm", centring=0.01, steps=30)
    assert cli.main(["reward", *arguments, "--learning-rate", "1e-2"]) == 0
    metrics = results(tmp_path / "rm")["metrics"]
    # Chosen ends in "good", rejected in "bad": one word decides, and a model must find it.
    accuracy = metrics["eval/reward/rewards/accuracies"]
    assert accuracy["value"] > 0.9
    assert 0 <= metrics["eval/reward/calibration_error"]["value"] < 0.5
    assert rewards.load(tmp_path / "rm" / "model").params.head.shape == (16,)


def test_data_describes(tiny, pairs, tmp_path, capsys):
    arguments = ["--data", str(pairs), "--tokenizer", str(tiny), "--output", str(tmp_path / "d")]
    assert cli.main(["data", *arguments]) == 0
    assert "examples read" in capsys.readouterr().out
    assert (tmp_path / "d" / "prepared.json").is_file()


BAD = {
    "no command": (["train"], "no command 'train'"),
    "no file": (["dpo", "--config", "absent.json"], "absent.json: cannot be read"),
    "objective": (["--objective", "dpo"], "objective 'dpo': there are sigmoid"),
    "option": (["--options", "clip", "1"], "sigmoid takes no 'clip'; it takes label_smoothing"),
    "needs": (["--objective", "robust"], "robust needs a number for 'flip_rate'"),
    "ignored": (
        ["--objective", "simpo", "--options", "margin", "1", "--reference", "live"],
        "simpo reads no reference",
    ),
    "lora": (["--lora.rank", "2", "--lora.targets", "all"], "targets=('all',)"),
    "no adapter": (["--lora.no-merged"], "--lora.no-merged: of an adapter; give --lora.rank"),
    "steps": (["--steps", "0"], "steps is 0"),
    "warmup": (["--warmup", "1"], "--warmup is 1.0; it is a share in [0, 1)"),
    "decay": (
        ["--optimizer", "adafactor", "--weight-decay", "0.1"],
        "--weight-decay is read by no run with --optimizer adafactor; leave it out",
    ),
    "mesh": (["--mesh.fsdp", "3"], "mesh data=8, fsdp=3, tensor=1"),
    "kl": (["--kl-coef", "0"], "--kl-coef is 0.0; it must be positive"),
    "negative kl": (["--kl-coef", "-0.1"], "--kl-coef is -0.1; it must be positive"),
    "nan": (["--kl-coef", "nan"], "--kl-coef is nan; it must be positive"),
    "rate": (["--learning-rate", "nan"], "--learning-rate is nan"),
    "clip": (["--clip", "0"], "--clip is 0.0; it must be positive"),
    "smoothing": (["--options", "label_smoothing", "0.6"], "label_smoothing is 0.6"),
    "no number": (["--options", "label_smoothing", "nan"], "label_smoothing is nan"),
    "seed": (["--seed", "-1"], "--seed is -1"),
    "for ever": (["--epochs", "inf"], "--epochs is inf"),
    "both": (["--epochs", "2"], "--epochs: --steps says how long"),
    "samples": (["--kl-samples", "0"], "--kl-samples must be at least 1"),
    "fraction": (["--test-fraction", "1"], "--test-fraction is 1.0"),
    "misspelt": (["--objective", "sigmoit"], "did you mean sigmoid?"),
    "misspelt command": (["dop"], "did you mean dpo?"),
    "batch": (["--batch-size", "12"], "--batch-size 12 must be a multiple of 8"),
    "model": (["--model", "absent/folder"], "absent/folder"),
    "data": (["--data", "absent.jsonl"], "absent.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_two(case, tiny, pairs, tmp_path, capsys):
    given, message = BAD[case]
    if given[0].startswith("--"):
        given = ["dpo", *options(tiny, pairs, tmp_path / "run"), *given]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("klrlhf: ")
    assert error.count("\n") == 1
    assert message in error


FILES = {
    "{": "not valid JSON",
    "[]": "expected an object",
    '{"model": "m", "data": "d"}': "key 'output' is missing",
    '{"model": "m", "data": "d", "output": "o", "kl": 1}': "unknown key 'kl'",
    '{"model": "m", "data": "d", "output": "o", "batchsize": 1}': r"did you mean batch_size\?",
    '{"model": "m", "data": "d", "output": "o", "kl_coef": "big"}': "kl_coef: expected float",
    '{"model": "m", "data": "d", "output": "o", "schedule": "x"}': "is none of cosine, linear",
    '{"model": "m", "data": "d", "output": "o", "steps": 1.5}': "steps: expected int",
    '{"model": "m", "data": "d", "output": "o", "mesh": {"x": 1}}': "mesh: unknown key 'x'",
}


@pytest.mark.parametrize("text", FILES)
def test_a_bad_configuration_file_names_its_key(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=FILES[text]):
        configs.read(path, DpoConfig)


def test_every_objective_has_a_name_that_works():
    scores = Scores(
        jax.numpy.array([[-3.0, -5.0]]),
        jax.numpy.array([[-4.0, -4.0]]),
        jax.numpy.array([[3, 4]]),
        reward=jax.numpy.array([[0.5, -0.2]]),
    )
    needed = {
        "modpo": {"weight": 0.5},
        "odpo": {"margin_coef": 0.5},
        "robust": {"flip_rate": 0.1},
        "rpo": {"sft_coef": 1.0},
        "simpo": {"margin": 0.5},
        "chi_po": {"clip": 1.0},
        "cpo": {"sft_coef": 1.0},
        "exo": {"label_smoothing": 0.1},
        "orpo": {"odds_coef": 0.1},
        "kto": {"shift": 0.0},
    }
    reads = {}
    for name in losses.OBJECTIVES:
        loss, reads[name] = losses.objective(name, kl_coef=0.1, options=needed.get(name, {}))
        value = loss(scores)
        assert value.shape == (1,)
        assert bool(jax.numpy.isfinite(value)[0])
    for name, needs in reads.items():
        loss, _ = losses.objective(name, kl_coef=0.1, options=needed.get(name, {}))
        if needs:
            with pytest.raises(ValueError, match="ref_log_prob"):
                loss(scores._replace(ref_log_prob=None))
        else:
            assert loss(scores._replace(ref_log_prob=None)).shape == (1,)
    assert [name for name, needs in reads.items() if not needs] == ["simpo", "cpo", "orpo"]


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dpo", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--kl-coef" in text
    assert "--config FILE" in text
    with pytest.raises(SystemExit):
        cli.main(["dpo", "--kl-coeff", "1"])
    assert "--kl-coef" in capsys.readouterr().err  # the parser's own suggestion


def test_version_module_and_a_reader_that_goes_away():
    run = lambda line: subprocess.run(  # noqa: E731
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    klrlhf = f"{sys.executable} -m jax_klrlhf"
    done = run(f"{klrlhf} --version")
    assert (done.stdout, done.returncode) == (f"klrlhf {jax_klrlhf.__version__}\n", 0)
    # The reader has gone before a word is written.
    done = run(f"(sleep 0.5; {klrlhf} -h; echo status $? >&2) | true")
    assert done.stderr == "status 0\n"


HEAVY = ("numpy", "jax", "flax", "optax", "orbax", "torch", "transformers", "tokenizers")
HEAVY += ("tensorflow_datasets", "array_record", "pyarrow", "safetensors", "huggingface_hub")
HELP = """
import contextlib, io, sys
from jax_klrlhf import cli

for arguments in [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main(arguments)
    found = [name for name in sys.argv[1:] if name in sys.modules]
    print(arguments[0], "usage: klrlhf" in said.getvalue() or said.getvalue(), found)
"""


def test_help_of_every_command_imports_nothing_heavy():
    """By the modules that are there afterwards, so that no clock is asked."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, *HEAVY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    version = f"--version klrlhf {jax_klrlhf.__version__}"
    names = ["--help True", version, *(f"{name} True" for name in cli.COMMANDS)]
    assert done.stdout.replace("\n []", " []").splitlines() == [f"{name} []" for name in names]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_program_of_its_configuration(name):
    """Both are imported when they are asked for, so a wrong name would be found by a user."""
    parameter = inspect.signature(cli.program(name)).parameters["config"]
    assert cli.COMMANDS[name].config.endswith(f":{parameter.annotation.__name__}")


def test_options_that_prepared_data_would_ignore_are_refused(tiny, pairs, tmp_path, capsys):
    data = tmp_path / "data"
    given = ["--data", str(pairs), "--tokenizer", str(tiny), "--output", str(data)]
    assert cli.main(["data", *given, "--max-prompt-length", "16"]) == 0
    arguments = options(tiny, data, tmp_path / "run", **{"max-prompt-length": 20})
    for name in ("max-response-length", "test-fraction"):
        at = arguments.index(f"--{name}")
        del arguments[at : at + 2]
    capsys.readouterr()
    assert cli.main(["dpo", *arguments]) == 2
    assert "--max-prompt-length 20: " in capsys.readouterr().err
    arguments[arguments.index("20")] = "16"
    assert cli.main(["dpo", *arguments, "--columns.prompt", "question"]) == 2
    assert "--columns " in capsys.readouterr().err


def test_remedies_are_in_the_words_of_the_shell(tiny, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "good": "b"}\n')
    assert cli.main(["dpo", *options(tiny, tmp_path / "rows.jsonl", tmp_path / "run")]) == 2
    assert "name yours with --columns.prompt, --columns.chosen" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    assert cli.main(["dpo", *options(tiny, tmp_path / "rows.jsonl", tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "column 'rejected' is missing" in error
    assert "--columns.prompt, --columns.chosen" in error
    # Another command's option is named with the command.
    given = ["--prompts", str(tmp_path / "rows.jsonl"), "--models", str(tiny)]
    assert cli.main(["generate", *given]) == 2
    assert "--columns.prompt" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}\n' * 9
    )
    few = options(tiny, tmp_path / "rows.jsonl", tmp_path / "run", **{"test-fraction": 0})
    assert cli.main(["dpo", *few]) == 2
    assert "klrlhf data --arrange best_worst" in capsys.readouterr().err
    few = options(tiny, tmp_path / "rows.jsonl", tmp_path / "other", **{"test-fraction": 0.99})
    assert cli.main(["dpo", *few]) == 2
    error = capsys.readouterr().err
    assert "would be empty" in error
    assert "--test-fraction 0.99" in error
