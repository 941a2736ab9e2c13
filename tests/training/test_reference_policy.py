"""What pi0's log-probabilities are of: its parameters, the step's type, the right responses."""

from pathlib import Path
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import scoring
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.programs import batches, train
from jax_klrlhf.programs import run as runs
from jax_klrlhf.training import reference
from jax_klrlhf.training.rounds import Policies, improve
from jax_klrlhf.training.rounds.fitting import deal
from jax_klrlhf.training.rounds.parts import Mixture, Situation, ragged
from jax_klrlhf.training.state import cast_floating
from tests.training import rounds_world as world
from tests.training import toy


def test_a_rounds_reference_is_the_situations_not_the_policy_that_answered():
    moved = jax.tree.map(lambda x: x * 1.5, world.PARAMS)
    rng = np.random.default_rng(0)
    responses = ragged(rng.integers(1, 5, (6, 2, 3)), np.full((6, 2), 3))
    rows = Batch(world.PROMPTS, responses, weight=np.ones(6, np.float32))  # pyright: ignore[reportArgumentType]
    situation = Situation(
        policies=Policies(current=moved, base=moved, reference=world.PARAMS, earlier=(moved,)),
        start=moved, data=Mixture([], None), prompts=world.PROMPTS, score=lambda p, r: None,
        folder=None,
    )  # fmt: skip
    found = improve.reference_log_prob(world.MODEL, world.FITTING, rows=4)(situation, deal([rows]))
    ours, theirs = (
        scoring.log_prob(world.MODEL, params, world.PROMPTS, responses)
        for params in (world.PARAMS, moved)
    )
    np.testing.assert_allclose(found, ours, rtol=1e-5)
    assert np.abs(np.asarray(ours - theirs)).min() > 1e-3


def test_the_pair_of_several_responses_is_the_best_and_the_worst():
    lengths = np.array([[3, 2, 1, 0], [2, 0, 0, 0], [1, 1, 1, 1], [4, 4, 0, 0], [0, 0, 0, 0]])
    assert batches.best_and_worst(lengths).tolist() == [[0, 2], [0, 0], [0, 3], [0, 1], [0, 0]]


def test_a_table_is_computed_in_the_steps_type():
    """Where the policy has not moved the ratio is 1 to the bit, whatever type the step is in."""
    model = toy.language_model()
    params, batch = model.init(jax.random.key(0)), toy.batch(0)
    visited = MagicMock(prompts=batch.prompts, responses=batch.responses, row=np.arange(16))
    tables = {}
    for dtype in (None, jnp.bfloat16):
        tables[dtype] = reference.tabulate(
            model, params, [visited], rows=16, responses=2, compute_dtype=dtype
        )
        score = jax.jit(lambda p, dtype=dtype: scoring.log_prob(
            model, cast_floating(p, dtype), batch.prompts, batch.responses
        ))  # fmt: skip
        np.testing.assert_array_equal(tables[dtype], score(params))
    assert np.abs(tables[None] - tables[jnp.bfloat16]).max() > 1e-3


def test_a_cache_of_another_type_is_refused(tmp_path, monkeypatch):
    data = MagicMock(spec=Prepared)
    data.__len__.return_value = 3
    recipe = {"tokenizer": "t", "max_prompt_length": 8, "max_response_length": 8}
    data.configure_mock(split="train", manifest={"recipe": recipe}, fingerprint="d", responses=2)
    for module, name in ((batches, "loader"), (batches, "whole_epoch"), (runs, "chunk")):
        monkeypatch.setattr(module, name, lambda *given, **settings: 1)
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    monkeypatch.setattr(reference, "tabulate", lambda *given, **settings: table)

    def ask(dtype):
        config = MagicMock(dtype=dtype, reference_cache=Path(tmp_path / "table.safetensors"))
        run = runs.Run(config, "dpo", tmp_path, None, Console(quiet=True))
        return train._reference_table(run, None, None, data, "f" * 64)

    ask("bfloat16")
    monkeypatch.setattr(reference, "tabulate", lambda *given, **settings: pytest.fail("again"))
    np.testing.assert_array_equal(ask("bfloat16"), table)
    with pytest.raises(InputError, match="another model"):
        ask("float32")
