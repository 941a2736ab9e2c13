"""The kernel of a decoding step against the plain form, and its program by the TPU compiler."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.models import attention, in_place
from jax_klrlhf.models.attention import EVERYTHING, Keys, Prompt

L, B, N, K, C, P, R, D = 3, 4, 2, 3, 300, 40, 2, 8
SETTINGS = {"scale": 0.4, "softcap": 3.0}


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    own = Keys(draw(rng, L, B, N, K, C, D), draw(rng, L, B, N, K, C, D))
    prompts = Keys(draw(rng, L, B, N, P, D), draw(rng, L, B, N, P, D))
    lengths = jnp.asarray([P, 3, 1, 17], jnp.int32)
    return draw(rng, B, K, N * R, D), own, prompts, lengths


@pytest.mark.parametrize("kv", [pytest.param("float", marks=pytest.mark.slow), "int8"])
def test_equals_the_plain_form(kv, arrays, monkeypatch):
    """Any layer, step and window; blocks of 128 positions, of which the last is not whole; what
    lies in the cache beyond the step is whatever an earlier use left there."""
    monkeypatch.setattr(in_place, "BLOCK", 1)
    query, own, prompts, lengths = arrays
    if kv == "int8":
        own, prompts = attention.eight(own), attention.eight(prompts)

    @jax.jit
    def both(index, layer, window):
        found = in_place.step(
            query, own, Prompt(prompts, lengths), index, layer, window=window, interpret=True,
            **SETTINGS,
        )  # fmt: skip
        mine, theirs = jax.tree.map(lambda x: x[layer], (own, prompts))
        expected = attention.step(
            query, mine, Prompt(theirs, lengths), index, window=window, **SETTINGS
        )
        return found, expected

    for index, layer, window in [
        (0, 0, EVERYTHING), (5, 2, 4), (127, 1, EVERYTHING), (128, 1, 20), (299, 2, EVERYTHING),
        (299, 0, 150), ([0, 127, 299, 128], 1, 60),
    ]:  # fmt: skip
        index = jnp.asarray(index, jnp.int32)  # of all rows, or of each
        found, expected = both(index, jnp.int32(layer), jnp.int32(window))
        np.testing.assert_allclose(found, expected, atol=3e-6)


def test_only_blocks_that_are_seen_count(arrays, monkeypatch):
    """Numbers that are none, in every block that no row sees."""
    monkeypatch.setattr(in_place, "BLOCK", 1)
    query, own, _, _ = arrays
    rows = query.reshape(B, K, N, R, D).swapaxes(1, 2)
    low, high = jnp.full(B, 130, jnp.int32), jnp.full(B, 250, jnp.int32)
    run = jax.jit(partial(in_place.attend, rows, layer=jnp.int32(1), interpret=True))
    unseen = (jnp.arange(C) // 128 != 1)[None, None, None, None, :, None]
    spoiled = jax.tree.map(lambda x: jnp.where(unseen, jnp.nan, x).at[0].set(jnp.nan), own)
    seen = run(keys=own, low=low, high=high)
    jax.tree.map(np.testing.assert_array_equal, seen, run(keys=spoiled, low=low, high=high))
    nothing = run(keys=own, low=high, high=low)
    assert not np.any(nothing.out)
    assert (nothing.log_total == jnp.finfo(jnp.float32).min).all()


@pytest.mark.slow
def test_on_a_mesh_each_device_has_its_rows_and_heads(arrays):
    query, own, prompts, lengths = arrays
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    run = partial(in_place.step, window=jnp.int32(50), interpret=True, **SETTINGS)
    arguments = query, own, Prompt(prompts, lengths), jnp.int32(200), jnp.int32(1)
    alone = jax.jit(run)(*arguments)
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*arguments).compile()
        found, text = compiled(*arguments), compiled.as_text() or ""
    np.testing.assert_allclose(found, alone, atol=1e-6)
    # A head and a row of two on each.
    assert re.search(r"f32\[3,1,1,3,300,8\]", text)
