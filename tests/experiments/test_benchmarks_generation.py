"""The sampling and scoring benchmarks run, at toy size, and leave their numbers behind."""

import io
import json

import pytest
from rich.console import Console

from experiments.benchmarks import paired, sampling, scoring
from jax_klrlhf.errors import InputError


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(paired, "PAUSE", 0.0)


def test_sampling(tmp_path):
    config = sampling.Config(
        output=tmp_path, samples=2, turns=2, lengths=(8,), sharing_batch=2, sharing_new_tokens=2,
        width=16, layers=1,
    )  # fmt: skip
    screen = io.StringIO()
    path = sampling.main(config, console=Console(file=screen, width=200))
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["sharing/length 8/speedup"]["n"] == 2
    assert metrics["sharing/length 8/shared_tokens_per_second"]["value"] > 0
    assert "prompts of 8 tokens" in screen.getvalue()


def test_sampling_refuses_half_of_a_pair(tmp_path):
    with pytest.raises(InputError, match="go together"):
        sampling.main(sampling.Config(model=tmp_path, output=tmp_path))


def test_scoring(tmp_path):
    config = scoring.Config(
        output=tmp_path, vocabularies=(4096,), batch=2, samples=1, length=128, width=8,
        chunks=(16,), turns=0,
    )  # fmt: skip
    path = scoring.main(config, console=Console(file=io.StringIO()))
    metrics = json.loads(path.read_text())["metrics"]
    chunked, whole, logits = (
        metrics[f"memory/4096 {name}/mebibytes"]["value"]
        for name in ("chunks of 16", "whole", "logits")
    )
    assert chunked < logits < whole
