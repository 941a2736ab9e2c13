"""The step on streams without padding is the padded one, whatever the cut and the mesh."""

import functools
from functools import partial

import jax
import numpy as np
import optax
import pytest

from jax_klrlhf import placement
from jax_klrlhf.core import objectives
from jax_klrlhf.data import batch as padded
from jax_klrlhf.data import packing
from jax_klrlhf.data.rows import Row
from jax_klrlhf.models import ModelConfig, language_model, partition
from jax_klrlhf.models.batch import Batch, PackedBatch
from jax_klrlhf.training import health, reference, state, step, tasks
from jax_klrlhf.training import mesh as meshes

V, STREAMS = 12, 4
MODEL = language_model(
    ModelConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=4,
        max_length=32,
        init_scale=0.3,
    )
)
OPTIMIZER = optax.adam(1e-2, eps=1e-3)
LOSS = functools.partial(objectives.sigmoid, kl_coef=0.3)


def batches():
    """The same examples packed and padded, with weights, soft labels and an absent example."""
    rng = np.random.default_rng(0)
    rows = [
        Row(
            rng.integers(0, V, rng.integers(1, 9)).tolist(),
            [rng.integers(0, V, rng.integers(1, 7)).tolist() for _ in range(2)],
            [1.0, 0.0],
            label=float(rng.choice([1.0, 0.8])),
            weight=float(rng.uniform(0.5, 2.0)),
            number=number,
        )
        for number in range(22)
    ]
    fetch, lengths = padded.from_rows(rows)
    layouts = packing.fit(
        lengths, streams=STREAMS, batch_size=24, max_shapes=1, rectangles=2, multiple=2
    )
    loader = packing.PackedLoader(fetch, lengths, layouts=layouts, seed=0)
    assert loader.steps_per_epoch == 1
    given = loader[0]
    assert (given.weight == 0).any()
    table = -rng.uniform(5.0, 15.0, (len(rows), 2)).astype(np.float32)
    streams = PackedBatch(given.packed, given.weight, given.label, table[given.row], given.scores)
    plain = Batch(streams.prompts, streams.responses, given.weight, given.label, table[given.row])
    return streams, plain


PACKED, PADDED = batches()


def assert_close(actual, expected, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), actual, expected)


@pytest.fixture(scope="module")
def once():
    """State and report after one padded step."""
    return _step(PADDED)


def _step(batch, mesh=None, **options):
    params = MODEL.init(jax.random.key(0))
    if mesh is None:
        carried = state.init(jax.random.key(1), params, OPTIMIZER)
    else:
        carried, options["shardings"] = meshes.init(
            jax.random.key(1), params, OPTIMIZER, shardings=partition.shardings(params, mesh)
        )
    made = step.make_train_step(MODEL, OPTIMIZER, LOSS, reference=reference.cached, **options)
    moved, info = made(carried, placement.put(batch, mesh))
    return moved.params, jax.device_get(info)


def assert_same(found, once):
    (params, info), (expected, told) = found, once
    np.testing.assert_allclose(info.loss, told.loss, rtol=1e-5)
    np.testing.assert_allclose(info.grad_norm, told.grad_norm, rtol=1e-4)
    assert_close(info.report, told.report, rtol=1e-4, atol=1e-5)
    assert_close(params, expected, atol=1e-5)
    assert info.tokens == told.tokens
    assert info.slots == PACKED.packed.stream.size < told.slots


@pytest.mark.slow
def test_a_packed_step_is_the_padded_one(once):
    assert_same(_step(PACKED), once)


@pytest.mark.slow
def test_accumulated_on_a_mesh_too(once):
    """Two micro-batches, each cut over two parts of the mesh: one stream at a time on each."""
    assert_same(_step(PACKED, meshes.make(data=1, fsdp=2, tensor=4), micro_batches=2), once)


def test_streams_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="a batch of 4 streams does not divide into 3"):
        _step(PACKED, micro_batches=3)


def test_maximum_likelihood_packed_and_padded():
    task = tasks.likelihood(MODEL)
    params = MODEL.init(jax.random.key(0))

    @jax.jit
    def both(params, batches):
        return [step.per_row(task, params, None, batch)[:2] for batch in batches]

    ours, theirs = both(params, (PACKED, PADDED))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_health_looks_at_streams():
    """It sees the rows of a padded batch: no response ends with a token that there is not."""
    for batch in (PACKED, PADDED):
        (finding,) = health.check_batch(batch, begin=None, end=V)
        assert finding.name == "no_end_token"
        assert finding.message.startswith("none of 44 responses")
