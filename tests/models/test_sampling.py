"""Sampling against the enumerated law of a toy model, and against transformers on a real one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_klrlhf import models
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import sampling, scoring
from jax_klrlhf.models.logits import Warp
from tests.models import toy
from tests.models.test_logits import brute_warp

V, STOP, PAD = 5, 2, 4
MODEL = toy.language_model(vocab=V, scale=0.5)
PARAMS = MODEL.init(jax.random.key(3))
IDS = [[1, 2, 3], [4], [3, 3]]
DRAWS = 4096
ALARM = 1e-5
"""Chance that one goodness-of-fit test fails a right sampler; there are 12 in this file."""


def ragged(rows, width=None) -> Ragged:
    width = width or max(map(len, rows))
    ids = np.array([[*row, *([0] * (width - len(row)))] for row in rows], np.int32)
    return Ragged(ids, np.array([len(row) for row in rows], np.int32))


PROMPTS = ragged(IDS)


def generate(key, prompts=PROMPTS, *, samples=3, max_new_tokens=6, stop=(STOP,), **options):
    return sampling.generate(
        key, MODEL, PARAMS, prompts, samples=samples, max_new_tokens=max_new_tokens, stop=stop,
        pad_id=PAD, **options,
    )  # fmt: skip


def words(samples: sampling.Samples, row: int) -> list[tuple[int, ...]]:
    ids, lengths = (np.asarray(leaf)[row] for leaf in samples.responses)
    return [tuple(word[:length].tolist()) for word, length in zip(ids, lengths, strict=True)]


score = jax.jit(scoring.token_log_prob)


ALL = {"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 0.0}


@pytest.mark.parametrize(
    "warp",
    [
        {},
        {"temperature": 0.6},
        # One program serves every setting of the same warps.
        {**ALL, "temperature": 1.5, "top_k": 3},
        {**ALL, "top_p": 0.7, "temperature": 0.8},
        {**ALL, "min_p": 0.3, "temperature": 0.9},
        {"temperature": 1.3, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_frequencies_follow_the_enumerated_law(warp):
    """Chi-square over whole responses; cells that expect fewer than 10 draws are pooled."""
    drawn = generate(jax.random.key(7), samples=DRAWS, max_new_tokens=3, **warp)
    for row, prompt in enumerate(IDS[:2]):
        law = toy.enumerate_law(
            PARAMS, prompt, max_new_tokens=3, stop=(STOP,), warp=partial(brute_warp, **warp)
        )
        drawn_words = words(drawn, row)
        counts = dict.fromkeys(law, 0)
        for word in drawn_words:
            counts[word] += 1  # a response that cannot occur is a KeyError
        assert all(law[word] > 0 for word in drawn_words)
        expected, observed = np.array(list(law.values())) * DRAWS, np.array(list(counts.values()))
        big = expected >= 10
        expected, observed = (
            np.append(x[big], x[~big].sum()) for x in (expected, observed.astype(float))
        )
        keep = expected > 0
        assert stats.chisquare(observed[keep], expected[keep], sum_check=False).pvalue > ALARM

        exact = np.log([law[word] for word in drawn_words])
        np.testing.assert_allclose(drawn.sampling_log_prob[row], exact, atol=1e-4)


def test_model_log_probs_are_those_of_scoring():
    for warp in ({}, {"temperature": 0.6}, {"temperature": 0.0}):
        drawn = generate(jax.random.key(1), **warp)
        prompts = jax.tree.map(jnp.asarray, PROMPTS)
        scored = score(MODEL, PARAMS, prompts, drawn.responses)
        np.testing.assert_allclose(drawn.token_log_prob, scored, atol=1e-5)
    np.testing.assert_array_equal(drawn.sampling_token_log_prob, 0)


def test_a_stop_token_is_counted_and_nothing_after_it():
    drawn = generate(jax.random.key(2), samples=64, stop=(STOP, 0))
    ids, lengths = (np.asarray(leaf) for leaf in drawn.responses)
    for word, length, done, log_prob, sampling_log_prob in zip(
        ids.reshape(-1, 6),
        lengths.reshape(-1),
        np.asarray(drawn.finished).reshape(-1),
        np.asarray(drawn.token_log_prob).reshape(-1, 6),
        np.asarray(drawn.sampling_token_log_prob).reshape(-1, 6),
        strict=True,
    ):
        assert done == (word[length - 1] in (STOP, 0))
        assert length == 6 or done
        assert not np.isin(word[: length - 1], (STOP, 0)).any()
        assert (word[length:] == PAD).all()
        assert (log_prob[:length] < 0).all()
        assert not log_prob[length:].any()
        assert not sampling_log_prob[length:].any()
    assert len(set(lengths.reshape(-1))) > 2


def test_early_exit_changes_nothing_but_the_work():
    steps = []

    def decode(params, prefix, cache, ids, step):
        jax.debug.callback(lambda step: steps.append(int(step)), step)
        return MODEL.decode(params, prefix, cache, ids, step)

    counted = dataclasses.replace(MODEL, decode=decode)
    run = partial(
        sampling.generate, jax.random.key(5), counted, PARAMS, PROMPTS, samples=2,
        max_new_tokens=40, pad_id=PAD,
    )  # fmt: skip
    early = run(stop=(STOP, 0, 1))
    jax.effects_barrier()
    assert len(steps) == int(early.responses.lengths.max()) - 1 < 39
    steps.clear()
    whole = run()
    jax.effects_barrier()
    assert len(steps) == 39
    mask = np.asarray(early.responses.mask)
    np.testing.assert_array_equal(early.responses.ids, np.where(mask, whole.responses.ids, PAD))
    np.testing.assert_allclose(
        early.token_log_prob, np.where(mask, whole.token_log_prob, 0), atol=1e-6
    )


def test_a_prompt_with_its_key_draws_the_same_in_any_batch():
    keys = jax.random.split(jax.random.key(0), 3)
    together = generate(keys)
    reordered = generate(keys[::-1], ragged(IDS[::-1]))
    for row in range(3):
        alone = generate(keys[row : row + 1], ragged([IDS[row]], width=11))
        assert words(alone, 0) == words(together, row) == words(reordered, 2 - row)
    # More samples and longer responses go on from the same ones.
    more = generate(keys, samples=5)
    longer = generate(keys, max_new_tokens=9)
    for row in range(3):
        assert words(more, row)[:3] == words(together, row)
        assert [word[:6] for word in words(longer, row)] == words(together, row)


def test_keys_decide():
    one, same, other = (
        generate(jax.random.key(k), ragged([IDS[0]] * 3), samples=3, max_new_tokens=6)
        for k in (0, 0, 1)
    )
    assert words(one, 0) == words(same, 0) != words(other, 0)
    assert words(one, 0) != words(one, 1)
    assert len(set(words(one, 0))) > 1
    with pytest.raises(ValueError, match="3 prompts need one key or 3"):
        generate(jax.random.split(jax.random.key(0), 2))


def test_one_trace_serves_a_bucket_and_every_value_of_a_warp():
    traces = []

    def prefill(params, prompts):
        traces.append(prompts.ids.shape)
        return MODEL.prefill(params, prompts)

    counted = dataclasses.replace(MODEL, prefill=prefill)
    run = partial(sampling.generate, jax.random.key(0), counted, PARAMS, samples=2)
    for width, temperature in ((3, 0.5), (8, 0.7), (5, 2.0)):
        run(ragged([[1] * width, [1]]), max_new_tokens=4, temperature=temperature)
    run(ragged([[1], [1]], width=30), max_new_tokens=4, temperature=3.0)
    assert traces == [(2, 8)]
    run(ragged([[1] * 9, [1]]), max_new_tokens=4, temperature=0.5)
    assert traces == [(2, 8), (2, 16)]


@pytest.mark.slow
def test_a_cache_that_grows_draws_the_same_from_less():
    """Rooms of 16, 32 and 40 tokens in turn, against room for 40 throughout."""
    config = models.ModelConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, layers=1, heads=2, kv_heads=1, head_dim=4,
        max_length=64, init_scale=0.5,
    )  # fmt: skip
    model = models.language_model(config)
    params = model.init(jax.random.key(0))
    rooms = []

    def decode(params, prefix, cache, ids, step):
        rooms.append(jax.tree.leaves(cache)[0].shape[-2])
        return model.decode(params, prefix, cache, ids, step)

    growing, whole = (
        sampling.generate(
            jax.random.key(0), dataclasses.replace(model, decode=decode, grow=grow), params,
            PROMPTS, samples=2, max_new_tokens=40,
        )
        for grow in (model.grow, None)
    )  # fmt: skip
    assert list(dict.fromkeys(rooms)) == [16, 32, 40]
    np.testing.assert_array_equal(growing.responses.ids, whole.responses.ids)
    np.testing.assert_allclose(growing.token_log_prob, whole.token_log_prob, atol=1e-5)


def test_rooms_are_thirds():
    for count in (1, 16, 17, 64, 100, 1000):
        rooms = sampling.rooms(count)
        assert rooms[-1] == count
        assert rooms == sorted(set(rooms))
        assert len(rooms) <= 3
        assert len(rooms) == 1 or rooms[0] >= sampling.SHORTEST
    assert sampling.rooms(96) == [32, 64, 96]


def test_buckets_are_few_and_tight():
    widths = [sampling.bucket(n) for n in range(1, 4097)]
    assert all(n <= w <= max(8, 1.25 * n + 7) for n, w in enumerate(widths, 1))
    assert len(set(widths)) <= 32


def test_refusals():
    with pytest.raises(ValueError, match=r"prompt 1 has 61 tokens.*makes 67.*context is 64"):
        generate(jax.random.key(0), ragged([[1], [1] * 61]))
    with pytest.raises(ValueError, match="at most 0 new tokens"):
        generate(jax.random.key(0), ragged([[1] * 64]), max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(jax.random.key(0), ragged([[1], []]))
    with pytest.raises(ValueError, match="greedy and would ignore top_k"):
        generate(jax.random.key(0), temperature=0.0, top_k=2)
    for option in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}, {"min_p": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must lie in"):
            generate(jax.random.key(0), **option)
    with pytest.raises(ValueError, match="at least 1"):
        generate(jax.random.key(0), samples=0)


def test_the_context_limit_itself_is_allowed():
    drawn = generate(jax.random.key(0), ragged([[1] * 58]), stop=())
    np.testing.assert_array_equal(drawn.responses.lengths, 6)


def test_inside_jit_and_on_eight_devices():
    """Traced or spread over devices, the same draws."""
    prompts = jax.tree.map(jnp.asarray, ragged([*IDS, *IDS, [1], [1, 4, 4]], width=8))
    key = jax.random.key(0)
    plain = generate(key, prompts)
    traced = jax.jit(generate)(key, prompts)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = generate(key, jax.device_put(prompts, jax.NamedSharding(mesh, jax.P("data"))))
    assert len(spread.finished.sharding.device_set) == 8
    for other in (traced, spread):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), plain, other)


def test_half_precision():
    model = toy.language_model(vocab=V, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0))
    drawn = sampling.generate(
        jax.random.key(0), model, params, PROMPTS, samples=4, max_new_tokens=6, stop=(STOP,)
    )
    prompts = jax.tree.map(jnp.asarray, PROMPTS)
    scored = score(model, params, prompts, drawn.responses)
    assert drawn.token_log_prob.dtype == scored.dtype == jnp.float32
    np.testing.assert_allclose(drawn.token_log_prob, scored, atol=0.05)


def test_float64(x64):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
    drawn = sampling.generate(
        jax.random.key(0), MODEL, params, PROMPTS, samples=2, max_new_tokens=4, top_p=0.8
    )
    prompts = jax.tree.map(jnp.asarray, PROMPTS)
    scored = score(MODEL, params, prompts, drawn.responses)
    np.testing.assert_allclose(drawn.token_log_prob, scored, atol=1e-5)


def test_the_pure_program_takes_warps_as_data():
    """Temperatures in one program, by vmap."""
    prompts = jax.tree.map(jnp.asarray, PROMPTS)
    keys = jax.random.split(jax.random.key(0), 3)

    def log_prob(temperature):
        drawn = sampling.sample(
            keys, MODEL, PARAMS, prompts, Warp(temperature=temperature), samples=64,
            max_new_tokens=3,
        )  # fmt: skip
        return drawn.log_prob.mean()

    cold, warm = jax.jit(jax.vmap(log_prob))(jnp.array([0.1, 3.0]))
    assert cold > warm


TEXTS = ["Once upon a time, there was a ", "Tom ", "The big dog ran to the park and "]


@pytest.fixture(scope="module")
def stories(stories_model):
    loaded = models.load(stories_model, dtype=jnp.float32)
    rows = [[1, *loaded.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in TEXTS]
    return loaded, rows


@pytest.mark.parity
def test_greedy_text_is_that_of_transformers(stories, stories_model):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # a pool that spins would slow the other programs of this machine
    loaded, rows = stories
    drawn = sampling.generate(
        jax.random.key(0), loaded.model, loaded.params, ragged(rows), samples=1,
        max_new_tokens=48, temperature=0.0, stop=(2,),
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories_model).eval()
    for row, prompt in enumerate(rows):
        text = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=48, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert words(drawn, row) == [tuple(text)]


@pytest.mark.parity
def test_scores_of_a_real_model_are_those_of_torch(stories, stories_model):
    """Value, and gradient of the tied embedding, of samples from the model itself."""
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)  # a pool that spins would slow the other programs of this machine
    loaded, rows = stories
    prompts = jax.tree.map(jnp.asarray, ragged(rows))
    drawn = sampling.generate(
        jax.random.key(0), loaded.model, loaded.params, prompts, samples=2, max_new_tokens=24
    )

    def total(params):
        scores = scoring.log_prob(loaded.model, params, prompts, drawn.responses, chunk=64)
        return scores.sum(), scores

    (_, scores), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(loaded.params)
    np.testing.assert_allclose(drawn.log_prob, scores, atol=1e-4)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories_model).eval()
    for row, prompt in enumerate(rows):
        for k, word in enumerate(words(drawn, row)):
            ids = torch.tensor([[*prompt, *word]])
            law = theirs(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            value = law.gather(1, torch.tensor(word)[:, None]).sum()
            value.backward()
            np.testing.assert_allclose(float(scores[row, k]), float(value.detach()), atol=1e-4)
    expected = theirs.get_output_embeddings().weight.grad.numpy()
    error = np.abs(np.asarray(grads["embedding"]) - expected).max()
    assert error <= 1e-4 * np.abs(expected).max()
