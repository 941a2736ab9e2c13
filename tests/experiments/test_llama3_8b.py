"""The 8B recipe: its file, its phases compiled, and the whole of it at a toy size on two processes.

The script is ``klrlhf iterate --config iterate.yaml``; the toy run changes sizes and paths alone.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.llama3_8b import plan
from jax_klrlhf import cli, models
from jax_klrlhf.data import tokenize
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.programs import iterate_config

ROOT = Path(__file__).resolve().parents[2]
TOY = {
    "max-prompt-length": 24,
    "max-response-length": 6,
    "prompts-per-round": 8,
    "rounds": 1,
    "rows": 8,
    "samples": 4,
    "held-out": 4,
    "fit.steps": 2,
    "fit.batch-size": 8,
    "fit.learning-rate": 1e-3,
    "mesh.tensor": 2,
    "sampling-tensor": 2,
}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_the_recipe_is_a_configuration_of_klrlhf_iterate():
    config = cli.parse("iterate", ["--config", str(plan.CONFIG), "--rounds", "1"])
    assert isinstance(config, iterate_config.IterateConfig)
    iterate_config.check(config)
    assert config.mesh.tensor == 1
    assert config.fit.learning_rate == 5e-7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny policy, a reward model of its tokenizer, and chats in UltraFeedback's columns."""
    folder = tmp_path_factory.mktemp("place")
    words = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew"]
    rng = np.random.default_rng(0)
    asked = [f"{' '.join(rng.choice(words, 3))} {number}" for number in range(12)]
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    rows = [
        {
            "prompt": text,
            "chosen": [turn("user", text), turn("assistant", "a cat")],
            "rejected": [turn("user", text), turn("assistant", "the dog")],
        }
        for text in asked
    ]
    (folder / "train_prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenize.train_tokenizer(
        [*asked, "user: assistant: "], vocab_size=280, folder=folder / "tok", chat_template=CHAT
    )
    config = models.ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=8,
        max_length=64,
    )
    params = models.language_model(config).init(jax.random.key(0))
    models.save(folder / "model", config, params, tokenizer)
    head = rewards.init_head(jax.random.key(1), dim=16)
    rewards.save(folder / "judge", config, rewards.RewardParams(params, head), tokenizer)
    return folder


@pytest.mark.slow
def test_two_processes_run_the_whole_recipe_at_a_toy_size(place, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    toy = TOY | {
        "config": plan.CONFIG,
        "model": place / "model",
        "prompts": place / "train_prefs.jsonl",
        "reward": place / "judge",
        "output": tmp_path / "run",
        "processes.coordinator": address,
        "processes.count": 2,
    }
    arguments = [t for name, value in toy.items() for t in (f"--{name}", str(value))]
    # A single file has no split.
    arguments += ["--prompts-split", "None"]
    # The session's flags, and then ours: the last one counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    last = ["--processes.index"]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "jax_klrlhf.cli", "iterate", *arguments, *last, str(index)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        # Together: where one fails, the other waits for it.
        texts = [child.communicate(timeout=900)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(texts)
    assert "round 1/1" in texts[0]
    (row,) = (
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    )
    assert 0 < row["labels/count"] <= 8
    assert row["eval/kl/ref"] > 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["device"]["count"] == 8
    assert found["config"]["dtype"] == "bfloat16"
    trained, start = (models.load(f / "model") for f in (tmp_path / "run", place))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), trained.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_every_phase_is_planned(place, tmp_path):
    """On CPU devices; the README's numbers are of the TPU compiler."""
    recipe = tmp_path / "toy.yaml"
    text = plan.CONFIG.read_text()
    for old, new in (
        ("max_prompt_length: 1024", "max_prompt_length: 16"),
        ("max_response_length: 1024", "max_response_length: 8"),
        ("rows: 256", "rows: 8"),
        ("batch_size: 64", "batch_size: 8"),
        ("samples: 8", "samples: 2"),
        ("tensor: 1", "tensor: 2"),
    ):
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    config = plan.Config(
        config=recipe, model=str(place / "model"), topology="cpu:8", output=tmp_path / "out",
        phases=("move", "score", "reference"), sampling_tensor=4,
    )  # fmt: skip
    move, score, reference = plan.main(config)
    # From fsdp 4 x tensor 2 to tensor 4: a chip ends with a quarter of the largest parameter.
    assert move.work is not None
    assert {one.kind for one in move.work.collectives} <= {
        "all-gather",
        "collective-permute",
        "all-to-all",
    }
    assert move.memory is not None
    assert move.memory["new outputs"] == 2 * move.arguments["parameter"]
    assert (score.program.name, reference.program.name) == ("score", "reference")
    for found in (score, reference):
        assert found.refusal is None
        assert found.total > 0
        # Two prompt-sized passes at least are done over eight devices.
        assert found.flops > 0
    # The reward model reads as many responses to a prompt as are drawn, without a vocabulary.
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["fit/score/fits"]["value"] == metrics["fit/reference/fits"]["value"] == 1
