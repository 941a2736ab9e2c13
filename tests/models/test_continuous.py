"""Continuous batching: the responses are those that the batch sampler draws with the same keys."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import continuous, sampling
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.logits import Warp
from jax_klrlhf.models.transformer import language_model
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import rounds
from tests.models import tiny

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=16, intermediate_size=24, layers=2, heads=4, kv_heads=2, head_dim=4,
    max_length=40,
)  # fmt: skip
STOP, PAD = 0, 7
RNG = np.random.default_rng(0)
COUNT = 24
PROMPTS = jax.tree.map(
    jnp.asarray,
    Ragged(
        RNG.integers(1, 8, (COUNT, 6)).astype(np.int32), RNG.integers(1, 7, COUNT).astype(np.int32)
    ),
)
KEYS = jax.random.split(jax.random.key(2), COUNT)
SIZE = {"samples": 3, "max_new_tokens": 17, "stop": (STOP,), "pad_id": PAD}


def model_of(**options):
    return language_model(dataclasses.replace(CONFIG, **options))


def drawn(model, params, *, function=continuous.sample, by=None, **options):
    run = jax.jit(
        lambda keys, params, prompts: function(
            keys, model, params, prompts, by or Warp(), **{**SIZE, **options}
        )
    )
    return run(KEYS, params, PROMPTS)


def assert_same(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(ours.dtype, jnp.floating):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def params():
    return tiny.params(CONFIG)


@pytest.mark.parametrize(
    ("slots", "options"),
    [
        (8, {"admit": 3}),
        pytest.param(5, {"admit": 1}, marks=pytest.mark.slow),
        pytest.param(8, {"admit": 8}, marks=pytest.mark.slow),
        pytest.param(24, {}, marks=pytest.mark.slow),
        pytest.param(100, {}, marks=pytest.mark.slow),
        (6, {"by": Warp(temperature=0.7, top_k=4)}),
        pytest.param(6, {"greedy": True, "samples": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_responses_are_those_of_the_batch_sampler(params, slots, options):
    model = model_of()
    expected = drawn(
        model, params, function=sampling.sample,
        **{k: v for k, v in options.items() if k != "admit"},
    )  # fmt: skip
    lengths = np.asarray(expected.responses.lengths)
    # It is about lengths that differ: some end at once, some are cut.
    if "greedy" not in options:
        assert lengths.min() <= 2
        assert (lengths == 17).any()
    assert_same(drawn(model, params, slots=slots, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"platform": "tpu"},  # one stack of caches, scanned
        pytest.param({"kv": "int8"}, marks=pytest.mark.slow),
        pytest.param({"windows": (3, None)}, marks=pytest.mark.slow),
        pytest.param({"learned_positions": True, "ropes": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_cache_keeps_its_rows_apart(options, monkeypatch):
    """Slots at different tokens, in each way that a cache is laid out and looked at."""
    monkeypatch.setattr("jax_klrlhf.models.in_place.fits", lambda *_: False)
    model = model_of(**options)
    params = tiny.params(dataclasses.replace(CONFIG, **options))
    expected = drawn(model, params, function=sampling.sample)
    assert_same(drawn(model, params, slots=6, admit=2), expected)


def test_fewer_steps_are_taken_than_by_batches(params):
    """Counted: as many tokens for all, in no more slots at one time."""
    model = model_of()
    counted = []

    def decode(*arguments):
        jax.debug.callback(lambda: counted.append(0))
        return model.decode(*arguments)

    watched = dataclasses.replace(model, decode=decode)
    found = drawn(watched, params, slots=4, admit=1, samples=1)
    jax.effects_barrier()
    steps = len(counted)
    longest = np.asarray(found.responses.lengths).reshape(-1, 4, 1).max((1, 2)) - 1
    drawn_tokens = int(found.responses.lengths.sum()) - COUNT
    # No slot idles but at the end, when no prompt is left.
    assert -(-drawn_tokens // 4) <= steps <= -(-drawn_tokens // 4) + 16
    assert steps < longest.sum()


def test_parts_have_queues_of_their_own(params):
    """Four queues over eight devices: the responses of one device that draws batch by batch."""
    draw = partial(
        rounds.Draw, model=model_of(), samples=3, max_new_tokens=17, stop=(STOP,), pad_id=PAD,
        rows=8,
    )  # fmt: skip
    expected, log_prob = draw().with_log_prob(jax.random.key(3), params, PROMPTS)
    mesh = meshes.make(data=4, fsdp=1, tensor=2)
    found, ours = draw(continuous=True, mesh=mesh).with_log_prob(jax.random.key(3), params, PROMPTS)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(ours, log_prob, rtol=1e-4, atol=1e-5)


def test_nothing_of_a_cache_travels_between_parts(params):
    """Compiled for four devices of rows: no collective is as large as a device's cache."""
    model = model_of()
    mesh = meshes.make(data=4, fsdp=1, devices=jax.devices()[:4])
    rows = jax.NamedSharding(mesh, jax.P("data"))
    laid = jax.device_put((KEYS, PROMPTS), rows)
    run = jax.jit(
        lambda keys, prompts: continuous.sample(
            keys, model, params, prompts, Warp(), slots=8, parts=4, **SIZE
        )
    )
    with jax.set_mesh(mesh):
        text = run.lower(*laid).compile().as_text()
    moved = [line for line in text.splitlines() if "all-gather(" in line or "all-to-all(" in line]
    assert moved == []


def test_refusals(params):
    with pytest.raises(ValueError, match="24 prompts and 6 slots must both be multiples of the 4"):
        drawn(model_of(), params, slots=6, parts=4)
    with pytest.raises(ValueError, match=r"admit must be in 1\.\.6"):
        drawn(model_of(), params, slots=6, admit=7)
