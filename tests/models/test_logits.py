"""Warps and draws against sorting and brute force in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_klrlhf.models import logits as laws
from jax_klrlhf.models.logits import Warp
from tests.models import toy

V = 12
ROWS = 4

warp = jax.jit(laws.warp)
draw = jax.jit(laws.draw)


def brute_warp(row, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """One row by sorting it, in float64; ties at a threshold are kept."""
    row = np.asarray(row, np.float64) / temperature
    if top_k is not None and top_k < len(row):
        row = np.where(row >= np.sort(row)[-top_k], row, -np.inf)
    if top_p is not None:
        order = np.argsort(-row)
        mass = np.cumsum(np.exp(toy.log_softmax(row))[order])
        last = order[min(np.searchsorted(mass, top_p), len(row) - 1)]
        row = np.where(row >= row[last], row, -np.inf)
    if min_p is not None:
        law = np.exp(toy.log_softmax(row))
        row = np.where(law >= min_p * law.max(), row, -np.inf)
    return row


# A coarse grid of logits: many ties, negative zero beside zero, far-apart scales.
grid = st.sampled_from([-30.0, -2.5, -1.0, -0.0, 0.0, 0.5, 1.0, 1.25, 3.0, 40.0])


@given(
    rows=st.lists(st.lists(grid, min_size=V, max_size=V), min_size=ROWS, max_size=ROWS),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([1, 2, 5, V, 100]),
    top_p=st.sampled_from([0.0, 0.23, 0.61, 0.97]),
    min_p=st.sampled_from([0.0, 0.013, 0.31, 1.0]),
)
def test_warps_keep_what_a_sort_keeps(rows, temperature, top_k, top_p, min_p):
    by = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    ours = np.asarray(warp(jnp.array(rows), Warp(**by)))
    expected = np.stack([brute_warp(row, **by) for row in rows])
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_no_warp_is_the_identity():
    rows = jax.random.normal(jax.random.key(0), (ROWS, V))
    np.testing.assert_array_equal(warp(rows, Warp()), rows)


@pytest.mark.parametrize("vocab", [1, 5, 12, 997, 2048])
def test_draw_inverts_the_cumulative_law(vocab):
    """Two levels against one: the block that holds the mass, then the entry within it."""
    rng = np.random.default_rng(vocab)
    row = rng.normal(size=vocab).astype(np.float32) * 3
    row[rng.random(vocab) < 0.3] = -np.inf
    row[0] = 0.0
    u = rng.random((500, 2)).astype(np.float32)
    tokens, normalizer = draw(jnp.asarray(u), jnp.broadcast_to(row, (500, vocab)))
    law = np.exp(toy.log_softmax(row.astype(np.float64)))
    width = laws._block_width(vocab)
    blocks = -(-vocab // width)
    table = np.pad(law, (0, blocks * width - vocab)).reshape(blocks, width)
    cumulative = np.cumsum(table.sum(1))
    block = np.searchsorted(cumulative, u[:, 0] * cumulative[-1], side="right")
    within = np.cumsum(table, 1)[block]
    entry = [np.searchsorted(c, x * c[-1], side="right") for c, x in zip(within, u[:, 1], strict=1)]
    expected = block * width + np.array(entry)
    # float32 may fall on the other side of a boundary that a uniform number all but hits.
    assert (np.asarray(tokens) == expected).mean() > 0.99
    assert (law[np.asarray(tokens)] > 0).all()
    np.testing.assert_allclose(normalizer, np.log(np.exp(row.astype(np.float64)).sum()), rtol=1e-5)


@pytest.mark.parametrize("position", [0, 3, V - 1])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-23])
def test_extreme_uniforms_draw_the_only_possible_token(position, u):
    row = np.full(V, -np.inf, np.float32)
    row[position] = -40.0
    token, normalizer = draw(jnp.full((1, 2), u), jnp.asarray(row)[None])
    assert (int(token[0]), float(normalizer[0])) == (position, -40.0)


def test_argmax_takes_the_first_of_equals():
    rows = jnp.array([[0.0, 2.0, 2.0], [-jnp.inf, -1.0, -3.0], [1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(laws.argmax(rows), np.argmax(rows, -1))
