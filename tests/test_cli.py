"""The command line: what it writes, what it refuses, and that a file says what the shell said."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from jax_klrlhf import cli, models
from jax_klrlhf.core.objectives import Scores
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs import DpoConfig
from jax_klrlhf.programs import config as configs

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
    program, config = cli.parse("dpo", ["--config", str(saved), "--kl-coef", "0.25"])
    assert program.__name__ == "dpo"
    assert config.kl_coef == 0.25
    assert config.batch_size == 16
    assert config.output == output
    assert config.lora == configs.Adapter()
    yaml = tmp_path / "run.yaml"
    yaml.write_text("model: m\ndata: d\noutput: o\noptions: {label_smoothing: 0.1}\n")
    assert cli.parse("dpo", [f"--config={yaml}"])[1].options == {"label_smoothing": 0.1}
    assert cli.main(["sft", "--config", str(saved)]) == 2
    assert "a configuration of klrlhf dpo, not of sft" in capsys.readouterr().err


def test_a_run_goes_on_or_refuses_another_configuration(dpo_run, capsys):
    output, arguments = dpo_run
    before = (output / "metrics.jsonl").read_text()
    assert cli.main(["dpo", *arguments]) == 0  # finished already: nothing is trained again
    assert "going on from step 4 of 4" in capsys.readouterr().out
    after = (output / "metrics.jsonl").read_text().splitlines()
    assert [line for line in after if '"loss"' in line] == [
        line for line in before.splitlines() if '"loss"' in line
    ]
    assert cli.main(["dpo", *arguments, "--learning-rate", "1e-4"]) == 2
    error = capsys.readouterr().err
    assert "started with learning_rate 0.001, now it is 0.0001" in error
    assert error.count("\n") == 1


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


def test_lora_with_the_base_as_reference(tiny, pairs, tmp_path):
    arguments = options(tiny, pairs, tmp_path, **{"lora.rank": 2, "reference": "live"})
    assert cli.main(["dpo", *arguments, "--kl-prompts", "0", "--learning-rate", "1e-2"]) == 0
    rows = history(tmp_path)
    assert rows[0]["rewards/margins"] != 0
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(np.abs(value).max() > 0 for name, value in tensors.items() if "lora_B" in name)
    assert "eval/sigmoid/kl/ref" not in results(tmp_path)["metrics"]


def test_dpo_in_streams_without_padding(dpo_run, tiny, pairs, tmp_path):
    output = tmp_path / "packed"
    arguments = options(tiny, pairs, output, **{"layout": "packed", "kl-prompts": 0})
    assert cli.main(["dpo", *arguments, "--lora.rank", "2"]) == 0
    rows = history(output)
    # The cached reference was scored in padded batches: the policy begins at it all the same.
    assert abs(rows[0]["loss"] - np.log(2)) < 0.1
    packed, padded = (found[0]["perf/padding_fraction"] for found in (rows, history(dpo_run[0])))
    assert packed < 0.8 * padded


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
    assert models.reward.load(tmp_path / "rm" / "model").params.head.shape == (16,)


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
    "steps": (["--steps", "0"], "steps is 0"),
    "warmup": (["--warmup", "1"], "a share of the steps"),
    "decay": (["--optimizer", "adafactor", "--weight-decay", "0.1"], "adafactor has none"),
    "mesh": (["--mesh.fsdp", "3"], "mesh data=8, fsdp=3, tensor=1"),
    "batch": (["--batch-size", "12"], "batch_size 12 must be a multiple of 8"),
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
    )
    needed = {
        "robust": {"flip_rate": 0.1},
        "rpo": {"sft_coef": 1.0},
        "simpo": {"margin": 0.5},
        "chi_po": {"clip": 1.0},
    }
    reads = {}
    for name in configs.OBJECTIVES:
        loss, reads[name] = configs.objective(name, kl_coef=0.1, options=needed.get(name, {}))
        value = loss(scores)
        assert value.shape == (1,)
        assert bool(jax.numpy.isfinite(value)[0])
    assert [name for name, needs in reads.items() if not needs] == ["simpo"]


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dpo", "--help"])
    assert stopped.value.code == 0
    assert "--kl-coef" in capsys.readouterr().out
