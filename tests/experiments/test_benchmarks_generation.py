"""The sampling and scoring benchmarks run, at toy size, and leave their numbers behind."""

import io
import json

import pytest
from rich.console import Console

from experiments.benchmarks import continuous, paired, sampling, scoring
from jax_klrlhf.errors import InputError


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(paired, "PAUSE", 0.0)


@pytest.mark.slow
def test_sampling(tmp_path):
    config = sampling.Config(
        output=tmp_path, samples=2, sharing_turns=2, lengths=(8,), sharing_batch=2,
        sharing_new_tokens=2, width=16, layers=1,
    )  # fmt: skip
    screen = io.StringIO()
    path = sampling.main(config, console=Console(file=screen, width=200))
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["sharing/length 8/speedup"]["n"] == 2
    assert metrics["sharing/length 8/shared_tokens_per_second"]["value"] > 0
    # Keys and values in float32, 4 heads of 2: 2 prompts of 8 tokens, and 2 tokens of 4 samples.
    kept = {name: metrics[f"sharing/length 8/{name}_cache_mebibytes"]["value"] * 2**20
            for name in ("shared", "repeated")}  # fmt: skip
    token = 2 * 4 * 4 * 2
    assert kept == {"shared": (2 * 8 + 4 * 2) * token, "repeated": (4 * 8 + 4 * 2) * token}
    assert "| prompts of 8 tokens |" in screen.getvalue()
    assert screen.getvalue().count("shared: ") == 3  # A turn to warm up and two that count.


@pytest.mark.parity
def test_against_transformers(stories_model, data_dir, tmp_path):
    """One device and eight, the same prompts as transformers, at toy size."""
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    threads = torch.get_num_threads()
    config = sampling.Config(
        model=stories_model, prompts=data_dir / "stories" / "train.txt", output=tmp_path, batch=8,
        samples=2, new_tokens=3, turns=2, sweep_turns=1, hf_batches=(8, 16), hf_threads=1,
        lengths=(),
    )  # fmt: skip
    screen = io.StringIO()
    path = sampling.main(config, console=Console(file=screen, width=200))
    torch.set_num_threads(threads)
    metrics = json.loads(path.read_text())["metrics"]
    for name in ("ours", "ours, 8 devices"):
        assert metrics[f"transformers/{name}/speedup_over_best"]["n"] == 2
        assert f"| {name} |" in screen.getvalue()
    for size in (8, 16):
        assert (
            metrics[f"transformers/transformers, {size} at a time/tokens_per_second"]["value"] > 0
        )


def test_sampling_refuses_half_of_a_pair(tmp_path):
    with pytest.raises(InputError, match="go together"):
        sampling.main(sampling.Config(model=tmp_path, output=tmp_path))


@pytest.mark.slow
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


@pytest.mark.slow
def test_continuous(stories_model, data_dir, tmp_path):
    config = continuous.Config(
        model=stories_model, prompts=data_dir / "stories" / "train.txt", output=tmp_path,
        waiting=8, slots=4, samples=2, new_tokens=(24,), turns=2,
    )  # fmt: skip
    screen = io.StringIO()
    path = continuous.main(config, console=Console(file=screen, width=200))
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["24/same"]["value"] == 1
    assert 0 < metrics["24/used_by_batches"]["value"] <= 1
    assert metrics["24/speedup"]["n"] == 2
    assert "| at most 24 tokens |" in screen.getvalue()
    with pytest.raises(InputError, match="multiple of --slots"):
        continuous.main(continuous.Config(**{**vars(config), "waiting": 6}))
