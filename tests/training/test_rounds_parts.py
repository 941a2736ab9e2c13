"""The parts of a round, each against brute force or the formula it stands for."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_klrlhf.core import (
    choices,
    ellipsoid,
    enhancer,
    estimation,
    objectives,
    pairs,
    preferences,
)  # fmt: skip
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import ModelConfig, language_model, scoring
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.training import mesh, rounds
from jax_klrlhf.training.rounds import fitting, oracle, pairing, settings
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import Comparisons, pick, ragged
from tests.training import rounds_world as world


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.fixture(scope="module")
def drawn():
    return world.drawn()


@pytest.fixture(scope="module")
def comparisons(drawn):
    return compare(drawn, 0)


def compare(drawn, seed, which=(0, 1)):
    """Two of every prompt's responses, the first two unless asked, labelled by the gold reward."""
    responses = pick(drawn.responses, np.tile(which, (len(drawn.agent), 1)))
    said = oracle.bradley_terry(world.gold)(jax.random.key(seed), drawn.prompts, responses)
    return Comparisons(drawn.prompts, responses, *said)


# --- who labels


def fixed(margin):
    """A judge whose margin is the same for every pair."""
    return lambda prompts, responses: np.broadcast_to(
        np.float32([margin, 0.0]), responses.lengths.shape
    )


@pytest.mark.parametrize(
    ("margin", "noise", "tie"), [(0.7, 0.0, 0.0), (-0.4, 0.2, 0.0), (0.5, 0.1, 0.6)]
)
def test_labels_are_drawn_at_the_rates_of_the_model(margin, noise, tie):
    count = 40_000
    prompts, responses = ragged(np.ones((count, 1)), np.ones(count)), blank(count)
    label = oracle.bradley_terry(fixed(margin), noise=noise, tie=tie)(
        jax.random.key(0), prompts, responses
    ).label
    first, second = sigmoid(margin - tie), sigmoid(-margin - tie)
    for value, clean, other in ((1.0, first, second), (0.0, second, first)):
        p = (1 - noise) * clean + noise * other
        # 4.5 standard errors: one false alarm in 150,000.
        assert abs(np.mean(label == value) - p) < 4.5 * np.sqrt(p * (1 - p) / count)
    assert np.any(label == 0.5) == (tie > 0)


def test_any_preference_model_labels():
    """Davidson's law by hand; 4.5 standard errors, one false alarm in 150,000 for each outcome."""
    count, margin, tie = 40_000, 0.8, 0.5
    prompts, responses = ragged(np.ones((count, 1)), np.ones(count)), blank(count)
    model = preferences.davidson(tie)
    draw = oracle.annotator(fixed(margin), preference=model)
    label = draw(jax.random.key(1), prompts, responses).label
    odds = np.array([np.exp(margin / 2), tie, np.exp(-margin / 2)])
    law = odds / odds.sum()
    for value, p in zip((1.0, 0.5, 0.0), law, strict=True):
        assert abs(np.mean(label == value) - p) < 4.5 * np.sqrt(p * (1 - p) / count)
    mean = oracle.expected(fixed(margin), preference=model)(
        jax.random.key(0), one_token(3), blank(3)
    )
    np.testing.assert_allclose(mean.label, law[0] + law[1] / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="noise must lie"):
        oracle.annotator(fixed(margin), preference=model, noise=0.6)


def test_expected_labels_are_the_probabilities():
    said = oracle.expected(fixed(0.7), noise=0.1)(jax.random.key(0), one_token(3), blank(3))
    np.testing.assert_allclose(said.label, 0.9 * sigmoid(0.7) + 0.1 * sigmoid(-0.7), rtol=1e-6)


def blank(count):
    return ragged(np.ones((count, 2, 1)), np.ones((count, 2)))


def one_token(count):
    return ragged(np.ones((count, 1)), np.ones(count))


def test_recorded_choices_are_found_in_either_order_and_new_pairs_are_abstained_from():
    prompts = ragged([[1, 9], [1, 0], [1, 0]], [1, 1, 1])  # One prompt, three times.
    responses = ragged(
        [[[1, 2], [3, 0]], [[3, 9], [1, 2]], [[4, 0], [3, 0]]], [[2, 1], [1, 2], [1, 1]]
    )
    said = Comparisons(prompts, responses, np.float32([1, 0.25, 0.5]), np.float32([1, 3, 1]))
    asked = ragged(
        [[[1, 2], [3, 7]], [[3, 0], [1, 2]], [[3, 0], [4, 8]], [[1, 2], [4, 0]]],
        [[2, 1], [1, 2], [1, 1], [2, 1]],
    )
    found = oracle.recorded(said)(jax.random.key(0), ragged(np.ones((4, 1)), np.ones(4)), asked)
    # Rows 0 and 1 are one pair in both orders: (1 * 1 + 3 * 0.75) / 4.
    np.testing.assert_allclose(found.label[:3], [0.8125, 0.1875, 0.5])
    np.testing.assert_allclose(found.weight, [4, 4, 1, 0])


def test_a_reward_model_in_a_folder_judges_as_the_model_in_memory(tmp_path, drawn):
    config = ModelConfig(
        vocab_size=world.VOCAB, hidden_size=8, intermediate_size=8, layers=1, heads=2, kv_heads=2,
        head_dim=4, max_length=16,
    )  # fmt: skip
    model = language_model(config)
    params = rewards.RewardParams(
        jax.jit(model.init)(jax.random.key(0)), rewards.init_head(jax.random.key(1), dim=8)
    )
    rewards.save(tmp_path / "judge", config, params)
    judge = oracle.reward_model(tmp_path / "judge", rows=4)
    direct = jax.jit(partial(rewards.reward, model))
    expected = direct(params, jax_rows(drawn.prompts), jax_rows(drawn.responses))
    found = judge(drawn.prompts, drawn.responses)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    decode = lambda ids: "".join(map(str, ids))  # noqa: E731
    lengths = oracle.texts(lambda texts: [len(t) for t in texts], decode)
    np.testing.assert_array_equal(lengths(drawn.prompts, drawn.responses), drawn.responses.lengths)


def jax_rows(rows):
    return Ragged(jnp.asarray(rows.ids), jnp.asarray(rows.lengths))


# --- who answers


def test_agents_answer_with_their_own_policies_whatever_the_batch():
    other = jax.tree.map(lambda x: 0.5 * x, world.PARAMS)
    oldest = jax.tree.map(lambda x: -x, world.PARAMS)
    policies = rounds.Policies(other, world.PARAMS, world.PARAMS, (oldest, other))
    sampler = rounds.mixture(
        rounds.Agent(policy=rounds.current, draw=world.DRAW),
        rounds.Agent(policy=rounds.base, draw=world.DRAW),
        rounds.Agent(policy=rounds.earlier(5), draw=world.DRAW),
    )
    key = jax.random.key(4)
    found = sampler(key, policies, world.PROMPTS)
    assert found.agent[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for back, params in enumerate((other, oldest, oldest)):
        assert rounds.earlier(back)(policies) is params
    for number, params in enumerate((other, world.PARAMS, oldest)):
        all_at_once = rounds.Draw(**{**DRAWING, "rows": 100})
        alone = all_at_once(jax.random.fold_in(key, number), params, world.PROMPTS)
        own = slice(4 * number, 4 * number + 4)
        np.testing.assert_array_equal(found.responses.ids[:, own], alone.ids)
        np.testing.assert_array_equal(found.responses.lengths[:, own], alone.lengths)


DRAWING = {
    name: getattr(world.DRAW, name) for name in ("model", "samples", "max_new_tokens", "stop")
}


def test_a_pool_answers_with_what_was_recorded(drawn):
    sampler = rounds.pool(drawn.prompts, drawn.responses)
    asked = ragged(drawn.prompts.ids[[3, 1]], drawn.prompts.lengths[[3, 1]])
    found = sampler(jax.random.key(0), world.policies(), asked)
    np.testing.assert_array_equal(found.responses.ids, drawn.responses.ids[[3, 1]])
    with pytest.raises(ValueError, match="prompt 0 has no recorded"):
        sampler(jax.random.key(0), world.policies(), ragged([[0, 0]], [2]))


# --- which two


def test_two_agents_are_compared_on_different_responses():
    ids = np.array([[[1], [2], [1], [3]], [[1], [1], [1], [1]]])
    agent = np.tile([0, 0, 1, 1], (2, 1))
    drawn = rounds.Drawn(ragged([[1], [1]], [1, 1]), ragged(ids, np.ones((2, 4))), agent)
    scored = rounds.Scored(np.float32([[2, 1, 0, -1]] * 2), np.zeros((2, 4), np.float32))
    rule = pairs.between_agents(first=pairs.best, second=pairs.best)
    chosen = pairing.choose(jax.random.key(0), rule, drawn, scored)
    # The best of agent 1 is a copy of the first: the next one is taken; all alike make no pair.
    assert (chosen.first[0, 0], chosen.second[0, 0]) == (0, 3)
    assert chosen.valid[:, 0].tolist() == [True, False]
    with pytest.raises(ValueError, match=r"needs `agent`.*against_base"):
        pairing.choose(jax.random.key(0), rule, drawn._replace(agent=0 * agent), scored)
    tilt = pairs.enhancer(kl_coef=1.0)
    scored = scored._replace(features=np.ones((2, 4, 1), np.float32))
    with pytest.raises(ValueError, match="some here are another agent's"):
        pairing.choose(jax.random.key(0), tilt, drawn, scored)


def test_the_enhancer_is_the_best_of_the_policies_tried_within_the_budget():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6, 3)).astype(np.float32) + rng.normal(size=(1, 1, 3)).astype(
        np.float32
    )
    drawn = choices.drawn(
        jnp.broadcast_to(jnp.arange(6)[None, :, None], (40, 6, 1)),
        features=jnp.asarray(features),
        ellipsoid=ellipsoid.init(3, ridge=1.0),
    )
    choose = jax.jit(lambda eta: enhancer.best_of_n(drawn, kl_coef=eta))
    centred = features - features.mean(1, keepdims=True)
    far = np.linalg.norm(centred, axis=-1)
    for eta in (0.0, 0.05, 0.2, 0.4, 100.0):
        allowed = []
        for n in range(1, 7):
            choice = far[:, :n].argmax(1)
            g = centred[np.arange(40), choice].mean(0)
            if n == 1 or eta * (np.log(n) - (n - 1) / n) <= np.linalg.norm(g):
                allowed.append((n, choice, np.linalg.norm(g)))
        n, choice, norm = allowed[-1]
        found = choose(eta)
        np.testing.assert_allclose(found.cost, eta * (np.log(n) - (n - 1) / n), rtol=1e-4)
        np.testing.assert_array_equal(np.asarray(found.log_prob).argmax(1), choice)
        np.testing.assert_allclose(found.budget, norm, rtol=1e-4)
        assert n == 1 or found.cost <= found.budget
    assert float(found.cost) == 0  # At a large coefficient the enhancer is the main agent.
    with pytest.raises(ValueError, match="sample first"):
        enhancer.best_of_n(drawn._replace(law=choices.ENUMERATED), kl_coef=1.0)


def test_core_rules_see_the_beliefs_uncertainty_and_no_copies(drawn):
    belief = rounds.linear(world.counts, dim=world.VOCAB, ridge=1.0, radius=2.0)
    state = belief.fit(None, None, [compare(drawn, 0)], world.policies())
    scored = belief.score(state, world.policies(), drawn.prompts, drawn.responses)
    phi = world.counts(drawn.prompts, drawn.responses).astype(np.float64)
    inverse = np.linalg.inv(np.asarray(state.ellipsoid.precision, np.float64))
    widest = partial(pairs.most_uncertain, curvature=jnp.ones_like)
    chosen = pairing.choose(jax.random.key(2), widest, drawn, scored)
    for row in range(len(phi)):
        norm = {
            pair: np.sqrt(z @ inverse @ z)
            for pair in itertools.combinations(range(4), 2)
            for z in [phi[row, pair[0]] - phi[row, pair[1]]]
        }
        one, two = sorted((chosen.first[row, 0], chosen.second[row, 0]))
        if chosen.valid[row, 0]:
            np.testing.assert_allclose(norm[one, two], max(norm.values()), rtol=1e-4)
    several = pairing.choose(jax.random.key(0), pairs.tournament, drawn, scored)
    ids = drawn.responses.ids
    for row, match in np.argwhere(several.valid):
        first, second = several.first[row, match], several.second[row, match]
        assert np.any(ids[row, first] != ids[row, second])
    assert several.first.shape == (6, 3)


# --- which data


def source(rows, value):
    return Batch(
        ragged(np.full((rows, 2), value), np.full(rows, 2)),
        ragged(np.arange(rows * 2).reshape(rows, 2, 1), np.ones((rows, 2))),
        weight=np.ones(rows, np.float32),
        label=np.ones(rows, np.float32),
    )


def test_every_batch_holds_each_sources_share_and_an_epoch_each_row_once():
    groups = [source(3, 1), source(5, 2), source(2, 3)]
    stream = fitting.deal(groups, [0.5, 0.3, 0.2]).stream(jax.random.key(0), batch_size=10)
    batches = [next(stream) for _ in range(6)]
    for batch in batches:
        assert np.bincount(batch.prompts.ids[:, 0], minlength=4).tolist() == [0, 5, 3, 2]
    rows = np.concatenate([b.responses.ids[b.prompts.ids[:, 0] == 2, 0, 0] for b in batches])
    # 18 places for 5 rows: three permutations, and three rows of a fourth.
    assert sorted(np.bincount(rows, minlength=10)[::2].tolist()) == [3, 3, 4, 4, 4]
    again = fitting.deal(groups, [0.5, 0.3, 0.2]).stream(jax.random.key(0), batch_size=10)
    again.restore(4)
    jax.tree.map(np.testing.assert_array_equal, next(again), batches[4])
    # Of what is left over the largest remainders: 4, 2.4 and 1.6 of 8.
    fewer = next(fitting.deal(groups, [0.5, 0.3, 0.2]).stream(jax.random.key(0), batch_size=8))
    assert np.bincount(fewer.prompts.ids[:, 0], minlength=4).tolist() == [0, 4, 2, 2]
    pooled = fitting.deal(groups).stream(jax.random.key(0), batch_size=10)
    np.testing.assert_array_equal(
        np.sort(next(pooled).prompts.ids[:, 0]), [1] * 3 + [2] * 5 + [3] * 2
    )
    with pytest.raises(ValueError, match="no comparison to learn from"):
        fitting.deal([source(2, 1)._replace(weight=np.zeros(2, np.float32))])


def test_settings_choose_their_data(comparisons):
    other = comparisons._replace(label=1 - comparisons.label)
    history = [other, comparisons]
    everything = settings.everything(comparisons, history)
    assert (len(everything.sources), everything.shares) == (3, None)
    assert settings.offline_only(comparisons, history).sources == [comparisons]
    assert settings.history_only(comparisons, history).sources == history
    assert settings.history_only(comparisons, []).sources == [comparisons]
    assert settings.newest(None, history).sources == [comparisons]
    np.testing.assert_allclose(settings.hybrid(0.4)(comparisons, history).shares, [0.4, 0.3, 0.3])
    found = settings.hybrid(0.4, newest_share=0.5)(comparisons, history)
    np.testing.assert_allclose(found.shares, [0.4, 0.1, 0.5])
    with pytest.raises(ValueError, match="no offline data"):
        settings.hybrid(0.4)(None, history)


def test_recorded_batches_are_comparisons_without_their_fill_rows():
    batches = [source(3, 1), source(2, 4)._replace(weight=np.float32([2, 0]), label=None)]
    found = rounds.recorded(batches)
    assert found.prompts.ids[:, 0].tolist() == [1, 1, 1, 4]
    assert (found.weight.tolist(), found.label.tolist()) == ([1, 1, 1, 2], [1] * 4)
    one = jax.tree.map(lambda x: x, batches[0])._replace(
        responses=ragged(np.ones((3, 1, 1)), [[1]] * 3)
    )
    with pytest.raises(ValueError, match="a comparison has two"):
        rounds.recorded([one])


# --- what is believed


@pytest.mark.parametrize("devices", [1, 8])
def test_the_linear_belief_is_the_cores_fit_and_ellipsoid(drawn, comparisons, devices):
    laid = None if devices == 1 else mesh.make(data=2, fsdp=4)
    data = [comparisons, compare(world.drawn(2), 3)]
    belief = rounds.linear(
        world.counts, dim=world.VOCAB, ridge=0.5, radius=1.5, bound=2.0, rows=5, mesh=laid
    )
    state = belief.fit(None, None, data, world.policies())
    joined = rounds.join(data)
    phi = world.counts(joined.prompts, joined.responses)
    z = jnp.asarray(phi[:, 0] - phi[:, 1])
    direct = estimation.fit(z, jnp.asarray(joined.label), ridge=0.5, bound=2.0)
    np.testing.assert_allclose(state.theta, direct.theta, rtol=1e-3, atol=1e-4)
    sigma = 0.5 * np.eye(world.VOCAB) + np.asarray(z, np.float64).T @ np.asarray(z, np.float64)
    np.testing.assert_allclose(state.ellipsoid.precision, sigma, rtol=1e-5, atol=1e-5)
    assert bool(state.converged)
    scored = belief.score(state, world.policies(), drawn.prompts, drawn.responses)
    at = world.counts(drawn.prompts, drawn.responses).astype(np.float64)
    np.testing.assert_allclose(scored.reward, at @ np.asarray(state.theta), rtol=1e-4, atol=1e-5)
    shift = at - phi.reshape(-1, world.VOCAB).mean(0)
    bonus = 1.5 * np.sqrt(np.einsum("bkd,de,bke->bk", shift, np.linalg.inv(sigma), shift))
    np.testing.assert_allclose(scored.uncertainty, bonus, rtol=1e-4, atol=1e-5)


def test_frozen_features_lie_in_the_unit_ball_and_are_the_models(drawn):
    features = rounds.hidden_features(world.MODEL, world.PARAMS, scale=1.5, rows=4)
    found = features(drawn.prompts, drawn.responses)
    raw = rewards.features(
        world.MODEL, world.PARAMS, jax_rows(drawn.prompts), jax_rows(drawn.responses),
        pooling=rewards.mean,
    )  # fmt: skip
    raw = np.asarray(raw) / 1.5
    norm = np.linalg.norm(raw, axis=-1, keepdims=True)
    assert np.any(norm > 1)
    np.testing.assert_allclose(found, raw / np.maximum(norm, 1), rtol=1e-5, atol=1e-6)


def constant(values):
    return rounds.known(lambda prompts, responses: np.float32(values))


def test_beliefs_are_combined_as_their_formulas_say(drawn):
    one, two, three = (np.random.default_rng(s).normal(size=(6, 4)) for s in range(3))
    members = [constant(v) for v in (one, two, three)]
    both = np.stack([one, two, three])
    ask = lambda reward: reward.score(  # noqa: E731
        reward.init, world.policies(), drawn.prompts, drawn.responses
    )
    level = both.mean(-1, keepdims=True)
    centred = both - level
    for combine, expected in (
        (None, both.mean(0)),
        (rounds.worst, centred.min(0) + level.mean(0)),
        (rounds.uncertainty_weighted(0.7), both.mean(0) - 0.7 * centred.var(0)),
    ):
        found = ask(rounds.ensemble(members, combine=combine))
        np.testing.assert_allclose(found.reward, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.uncertainty, centred.std(0, ddof=1), rtol=1e-4)
    found = ask(rounds.length_penalty(members[0], 0.3)).reward
    np.testing.assert_allclose(found, one - 0.3 * drawn.responses.lengths, rtol=1e-5, atol=1e-6)
    shifted = one - one.mean(-1, keepdims=True)
    found = ask(rounds.transformed(members[0], rounds.centred)).reward
    np.testing.assert_allclose(found, shifted, rtol=1e-5, atol=1e-6)
    found = ask(rounds.transformed(members[0], rounds.log_sigmoid(0.75))).reward
    bar = np.sort(one, -1)[:, 2:3]  # three of the four are at most this
    np.testing.assert_allclose(found, np.log(sigmoid(one - bar)), rtol=1e-5, atol=1e-6)
    found = ask(rounds.transformed(members[0], rounds.win_rate)).reward
    beats = sigmoid(one[:, :, None] - one[:, None, :]).mean(-1)
    np.testing.assert_allclose(found, beats, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pi0", [False, True])
def test_offsets_of_members_and_prompts_change_no_combined_difference(drawn, pi0):
    """Preferences do not identify them; uncentred members were reordered by them."""
    rng = np.random.default_rng(5)
    both, origin = rng.normal(size=(3, 6, 4)), rng.normal(size=(3, 6, 2))
    offset = 2 * rng.normal(size=(3, 6, 1))
    offset -= offset.mean(0)

    def judge(at_draws, at_pi0):
        return rounds.known(
            lambda _, rows: np.float32(at_draws if np.shape(rows.lengths)[1] == 4 else at_pi0)
        )

    def ask(shift, combine):
        members = [judge(*rows) for rows in zip(both + shift, origin + shift, strict=True)]

        def from_pi0(policies, prompts):
            del policies, prompts
            return ragged(drawn.responses.ids[:, :2], drawn.responses.lengths[:, :2])

        found = rounds.ensemble(members, combine=combine, origin=from_pi0 if pi0 else None)
        return found.score(found.init, world.policies(), drawn.prompts, drawn.responses)

    for combine in (rounds.worst, rounds.uncertainty_weighted(0.7)):
        for plain, moved in zip(ask(0, combine)[:2], ask(offset, combine)[:2], strict=True):
            np.testing.assert_allclose(moved, plain, rtol=1e-4, atol=1e-5)
    beside = origin if pi0 else both
    least = (both - beside.mean(-1, keepdims=True)).min(0)
    found = ask(0, rounds.worst).reward
    np.testing.assert_allclose(np.diff(found), np.diff(least), rtol=1e-4, atol=1e-5)


def test_pi0_draws_come_from_pi0_and_are_the_same_each_time(drawn):
    draw = rounds.Draw(model=world.MODEL, samples=3, max_new_tokens=2)
    origin = rounds.pi0_draws(jax.random.key(4), draw)
    other = jax.tree.map(lambda x: -x, world.PARAMS)
    found = origin(world.policies(other), drawn.prompts)
    expected = draw(jax.random.key(4), world.policies().base, drawn.prompts)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_the_implicit_reward_is_the_scaled_log_ratio(drawn):
    other = jax.tree.map(lambda x: 0.5 * x, world.PARAMS)
    reward = rounds.implicit(world.MODEL, kl_coef=0.3, rows=4)
    found = reward.score((), world.policies(other), drawn.prompts, drawn.responses).reward
    log_prob = jax.jit(partial(scoring.log_prob, world.MODEL))
    ratio = log_prob(other, jax_rows(drawn.prompts), jax_rows(drawn.responses)) - log_prob(
        world.PARAMS, jax_rows(drawn.prompts), jax_rows(drawn.responses)
    )
    np.testing.assert_allclose(found, 0.3 * np.asarray(ratio), rtol=1e-4, atol=1e-5)


def test_a_resampled_member_sees_each_comparison_a_random_number_of_times(comparisons):
    seen = []

    def fit(key, belief, data, policies):
        seen.append(np.stack([d.weight for d in data]))
        return belief

    member = rounds.resampled(rounds.Reward(init=(), fit=fit, score=constant(0).score))
    weighted = comparisons._replace(weight=np.full(6, 2.0, np.float32))
    for seed in (0, 1):
        member.fit(jax.random.key(seed), (), [weighted, weighted], world.policies())
    assert all(np.all(w.sum(1) == 12) for w in seen)
    assert np.any(seen[0] != seen[1])
    assert np.any(seen[0][0] != seen[0][1])


def test_a_reward_model_learns_to_rank_and_knows_nothing_without_data(drawn, comparisons):
    params = rewards.RewardParams(world.PARAMS, jnp.zeros(8))
    settled = rounds.Fitting(optimizer=optax.adam(0.03), steps=40, batch_size=6)
    belief = rounds.reward_model(world.MODEL, params, fitting=settled, pooling=rewards.mean, rows=6)
    assert belief.fit(jax.random.key(0), belief.init, [], world.policies()) is params
    state = belief.fit(jax.random.key(0), belief.init, [comparisons], world.policies())
    found = belief.score(state, world.policies(), comparisons.prompts, comparisons.responses).reward
    margin = (found[:, 0] - found[:, 1]) * (2 * comparisons.label - 1)
    differ = np.any(comparisons.responses.ids[:, 0] != comparisons.responses.ids[:, 1], axis=-1)
    assert np.all(margin[differ] > 0)


def test_members_of_one_fitting_are_one_program_and_fits_of_their_own(drawn, comparisons):
    traced = []

    def pooling(prompt, hidden, mask):
        traced.append(hidden.shape)
        return rewards.mean(prompt, hidden, mask)

    fitting = rounds.Fitting(optimizer=optax.adam(0.03), steps=2, batch_size=6)

    def member(seed):
        head = jnp.asarray(np.random.default_rng(seed).normal(size=8), jnp.float32)
        params = rewards.RewardParams(world.PARAMS, head)
        return rounds.reward_model(
            world.MODEL, params, fitting=fitting, pooling=pooling, rows=6
        )  # fmt: skip

    key, hand = jax.random.key(1), world.policies()
    one = member(0)
    alone = one.fit(jax.random.fold_in(key, 0), one.init, [comparisons], hand)
    expected = one.score(alone, hand, drawn.prompts, drawn.responses).reward
    count = len(traced)
    both = rounds.ensemble([member(0), member(1)], combine=lambda rewards: rewards[0])
    state = both.fit(key, both.init, [comparisons], hand)
    found = both.score(state, hand, drawn.prompts, drawn.responses)
    assert len(traced) == count
    level = lambda rewards: rewards - rewards.mean(-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(level(found.reward), level(expected), atol=1e-6)
    assert np.all(found.uncertainty.max(1) > 0)  # the other member is another


# --- what is improved


def test_pessimistic_dpo_minimizes_the_pessimistic_objective(comparisons):
    """One step of gradient descent is one step on core.objectives.pessimistic."""
    eta, rate = world.KL_COEF, 0.1
    one_step = rounds.Fitting(optimizer=optax.sgd(rate), steps=1, batch_size=6)
    bonus = np.random.default_rng(0).uniform(0, 1, (6, 2)).astype(np.float32)
    score = lambda prompts, responses: rounds.Scored(  # noqa: E731
        np.zeros((6, 2), np.float32), bonus
    )
    start = jax.tree.map(lambda x: 0.9 * x, world.PARAMS)
    situation = rounds.Situation(
        policies=world.policies(), start=start, data=rounds.Mixture([comparisons], None),
        prompts=world.PROMPTS, score=score, folder=None,
    )  # fmt: skip
    improve = rounds.pessimistic_dpo(world.MODEL, kl_coef=eta, fitting=one_step)
    found = improve(jax.random.key(0), situation).params
    prompts, responses = jax_rows(comparisons.prompts), jax_rows(comparisons.responses)
    swap = jnp.asarray(comparisons.label == 0)[:, None]
    gamma = jnp.where(swap, bonus[:, ::-1], bonus)

    def loss(params):
        ratio = scoring.log_prob(world.MODEL, params, prompts, responses) - scoring.log_prob(
            world.MODEL, world.PARAMS, prompts, responses
        )
        ratio = jnp.where(swap, ratio[:, ::-1], ratio)
        pairs = objectives.Scores(ratio, jnp.zeros_like(ratio), jnp.ones((6, 2), int), bonus=gamma)
        return objectives.pessimistic(pairs, kl_coef=eta).mean()

    expected = jax.tree.map(lambda p, g: p - rate * g, start, jax.jit(jax.grad(loss))(start))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)
    certain = situation._replace(score=lambda *rows: score(*rows)._replace(uncertainty=0 * bonus))
    with pytest.raises(ValueError, match="uncertainty is 0 everywhere"):
        improve(jax.random.key(0), certain)


def test_whole_prompts_are_held_out_and_the_same_for_a_key():
    groups = [source(3, 1), source(5, 2), source(2, 3), source(4, 2), source(2, 4)]
    dealt = fitting.deal(groups, [0.3, 0.2, 0.2, 0.2, 0.1])
    kept, held = dealt.split(jax.random.key(0), 0.5)
    prompts = [set(part.rows.prompts.ids[:, 0].tolist()) for part in (kept, held)]
    assert (len(prompts[1]), prompts[0] & prompts[1], prompts[0] | prompts[1]) == (
        2,
        set(),
        {1, 2, 3, 4},
    )
    for part, asked in ((kept, prompts[0]), (held, prompts[1])):
        whole = [len(g.weight) if int(g.prompts.ids[0, 0]) in asked else 0 for g in groups]
        assert part.sizes == whole
        owners = np.repeat([1, 2, 3, 2, 4], whole).tolist()
        assert part.rows.prompts.ids[:, 0].tolist() == owners
    again = dealt.split(jax.random.key(0), 0.5)[1]
    jax.tree.map(np.testing.assert_array_equal, again.rows, held.rows)
    others = [dealt.split(jax.random.key(n), 0.5)[1] for n in range(1, 9)]
    assert any(set(o.rows.prompts.ids[:, 0].tolist()) != prompts[1] for o in others)
    with pytest.raises(ValueError, match="none on one side"):
        dealt.split(jax.random.key(0), 0.05)


@pytest.mark.parametrize("devices", [1, 8])
def test_rows_held_out_teach_nothing_and_their_loss_is_by_hand(comparisons, drawn, devices):
    """Six prompts in two sources, two held out; other labels there move no parameter."""
    laid = {}
    if devices == 8:
        over = mesh.make(data=2, fsdp=4)
        whole = jax.tree.map(lambda x: NamedSharding(over, PartitionSpec()), world.PARAMS)
        laid = {"mesh": over, "shardings": whole}
    settled = rounds.Fitting(
        optimizer=optax.adam(0.03), steps=3, batch_size=8, held_out=1 / 3, **laid
    )
    fit = rounds.dpo(world.MODEL, kl_coef=0.5, fitting=settled)
    key = jax.random.key(1)

    def run(*sources):
        return fit(
            key,
            rounds.Situation(
                policies=world.policies(), start=world.PARAMS,
                data=rounds.Mixture(list(sources), [0.7, 0.3]),
                prompts=world.PROMPTS, score=None, folder=None,
            ),
        )  # fmt: skip

    more = jax.tree.map(lambda x: x[:5], compare(drawn, 7, (2, 3)))
    found = run(more, comparisons)
    dealt = fitting.comparisons_deal(rounds.Mixture([more, comparisons], [0.7, 0.3]))
    held = dealt.split(jax.random.split(key)[1], 1 / 3)[1].rows.prompts.ids.tolist()
    apart = [
        np.array([p in held for p in data.prompts.ids.tolist()]) for data in (more, comparisons)
    ]
    assert (apart[1].sum(), 0 < apart[0].sum() < 5) == (2, True)
    flipped = [
        data._replace(label=np.where(at, 1 - data.label, data.label).astype(np.float32))
        for data, at in zip((more, comparisons), apart, strict=True)
    ]
    other = run(*flipped)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (other.params, found.params)))
    assert other.metrics["loss/held_out"].value != found.metrics["loss/held_out"].value

    def losses(data, at):
        ratio = [
            np.asarray(scoring.log_prob(world.MODEL, p, *map(jax_rows, data[:2])), np.float64)
            for p in (jax.device_get(found.params), world.PARAMS)
        ]
        margin = np.subtract(*(ratio[0] - ratio[1]).T) * (2 * data.label - 1)
        return np.log1p(np.exp(-0.5 * margin))[at]

    one, two = losses(more, apart[0]), losses(comparisons, apart[1])
    expected, both = 0.7 * one.mean() + 0.3 * two.mean(), np.concatenate([one, two])
    weights = np.repeat([0.7 / len(one), 0.3 / len(two)], [len(one), len(two)])
    spread, n = weights * (both - expected), len(both)
    assert abs(expected - both.mean()) > 1e-4  # or shares were not seen
    final = found.metrics["loss/held_out"]
    np.testing.assert_allclose(final.value, expected, rtol=1e-5)
    np.testing.assert_allclose(final.stderr, np.sqrt(np.sum(spread**2) * n / (n - 1)), rtol=1e-4)


def test_best_of_n_answers_with_the_best(drawn):
    found = rounds.best_of_n(jax.random.key(5), world.DRAW, world.PARAMS, world.gold, world.PROMPTS)
    all_of_them = world.DRAW(jax.random.key(5), world.PARAMS, world.PROMPTS)
    reward = world.gold(world.PROMPTS, all_of_them)
    np.testing.assert_array_equal(found.reward, reward.max(1))
    np.testing.assert_array_equal(world.gold(None, found.responses)[:, 0], reward.max(1))
    assert found.kl_bound == pytest.approx(np.log(4) - 0.75)


def test_rows_are_mapped_in_pieces_alone_or_over_devices():
    x = np.arange(22, dtype=np.float32).reshape(11, 2)
    for laid in (None, mesh.make(data=2, fsdp=4)):
        program = mapped(lambda p, x: {"y": p * x}, rows=4, mesh=laid)
        np.testing.assert_array_equal(program(jnp.float32(3.0), x)["y"], 3 * x)
