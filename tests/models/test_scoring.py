"""Scoring against the naive forward of every prompt-response row by itself, in float64 NumPy."""

import dataclasses
import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_klrlhf.core.diversity import Top
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.training import reference
from tests.models import toy

B, K, P, C, V = 3, 2, 5, 6, 7
MODEL = toy.language_model(vocab=V)
PARAMS = MODEL.init(jax.random.key(0))
REFERENCE = MODEL.init(jax.random.key(1))


def batch(seed, prompt_lengths, lengths) -> tuple[Ragged, Ragged]:
    """Random ids everywhere, padding included: nothing may read them there."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, V, (B, P), np.int32)
    responses = rng.integers(0, V, (B, K, C), np.int32)
    lengths = np.reshape(lengths, (B, K)).astype(np.int32)
    return (
        Ragged(jnp.asarray(prompts), jnp.asarray(np.array(prompt_lengths, np.int32))),
        Ragged(jnp.asarray(responses), jnp.asarray(lengths)),
    )


ragged = st.builds(
    batch,
    st.integers(0, 2**16),
    st.lists(st.integers(1, P), min_size=B, max_size=B),
    st.lists(st.integers(0, C), min_size=B * K, max_size=B * K),
)
FIXED = batch(0, [5, 1, 3], [6, 0, 1, 4, 2, 6])


def rows(prompts: Ragged, responses: Ragged):
    """``(b, k, prompt ids, response ids)`` of every row, without its padding."""
    for b, k in itertools.product(range(B), range(K)):
        prompt = np.asarray(prompts.ids)[b, : prompts.lengths[b]].tolist()
        yield b, k, prompt, np.asarray(responses.ids)[b, k, : responses.lengths[b, k]].tolist()


def naive_laws(params, prompt, response):
    """Log-law before each response token, ``[length, V]``."""
    logits = toy.naive_logits(params, [*prompt, *response])
    return toy.log_softmax(logits[len(prompt) - 1 : len(prompt) - 1 + len(response)])


@jax.jit
def naive_log_prob(params, row, prompt_length, length):
    """Sum over one concatenated row, differentiable: every position is projected."""

    def read(state, token):
        state = jnp.tanh(state @ params["mix"] + params["embed"][token])
        return state, state @ params["read"] + params["bias"]

    _, logits = jax.lax.scan(read, jnp.zeros(params["mix"].shape[0]), row)
    law = jax.nn.log_softmax(logits[:-1])
    at = jnp.take_along_axis(law, row[1:, None], axis=-1)[:, 0]
    position = jnp.arange(row.shape[0] - 1) - (prompt_length - 1)
    return jnp.where((position >= 0) & (position < length), at, 0).sum()


@partial(jax.jit, static_argnames="chunk")
def value(params, prompts, responses, chunk=5):
    return scoring.token_log_prob(MODEL, params, prompts, responses, chunk=chunk)


@partial(jax.jit, static_argnames="chunk")
def gradient(params, prompts, responses, weight, chunk=5):
    def total(params):
        return (weight * scoring.log_prob(MODEL, params, prompts, responses, chunk=chunk)).sum()

    return jax.grad(total)(params)


@jax.jit
def naive_gradient(params, concatenated, prompt_lengths, lengths, weight):
    def total(params):
        each = jax.vmap(partial(naive_log_prob, params))(concatenated, prompt_lengths, lengths)
        return (weight.reshape(-1) * each).sum()

    return jax.grad(total)(params)


@given(ragged)
def test_equals_the_naive_forward_of_each_row(pair):
    prompts, responses = pair
    ours = np.asarray(value(PARAMS, prompts, responses))
    expected = np.zeros((B, K, C))
    concatenated = np.zeros((B * K, P + C), np.int32)
    for b, k, prompt, response in rows(prompts, responses):
        if response:
            law = naive_laws(PARAMS, prompt, response)
            expected[b, k, : len(response)] = law[np.arange(len(response)), response]
        concatenated[b * K + k, : len(prompt) + len(response)] = [*prompt, *response]
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5)

    weight = jnp.linspace(-1.0, 2.0, B * K).reshape(B, K)
    grads = gradient(PARAMS, prompts, responses, weight)
    naive = naive_gradient(
        PARAMS,
        concatenated,
        jnp.repeat(prompts.lengths, K),
        responses.lengths.reshape(-1),
        weight,
    )
    for ours_leaf, naive_leaf in zip(*map(jax.tree.leaves, (grads, naive)), strict=True):
        np.testing.assert_allclose(ours_leaf, naive_leaf, atol=1e-4)


def test_ids_at_padding_are_never_read():
    prompts, responses = FIXED
    weight = jnp.ones((B, K))
    plain = value(PARAMS, *FIXED), gradient(PARAMS, *FIXED, weight)
    for poison in (-1, 10**9):
        responses = Ragged(jnp.where(responses.mask, responses.ids, poison), responses.lengths)
        poisoned = (
            value(PARAMS, prompts, responses),
            gradient(PARAMS, prompts, responses, weight),
        )
        jax.tree.map(np.testing.assert_array_equal, plain, poisoned)


@pytest.mark.parametrize("chunk", [1, 18, 10**6])
def test_chunks_change_nothing(chunk):
    weight = jnp.linspace(-1.0, 1.0, B * K).reshape(B, K)
    both = (
        (value(PARAMS, *FIXED, chunk=size), gradient(PARAMS, *FIXED, weight, chunk=size))
        for size in (5, chunk)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), *both)


def test_entropy_and_kl_are_the_sums_over_the_vocabulary():
    prompts, responses = FIXED
    scores = jax.jit(
        lambda params: scoring.score(
            MODEL, params, prompts, responses, reference=(MODEL, REFERENCE), top=2, chunk=5
        )
    )(PARAMS)
    zeros = [np.zeros((B, K, C)) for _ in range(6)]
    expected = scoring.TokenScores(*zeros[:4], top=Top(*zeros[4:]))
    for b, k, prompt, response in rows(prompts, responses):
        if not response:
            continue
        law, ref = (naive_laws(p, prompt, response) for p in (PARAMS, REFERENCE))
        at = np.arange(len(response))
        expected.log_prob[b, k, at] = law[at, response]
        expected.entropy[b, k, at] = -(np.exp(law) * law).sum(-1)
        expected.kl[b, k, at] = (np.exp(law) * (law - ref)).sum(-1)
        expected.ref_log_prob[b, k, at] = ref[at, response]
        likeliest = np.sort(np.exp(law), -1)[:, -2:]
        expected.top.mass[b, k, at] = mass = likeliest.sum(-1)
        share = likeliest / mass[:, None]
        expected.top.entropy[b, k, at] = -(share * np.log(share)).sum(-1)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), scores, expected)
    plain = scoring.score(MODEL, PARAMS, prompts, responses)
    assert plain.kl is plain.top is None


def test_chain_rule_of_the_divergence():
    """E over responses of the summed per-token KL is KL(policy || reference), exactly."""
    prompt = [3, 1]
    every = np.array(list(itertools.product(range(V), repeat=3)), np.int32)[None]
    prompts = Ragged(jnp.array([prompt]), jnp.array([2]))
    responses = Ragged(jnp.asarray(every), jnp.full(every.shape[:2], 3))
    scores = jax.jit(
        lambda params, reference: scoring.score(
            MODEL, params, prompts, responses, reference=(MODEL, reference)
        )
    )(PARAMS, REFERENCE)
    laws = [toy.enumerate_law(p, prompt, max_new_tokens=3, stop=()) for p in (PARAMS, REFERENCE)]
    p, q = (np.array([law[tuple(y)] for y in every[0].tolist()]) for law in laws)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-9)
    np.testing.assert_allclose(p @ scores.kl[0].sum(-1), p @ np.log(p / q), rtol=1e-5)
    np.testing.assert_allclose(p @ scores.entropy[0].sum(-1), -p @ np.log(p), rtol=1e-5)


def test_gradient_of_entropy_and_kl():
    """Against autodiff of the whole sum over an enumerated law, with the reference a constant."""
    prompts = Ragged(jnp.array([[3, 1]]), jnp.array([2]))
    responses = Ragged(jnp.arange(V, dtype=jnp.int32)[None, :, None], jnp.ones((1, V), jnp.int32))

    def ours(params, reference):
        scores = scoring.score(MODEL, params, prompts, responses, reference=(MODEL, reference))
        return scores.kl[0, 0, 0] + 2 * scores.entropy[0, 0, 0]

    def naive(params, reference):
        log_p, log_q = (
            jax.nn.log_softmax(MODEL.unembed(p, MODEL.prefill(p, prompts).hidden)[0])
            for p in (params, reference)
        )
        p = jnp.exp(log_p)
        return (p * (log_p - log_q)).sum() - 2 * (p * log_p).sum()

    grads = [jax.jit(jax.grad(f))(PARAMS, REFERENCE) for f in (ours, naive)]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), *grads)
    frozen = jax.jit(jax.grad(ours, argnums=1))(PARAMS, REFERENCE)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(frozen))


def without(params, token):
    """The toy model whose logit of one token is -inf: it never says it."""
    return params | {"bias": params["bias"].at[token].set(-jnp.inf)}


def test_a_logit_of_minus_infinity_is_as_if_the_token_were_not_there():
    """Value and gradient of entropy and KL, against float64 NumPy with the token deleted."""
    prompts, responses = FIXED
    responses = Ragged(responses.ids % (V - 1), responses.lengths)  # The last token is never said.
    policy, reference = without(PARAMS, V - 1), without(REFERENCE, V - 1)

    def score(params, reference):
        return scoring.score(
            MODEL, params, prompts, responses, reference=(MODEL, reference), chunk=5
        )

    def weighted(params, reference):
        found = score(params, reference)
        return (found.kl + 2 * found.entropy).sum(), found

    gradient, scores = jax.jit(jax.grad(weighted, has_aux=True))(policy, reference)
    entropy, kl = np.zeros((B, K, C)), np.zeros((B, K, C))
    for b, k, prompt, response in rows(prompts, responses):
        if response:
            cut = [
                {n: x[..., :-1] if n in ("read", "bias") else x for n, x in p.items()}
                for p in (policy, reference)
            ]
            law, ref = (naive_laws(p, prompt, response) for p in cut)
            entropy[b, k, : len(response)] = -(np.exp(law) * law).sum(-1)
            kl[b, k, : len(response)] = (np.exp(law) * (law - ref)).sum(-1)
    np.testing.assert_allclose(scores.entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(scores.kl, kl, atol=1e-5)
    # A model that has no such token to say has the same gradient.
    small = toy.language_model(vocab=V - 1)
    cut = [
        {n: x[..., : V - 1] if n in ("read", "bias") else x for n, x in p.items()}
        for p in (policy, reference)
    ]

    def alone(params, reference):
        found = scoring.score(
            small, params, prompts, responses, reference=(small, reference), chunk=5
        )
        return (found.kl + 2 * found.entropy).sum()

    expected = jax.jit(jax.grad(alone))(*cut)
    for name, leaf in expected.items():
        found = gradient[name]
        if name in ("read", "bias"):
            np.testing.assert_array_equal(found[..., -1], 0)
            found = found[..., :-1]
        np.testing.assert_allclose(found, leaf, atol=1e-5)
    # What pi0 never says and the policy does is infinitely far.
    far = jax.jit(score)(PARAMS, reference).kl
    np.testing.assert_array_equal(np.isposinf(far), responses.mask)


def test_no_array_of_all_logits():
    """The compiled gradient's temporaries are smaller than the logits they never hold."""
    vocab, length = 8192, 64
    model = toy.language_model(vocab=vocab, width=4)
    params = jax.eval_shape(model.init, jax.random.key(0))
    prompts = Ragged(jnp.ones((2, 2), jnp.int32), jnp.full((2,), 2))
    responses = Ragged(jnp.ones((2, 2, length), jnp.int32), jnp.full((2, 2), length))
    logits_bytes = 4 * 2 * 2 * length * vocab

    def temporaries(chunk):
        def total(params):
            return scoring.token_log_prob(model, params, prompts, responses, chunk=chunk).sum()

        compiled = jax.jit(jax.grad(total)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16) < logits_bytes / 2
    assert temporaries(10**6) > logits_bytes  # the measure does see such an array


def test_half_precision_weights_get_their_gradient_summed_in_float32():
    """A sum of 512 equal addends, one chunk each, stops growing in bfloat16 at 256 of them."""
    model = toy.language_model(vocab=2, width=1, dtype=jnp.bfloat16)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    length = 512
    prompts = Ragged(jnp.ones((1, 1), jnp.int32), jnp.ones((1,), jnp.int32))
    responses = Ragged(jnp.ones((1, 1, length), jnp.int32), jnp.full((1, 1), length))

    @jax.jit
    def bias_gradient(params):
        def total(params):
            return scoring.log_prob(model, params, prompts, responses, chunk=1).sum()

        return jax.grad(total)(params)["bias"]

    # d log p(token) / d bias[token] = 1 - 1/2 at every one of the 512 positions.
    np.testing.assert_array_equal(np.asarray(bias_gradient(params), np.float32), [-256, 256])


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    prompts = Ragged(jnp.asarray(rng.integers(0, V, (8, P), np.int32)), jnp.full((8,), P))
    responses = Ragged(
        jnp.asarray(rng.integers(0, V, (8, K, C), np.int32)), jnp.full((8, K), C - 1)
    )
    weight = jnp.ones((8, K))
    one = value(PARAMS, prompts, responses), gradient(PARAMS, prompts, responses, weight)
    spread = jax.NamedSharding(mesh, jax.P("data"))
    prompts, responses, weight = jax.device_put((prompts, responses, weight), spread)
    eight = value(PARAMS, prompts, responses), gradient(PARAMS, prompts, responses, weight)
    assert len(eight[0].sharding.device_set) == 8
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), one, eight)


def test_one_program_scores_all_batches_of_a_shape_by_all_parameters():
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def prefill(params, prompts):
        return MODEL.prefill(params, prompts)

    score = reference.make_log_prob(dataclasses.replace(MODEL, prefill=prefill))
    for seed, params in enumerate((PARAMS, REFERENCE, PARAMS)):
        given = batch(seed, [1 + seed, 2, 3], [seed, 1, 2, 3, 4, 5])
        found = score(params, Batch(*given, weight=np.ones(B, np.float32)))
        np.testing.assert_allclose(found, scoring.log_prob(MODEL, params, *given), rtol=1e-5)


def test_float64(x64):
    model = toy.language_model(vocab=V, dtype=jnp.float64)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
    scores = scoring.token_log_prob(model, params, *FIXED, chunk=5)
    for b, k, prompt, response in rows(*FIXED):
        if response:
            law = naive_laws(params, prompt, response)[np.arange(len(response)), response]
            np.testing.assert_allclose(scores[b, k, : len(response)], law, atol=1e-5)


def test_no_response_positions_at_all():
    prompts, responses = FIXED
    empty = Ragged(responses.ids[..., :0], jnp.zeros((B, K), jnp.int32))
    assert scoring.token_log_prob(MODEL, PARAMS, prompts, empty).shape == (B, K, 0)
    np.testing.assert_array_equal(scoring.log_prob(MODEL, PARAMS, prompts, empty), 0)


def test_refusals_name_the_shapes():
    prompts, responses = FIXED
    fewer = jax.tree.map(lambda leaf: leaf[:2], responses)
    with pytest.raises(ValueError, match=r"3 prompts, got shape \(2, 2, 6\)"):
        scoring.token_log_prob(MODEL, PARAMS, prompts, fewer)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        scoring.token_log_prob(MODEL, PARAMS, prompts, responses, chunk=0)
