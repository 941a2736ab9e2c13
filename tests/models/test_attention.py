"""All implementations of attention against the definition, written out in NumPy in float64."""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jax_klrlhf.models import attention
from jax_klrlhf.models.attention import EVERYTHING, Keys, Prompt

B, K, T, P, H, N, D = 2, 3, 70, 9, 4, 2, 8
LENGTHS = (9, 4)
SCALE = 0.4


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    return (
        draw(B, K, T, H, D),
        (draw(B, K, N, T, D), draw(B, K, N, T, D)),
        (draw(B, N, P, D), draw(B, N, P, D)),
    )


def by_definition(query, own, prompt, *, window, softcap):
    """One query at a time: the list of positions it sees, one softmax over their scores."""
    out = np.zeros_like(query)
    for b, k, t, h in np.ndindex(query.shape[:-1]):
        n, keys, values, places = h // (H // N), [], [], []
        length = 0 if prompt is None else LENGTHS[b]
        for p in range(length):
            keys.append(prompt[0][b, n, p])
            values.append(prompt[1][b, n, p])
            places.append(p)
        for j in range(t + 1):
            keys.append(own[0][b, k, n, j])
            values.append(own[1][b, k, n, j])
            places.append(length + j)
        near = [i for i, place in enumerate(places) if length + t - place < window]
        scores = np.array([keys[i] @ query[b, k, t, h] for i in near]) * SCALE
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weight = np.exp(scores - scores.max())
        out[b, k, t, h] = weight @ np.array([values[i] for i in near]) / weight.sum()
    return out


def call(implementation, query, own, prompt, window, **settings):
    settings = {"windows": (None, 7), "scale": SCALE} | settings
    return implementation(
        query,
        Keys(*own),
        None if prompt is None else Prompt(Keys(*prompt), jnp.asarray(LENGTHS, jnp.int32)),
        window=window,
        **settings,
    )


IMPLEMENTATIONS = {
    "xla": attention.xla,
    "splash": functools.partial(attention.splash, interpret=True),
    "cudnn": functools.partial(attention.cudnn, implementation="xla"),
}
WINDOWS = (EVERYTHING, 7)


@pytest.mark.parametrize(("name", "softcap"), [("xla", None), ("xla", 0.7), ("splash", 0.7)])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "after a prompt"])
def test_equals_the_definition(name, softcap, alone):
    query, own, prompt = arrays()
    prompt = None if alone else prompt
    run = jax.jit(lambda *args: call(IMPLEMENTATIONS[name], *args, softcap=softcap))
    for window in WINDOWS:
        found = run(*narrow((query, own, prompt)), jnp.int32(window))
        expected = by_definition(query, own, prompt, window=window, softcap=softcap)
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "after a prompt"])
def test_implementations_agree_with_gradients(name, alone):
    query, own, prompt = narrow(arrays())
    prompt = None if alone else prompt
    probe = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)

    def loss(implementation, args, window):
        out = call(implementation, *args, window)
        return (out * probe).sum(), out

    def run(implementation):
        return jax.jit(jax.value_and_grad(functools.partial(loss, implementation), has_aux=True))

    ours, theirs = run(attention.xla), run(IMPLEMENTATIONS[name])
    for window in WINDOWS:
        args = (query, own, prompt), jnp.int32(window)
        (_, expected), expected_grads = ours(*args)
        (_, found), grads = theirs(*args)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_one_step_equals_the_row_of_the_whole():
    query, own, prompt = narrow(arrays())
    window = jnp.int32(7)
    whole = jax.jit(functools.partial(call, attention.xla))(query, own, prompt, window)
    asked = Prompt(Keys(*prompt), jnp.asarray(LENGTHS, jnp.int32))

    @jax.jit
    def step(index):
        # What lies in the cache beyond the step is whatever an earlier use left there.
        later = (jnp.arange(T) > index)[None, None, None, :, None]
        cache = jax.tree.map(lambda x: jnp.where(later, 1e4, x).swapaxes(1, 2), Keys(*own))
        row = jnp.take(query, index, axis=2)
        return attention.step(row, cache, asked, index, scale=SCALE, window=window)

    for index in (0, 5, T - 1):
        np.testing.assert_allclose(step(jnp.int32(index)), whole[:, :, index], atol=1e-5)


def test_padding_of_a_prompt_is_never_seen():
    query, own, prompt = narrow(arrays())
    spoiled = jax.tree.map(lambda x: x.at[1, :, LENGTHS[1] :].set(1e4), prompt)
    for name in ("xla", "cudnn"):
        run = jax.jit(functools.partial(call, IMPLEMENTATIONS[name]))
        clean = run(query, own, prompt, jnp.int32(7))
        np.testing.assert_array_equal(clean, run(query, own, spoiled, jnp.int32(7)))


def test_lazy_mask_is_the_mask():
    samples, rows, columns = 2, 5, 4
    for window in (None, 3):
        mask = attention.SharedPromptMask(samples, rows, columns, window)
        expected = np.zeros(mask.shape, bool)
        for (k, i), (j, t) in itertools.product(
            np.ndindex(samples, rows), np.ndindex(samples, rows)
        ):
            far = window is not None and i - t >= window
            expected[k * rows + i, columns + j * rows + t] = j == k and t <= i and not far
        for (k, i), p in itertools.product(np.ndindex(samples, rows), range(columns)):
            far = window is not None and columns + i - p >= window
            expected[k * rows + i, p] = not far
        np.testing.assert_array_equal(mask[:, :], expected)
        np.testing.assert_array_equal(mask[2:7, 3:9], expected[2:7, 3:9])


def test_cudnn_refuses_a_soft_cap():
    query, own, prompt = narrow(arrays())
    with pytest.raises(ValueError, match=r"use attention\.xla"):
        call(attention.cudnn, query, own, prompt, jnp.int32(7), softcap=1.0)


@pytest.fixture(scope="module")
def tpu_mesh():
    """Four chips of a v5e that are not there, as libtpu describes them to its compiler."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu (the `tpu` extra)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # No metadata server to ask.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # No chip to hold exclusively.
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    devices = np.array(topology.devices).reshape(2, 2)
    return jax.sharding.Mesh(devices, ("fsdp", "tensor"))


@pytest.mark.parametrize("window", [(None,), (None, 256)], ids=["global", "alternating"])
def test_the_tpu_kernel_compiles_for_v5e(tpu_mesh, window):
    """Forward and backward, bfloat16, on sharded prompts and heads, by the real TPU compiler."""

    def loss(query, own, prompt, which):
        out = attention.splash(
            query, own, prompt, scale=0.1, window=which, windows=window, softcap=None
        )
        return out.astype(jnp.float32).sum()

    def shape(*dims, spec=(), dtype=jnp.bfloat16):
        sharding = NamedSharding(tpu_mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    b, k, t, p, h, n, d = 4, 2, 300, 500, 8, 2, 64
    heads = ("fsdp", None, "tensor")
    args = (
        shape(b, k, t, h, d, spec=("fsdp",)),
        Keys(*[shape(b, k, n, t, d, spec=heads)] * 2),
        Prompt(
            Keys(*[shape(b, n, p, d, spec=("fsdp", "tensor"))] * 2),
            shape(b, spec=("fsdp",), dtype=jnp.int32),
        ),
        shape(dtype=jnp.int32),
    )
    with jax.set_mesh(tpu_mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
    assert "tpu_custom_call" in compiled.as_text()


def narrow(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
