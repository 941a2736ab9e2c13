"""The DPO benchmark at a toy size: what it checks before it reports, and what it leaves behind."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.benchmarks import dpo, paired
from experiments.benchmarks.dpo_parts import report, stage
from experiments.benchmarks.dpo_peers import with_ours
from jax_klrlhf import models
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import scoring

QUIET = Console(quiet=True)


def _data(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    words = ["tea", "rain", "moon", "salt", "door", "blue", "seven", "quiet"]

    def text(count: int) -> str:
        return " ".join(rng.choice(words, count))

    rows = [
        {"prompt": text(int(rng.integers(1, 8))), "chosen": f"yes {text(3)}", "rejected": text(5)}
        for _ in range(24)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(folder: Path, **settings) -> dpo.Config:
    return dpo.Config(
        data=_data(folder),
        output=folder / "out",
        **{
            "parts": ("cached",),
            "settings": ("default",),
            "batches": 1,
            "turns": 2,
            "check_steps": 2,
            "max_prompt_length": 16,
            "max_response_length": 16,
            "batch_size": 4,
            "token_budget": 192,
            "max_shapes": 1,
            "vocab_size": 300,
            "hidden_size": 8,
            "intermediate_size": 16,
            "layers": 1,
            "heads": 2,
            "learning_rate": 3e-2,
            **settings,
        },
    )


@pytest.mark.slow
def test_ours_alone_says_how_to_add_the_peers_and_counts_useful_tokens(tmp_path):
    console = Console(record=True, width=200, quiet=False, file=open(tmp_path / "log", "w"))  # noqa: SIM115
    with console.file:
        path = dpo.main(_config(tmp_path), console=console)
    text = console.export_text()
    assert "pip install 'trl==1.16.*'" in text
    assert "google-tunix==0.1.7" in text
    found = json.loads(path.read_text())["metrics"]
    speed = found["cached default/ours/tokens_per_second"]
    assert speed["n"] == 2
    assert speed["value"] > 0
    slots = found["cached default/ours/slots_per_token"]["value"]
    job = json.loads((tmp_path / "out/work/cached-default/0/job.json").read_text())
    used = sum(len(ids) for pair in job["pairs"] for ids in pair)
    assert found["data/pairs/useful_tokens"]["value"] == used
    ((_, tokens, _), held), = job["batches"]  # fmt: skip
    assert slots == pytest.approx(tokens / used)
    assert used <= tokens
    assert sorted(held) == list(range(len(job["pairs"])))
    # Equal weights for policy and reference: the loss begins at ln 2, and the check insists on it.
    assert found["agreement/ours/first_loss"]["value"] == pytest.approx(np.log(2), abs=1e-5)


def test_another_loss_is_not_reported():
    ours = np.linspace(np.log(2), 0.6, 20)
    found = report.agreement({"ours": ours.tolist(), "TRL": (ours + 9e-4).tolist()})
    assert found["agreement/TRL/largest_difference"].value == pytest.approx(9e-4)
    far = ours.copy()
    far[13] += 1.1e-3
    with pytest.raises(InputError, match="TRL computes another loss"):
        report.agreement({"ours": ours.tolist(), "TRL": far.tolist()})
    with pytest.raises(InputError, match="TRL computes another loss"):
        report.agreement({"ours": ours.tolist(), "TRL": [np.nan] * 20})
    with pytest.raises(InputError, match="TRL computes another loss"):
        report.agreement({"ours": ours.tolist(), "TRL": ours[:-1].tolist()})
    with pytest.raises(InputError, match="not ln 2"):
        report.agreement({"ours": (ours + 0.01).tolist()})
    with pytest.raises(InputError, match="would say nothing"):
        report.agreement({"ours": [np.log(2)] * 20})


def test_a_contender_that_fails_is_named_with_its_last_words(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho loading >&2\necho no such wheel >&2\nexit 1\n")
    broken.chmod(0o755)
    process = stage.Process("TRL", broken, {"module": "with_trl"}, tmp_path, {})
    with pytest.raises(InputError, match=r"TRL failed: no such wheel \(log: .*log.txt\)"):
        process.ask()
    process.end()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": ("fast",)}, "choose from default, retain, hugepages"),
        ({"heads": 3}, "no multiple of 3 heads"),
        ({"tunix_python": Path("absent")}, "no interpreter there"),
        ({"turns": 0}, "at least one of each"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_prepared(tmp_path, change, message):
    config = dataclasses.replace(_config(tmp_path), **change)
    with pytest.raises(InputError, match=message):
        dpo.main(config, console=QUIET)
    assert not (tmp_path / "out").exists()


def test_each_tool_is_set_against_ours_under_the_setting_that_suits_it_best():
    turns = lambda *seconds: paired.Times(0.0, np.array(seconds))  # noqa: E731
    found = {
        "cached": {
            "default": {"ours": turns(2.0, 2.0), "TRL": turns(8.0, 8.0), "saving": turns(9.0, 9.0)},
            # What trades speed for memory takes part once.
            "retain": {"ours": turns(4.0, 4.0), "TRL": turns(5.0, 5.0)},
        }
    }
    metrics = report.at_best(found, 100, QUIET)
    assert metrics["best cached/ours/tokens_per_second"].value == 50
    assert metrics["best cached/TRL/tokens_per_second"].value == 20
    assert metrics["best cached/TRL/ours_is_faster"].value == pytest.approx(2.5)
    assert metrics["best cached/saving/ours_is_faster"].value == pytest.approx(4.5)


def test_parts_switched_off_compute_the_same():
    """Prompts copied, and whole rows with all logits at once: the same log-probabilities."""
    model = models.language_model(
        models.ModelConfig(
            vocab_size=23, hidden_size=8, intermediate_size=12, layers=1, heads=2, kv_heads=2,
            head_dim=4, max_length=16,
        )
    )  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = Ragged(jnp.asarray(rng.integers(0, 23, (3, 5))), jnp.asarray([5, 1, 3]))
    responses = Ragged(
        jnp.asarray(rng.integers(0, 23, (3, 2, 4))), jnp.asarray([[4, 1], [2, 4], [1, 3]])
    )

    @jax.jit
    def all_three(params):
        return [
            score(model, params, prompts, responses)
            for score in (scoring.log_prob, with_ours.unshared, with_ours.everywhere)
        ]

    ours, copied, whole = all_three(params)
    np.testing.assert_allclose(copied, ours, rtol=1e-5)
    np.testing.assert_allclose(whole, ours, rtol=1e-5)
