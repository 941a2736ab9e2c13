"""The Gibbs policy and the value it attains: brute force, limits, masks, extremes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_klrlhf.core import divergence, gibbs

KL_COEF = 0.7


def problem(seed: int, contexts: int = 3, actions: int = 6):
    """Rewards, a reference and a policy, ``[contexts, actions]``, in the current float type."""
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(contexts, actions))
    ref, pol = rng.exponential(size=(2, contexts, actions))
    return tuple(
        jnp.array(x)
        for x in (
            reward,
            np.log(ref / ref.sum(-1, keepdims=True)),
            np.log(pol / pol.sum(-1, keepdims=True)),
        )
    )


def brute_force(reward, ref_log_prob, kl_coef):
    """Gibbs log-probabilities and free energy of one context, by the definition, in float64."""
    weight = np.exp(np.asarray(ref_log_prob, float)) * np.exp(np.asarray(reward, float) / kl_coef)
    return np.log(weight / weight.sum()), kl_coef * np.log(weight.sum())


def outputs(reward, ref_log_prob, log_prob, kl_coef, where=None):
    """Every function of the module, on one problem."""
    return {
        "log_prob": gibbs.log_prob(reward, ref_log_prob, kl_coef=kl_coef, where=where),
        "free_energy": gibbs.free_energy(reward, ref_log_prob, kl_coef=kl_coef, where=where),
        "value": gibbs.value(log_prob, reward, ref_log_prob, kl_coef=kl_coef, where=where),
        "gap": gibbs.gap(log_prob, reward, ref_log_prob, kl_coef=kl_coef, where=where),
    }


def test_policy_and_free_energy_equal_brute_force(x64):
    reward, ref_log_prob, _ = problem(0)
    policy = gibbs.log_prob(reward, ref_log_prob, kl_coef=KL_COEF)
    energy = gibbs.free_energy(reward, ref_log_prob, kl_coef=KL_COEF)
    for x in range(len(reward)):
        want = brute_force(reward[x], ref_log_prob[x], KL_COEF)
        np.testing.assert_allclose(policy[x], want[0], rtol=1e-12)
        np.testing.assert_allclose(energy[x], want[1], rtol=1e-12)


def test_no_policy_does_better_than_the_gibbs_policy(x64):
    reward, ref_log_prob, policy = problem(1)
    optimum = gibbs.log_prob(reward, ref_log_prob, kl_coef=KL_COEF)
    best = gibbs.value(optimum, reward, ref_log_prob, kl_coef=KL_COEF)
    for rival in (policy, ref_log_prob, jax.nn.log_softmax(optimum + 0.1 * policy)):
        value = gibbs.value(rival, reward, ref_log_prob, kl_coef=KL_COEF)
        assert (value < best).all()
        np.testing.assert_allclose(
            gibbs.gap(rival, reward, ref_log_prob, kl_coef=KL_COEF), best - value, rtol=1e-9
        )
    at_optimum = gibbs.gap(optimum, reward, ref_log_prob, kl_coef=KL_COEF)
    np.testing.assert_array_equal(at_optimum, 0)


def test_free_energy_has_the_policy_as_its_gradient_and_kl_as_its_slope_in_kl_coef(x64):
    reward, ref_log_prob, _ = problem(2)
    optimum = gibbs.log_prob(reward, ref_log_prob, kl_coef=KL_COEF)

    def total(reward, ref_log_prob, kl_coef):
        return jnp.sum(gibbs.free_energy(reward, ref_log_prob, kl_coef=kl_coef))

    slopes = jax.jit(jax.grad(total, (0, 1, 2)))(reward, ref_log_prob, KL_COEF)
    np.testing.assert_allclose(slopes[0], jnp.exp(optimum), rtol=1e-12)
    np.testing.assert_allclose(slopes[1], KL_COEF * jnp.exp(optimum), rtol=1e-12)
    # Envelope theorem: at the optimum only the explicit coefficient counts.
    divergences = divergence.categorical(optimum, ref_log_prob)
    np.testing.assert_allclose(slopes[2], -jnp.sum(divergences), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_masking_equals_deleting_in_value_and_gradient(seed, x64):
    reward, ref_log_prob, policy = (x[0] for x in problem(seed))
    where = np.random.default_rng(seed).random(6) < 0.5
    where[:2] = True
    ref_log_prob = ref_log_prob.at[1].set(-jnp.inf)  # kept, but out of the support of pi_0
    policy = policy.at[1].set(-jnp.inf)
    kept = np.flatnonzero(where & (np.arange(6) != 1))
    out = np.setdiff1d(np.arange(6), kept)
    junk = jnp.where(where, 0, jnp.nan)  # must not leak

    def masked(reward, ref_log_prob, policy):
        found = outputs(reward, ref_log_prob, policy, KL_COEF, jnp.array(where))
        return sum(jnp.sum(jnp.where(x > -jnp.inf, x, 0)) for x in found.values())

    def deleted(reward, ref_log_prob, policy):
        return sum(jnp.sum(x) for x in outputs(reward, ref_log_prob, policy, KL_COEF).values())

    arguments = reward, ref_log_prob, policy
    got = jax.jit(jax.value_and_grad(masked, (0, 1, 2)))(*(x + junk for x in arguments))
    want = jax.jit(jax.value_and_grad(deleted, (0, 1, 2)))(*(x[kept] for x in arguments))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    for slope, expected in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(slope[kept], expected, rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(slope[out], 0)
    policy_found = gibbs.log_prob(reward, ref_log_prob, kl_coef=KL_COEF, where=jnp.array(where))
    np.testing.assert_array_equal(policy_found[out], -jnp.inf)


@pytest.mark.parametrize("empty", ["where", "reference"])
def test_a_row_with_no_action_is_documented_and_never_nan(empty):
    reward, ref_log_prob, policy = problem(3)
    where = jnp.ones_like(reward, bool)
    if empty == "where":
        where = where.at[0].set(False)
    else:
        ref_log_prob = ref_log_prob.at[0].set(-jnp.inf)
        policy = policy.at[0].set(-jnp.inf)
    found = jax.jit(outputs)(reward, ref_log_prob, policy, KL_COEF, where)
    assert (found["log_prob"][0] == -jnp.inf).all()
    assert found["free_energy"][0] == -jnp.inf
    assert found["value"][0] == 0
    assert found["gap"][0] == 0

    def total(*arguments):
        found = outputs(*arguments, where)
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0)) for x in found.values())

    slopes = jax.jit(jax.grad(total, (0, 1, 2, 3)))(reward, ref_log_prob, policy, KL_COEF)
    for slope in slopes:
        assert jnp.isfinite(slope).all()
    for slope in slopes[:3]:
        np.testing.assert_array_equal(slope[0], 0)
        assert (slope[1:] != 0).any()


def test_implicit_reward_inverts_the_optimum_up_to_the_free_energy(x64):
    reward, ref_log_prob, _ = problem(4)
    ref_log_prob = ref_log_prob.at[0, 2].set(-jnp.inf)
    policy = gibbs.log_prob(reward, ref_log_prob, kl_coef=KL_COEF)
    found = gibbs.implicit_reward(policy, ref_log_prob, kl_coef=KL_COEF)
    energy = gibbs.free_energy(reward, ref_log_prob, kl_coef=KL_COEF)
    want = (reward - energy[:, None]).at[0, 2].set(0)
    np.testing.assert_allclose(found, want, rtol=1e-11, atol=1e-13)
    slopes = jax.grad(lambda *a: jnp.sum(gibbs.implicit_reward(*a, kl_coef=KL_COEF)), (0, 1))(
        policy, ref_log_prob
    )
    assert jnp.isfinite(jnp.stack(slopes)).all()


def test_limits_of_kl_coef_in_float32():
    reward = jnp.array([1.0, 3.0, -2.0])
    ref_log_prob = jnp.log(jnp.array([0.5, 0.2, 0.3]))
    greedy = gibbs.log_prob(reward, ref_log_prob, kl_coef=1e-4)
    np.testing.assert_allclose(jnp.exp(greedy), [0, 1, 0], atol=1e-7)
    # log pi at kl_coef 1e-4 is a reward gap over 1e-4: tens of thousands of nats, still exact.
    np.testing.assert_allclose(greedy, [-2e4, 0.0, -5e4], rtol=1e-3)
    np.testing.assert_allclose(gibbs.free_energy(reward, ref_log_prob, kl_coef=1e-4), 3, rtol=1e-3)
    stay = gibbs.log_prob(reward, ref_log_prob, kl_coef=1e4)
    np.testing.assert_allclose(stay, ref_log_prob, atol=5e-4)
    # mean reward 0.5; float32 resolves eta log Z to eta * 1e-7, here 1e-3.
    np.testing.assert_allclose(gibbs.free_energy(reward, ref_log_prob, kl_coef=1e4), 0.5, atol=3e-3)


@pytest.mark.parametrize("kl_coef", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_constant_reward_of_any_size_changes_nothing(kl_coef, offset):
    ref_log_prob = jnp.log(jnp.array([0.9, 0.1]))
    reward = jnp.full(2, offset)
    found = outputs(reward, ref_log_prob, ref_log_prob, kl_coef)
    np.testing.assert_allclose(found["log_prob"], ref_log_prob, rtol=1e-5)
    resolution = 1e-6 * max(kl_coef, abs(offset))
    np.testing.assert_allclose(found["free_energy"], offset, atol=resolution)
    np.testing.assert_allclose(found["value"], offset, atol=resolution)
    np.testing.assert_allclose(found["gap"], 0, atol=1e-6 * kl_coef)


def test_extreme_rewards_have_finite_values_and_gradients():
    reward = jnp.array([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]])
    ref_log_prob = jnp.log(jnp.array([[0.1, 0.8, 0.1], [0.2, 0.3, 0.5]]))
    policy = jnp.log(jnp.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]))

    def total(*arguments):
        return sum(jnp.sum(x) for x in outputs(*arguments).values())

    both = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))
    for kl_coef in (1e-4, 1e4):
        found = both(reward, ref_log_prob, policy, kl_coef)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found)), kl_coef
    energy = gibbs.free_energy(reward, ref_log_prob, kl_coef=1e-4)
    np.testing.assert_allclose(energy, 1e4, rtol=1e-6)


def test_one_action_leaves_no_choice():
    only = jnp.zeros((2, 1))
    reward = jnp.array([[5.0], [-1e4]])
    found = outputs(reward, only, only, KL_COEF)
    np.testing.assert_array_equal(found["log_prob"], 0)
    np.testing.assert_array_equal(found["free_energy"], reward[:, 0])
    np.testing.assert_array_equal(found["value"], reward[:, 0])
    np.testing.assert_array_equal(found["gap"], 0)


def test_leaving_the_support_of_the_reference_is_worth_minus_infinity():
    ref_log_prob = jnp.log(jnp.array([1.0, 0.0]))
    policy = jnp.log(jnp.array([0.5, 0.5]))
    reward = jnp.array([0.0, 1.0])

    def value(policy, kl_coef):
        return gibbs.value(policy, reward, ref_log_prob, kl_coef=kl_coef)

    found, slopes = jax.value_and_grad(value, (0, 1))(policy, KL_COEF)
    assert found == -jnp.inf
    np.testing.assert_array_equal(slopes[0], jnp.exp(policy) * reward)  # of the finite part alone
    assert slopes[1] == 0
    assert gibbs.gap(policy, reward, ref_log_prob, kl_coef=KL_COEF) == jnp.inf


def test_a_reference_need_not_be_normalized(x64):
    reward, ref_log_prob, _ = problem(5)
    policy = gibbs.log_prob(reward, ref_log_prob + 2.0, kl_coef=KL_COEF)
    np.testing.assert_allclose(
        policy, gibbs.log_prob(reward, ref_log_prob, kl_coef=KL_COEF), rtol=1e-12
    )
    np.testing.assert_allclose(
        gibbs.value(policy, reward, ref_log_prob + 2.0, kl_coef=KL_COEF),
        gibbs.free_energy(reward, ref_log_prob + 2.0, kl_coef=KL_COEF),
        rtol=1e-12,
    )


def test_kl_coef_is_traced_and_swept_by_vmap_in_one_trace(x64):
    reward, ref_log_prob, policy = problem(6)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sweep(kl_coef):
        return jax.vmap(lambda eta: outputs(reward, ref_log_prob, policy, eta))(kl_coef)

    for coefficients in ([0.1, 1.0], [0.3, 30.0]):
        swept = sweep(jnp.array(coefficients))
        for i, kl_coef in enumerate(coefficients):
            alone = outputs(reward, ref_log_prob, policy, kl_coef)
            for name, want in alone.items():
                np.testing.assert_allclose(swept[name][i], want, rtol=1e-9, err_msg=name)


def test_gradients_of_the_value_through_a_softmax_policy_with_a_mask(x64):
    reward, ref_log_prob, policy = problem(7, contexts=1, actions=4)
    where = jnp.array([[True, False, True, True]])

    @jax.jit
    def total(reward, logits, kl_coef):
        log_prob = jax.nn.log_softmax(jnp.where(where, logits, -jnp.inf))
        found = outputs(reward, ref_log_prob, log_prob, kl_coef, where)
        return jnp.sum(found["value"] + found["gap"] ** 2 + found["free_energy"] ** 2)

    check_grads(total, (reward, policy, jnp.array(KL_COEF)), order=1, modes=["rev"])


def test_gap_is_never_negative_and_accurate_in_float32():
    """Near the optimum, against float64, with `sum p log(p/q)` as the control.

    Log-probabilities that are 1e-3 apart leave 1e-4 of their difference in float32, and 2e-4 of its
    square; the sum of both signs loses what it has of 1e-7 in a gap of 1e-6.
    """
    scale = 1e-3
    reward, ref_log_prob, other = problem(8, contexts=2000, actions=4)
    optimum = gibbs.log_prob(reward, ref_log_prob, kl_coef=KL_COEF)
    near = jax.nn.log_softmax(optimum + scale * other)
    found = np.asarray(gibbs.gap(near, reward, ref_log_prob, kl_coef=KL_COEF), np.float64)
    plain = KL_COEF * np.asarray(divergence.categorical(near, optimum), np.float64)
    reward, ref_log_prob, near = (np.asarray(x, np.float64) for x in (reward, ref_log_prob, near))
    best = ref_log_prob + reward / KL_COEF
    best -= np.log(np.exp(best).sum(-1, keepdims=True))
    near -= np.log(np.exp(near).sum(-1, keepdims=True))  # float32 normalizes to 1e-7 only
    want = KL_COEF * (np.exp(near) * (near - best)).sum(-1)
    assert (found >= 0).all()
    assert (plain < 0).any()
    ours, theirs = (np.median(abs(x / want - 1)) for x in (found, plain))
    assert ours < 5e-4
    assert theirs > 10 * ours


def test_gap_of_policies_without_some_actions(x64):
    """Deterministic, and far from the optimum: KL by its definition."""
    reward, ref_log_prob, _ = problem(9)
    far = jnp.log(jnp.array([1.0, 0, 0, 0, 0, 0]))
    best = gibbs.log_prob(reward, ref_log_prob, kl_coef=0.01)
    found = gibbs.gap(jnp.stack([far] * 3), reward, ref_log_prob, kl_coef=0.01)
    np.testing.assert_allclose(found, -0.01 * best[:, 0], rtol=1e-12)
    spread = gibbs.gap(ref_log_prob, reward, ref_log_prob, kl_coef=0.01)
    want = 0.01 * (jnp.exp(ref_log_prob) * (ref_log_prob - best)).sum(-1)
    np.testing.assert_allclose(spread, want, rtol=1e-12)


def test_implicit_reward_where_only_one_policy_goes():
    both = jnp.array([-jnp.inf, 0.0, -jnp.inf]), jnp.array([0.0, -jnp.inf, -jnp.inf])
    found = gibbs.implicit_reward(*both, kl_coef=KL_COEF)
    np.testing.assert_array_equal(found, [-jnp.inf, jnp.inf, 0])


def test_a_reward_of_minus_infinity_is_an_action_out_of_play(x64):
    reward, ref_log_prob, _ = problem(10)
    reward = reward.at[0, 2].set(-jnp.inf).at[1].set(-jnp.inf)

    def total(reward, kl_coef):
        energy = gibbs.free_energy(reward, ref_log_prob, kl_coef=kl_coef)
        return jnp.sum(jnp.where(energy > -jnp.inf, energy, 0)), energy

    both = jax.value_and_grad(total, (0, 1), has_aux=True)
    (_, energy), (slope, slope_kl) = both(reward, KL_COEF)
    assert energy[1] == -jnp.inf
    policy = gibbs.log_prob(reward, ref_log_prob, kl_coef=KL_COEF)
    np.testing.assert_allclose(slope, jnp.exp(policy), rtol=1e-12)
    kept = np.array([0, 1, 3, 4, 5])
    rows = (0, kept), (2, slice(None))
    want = -sum(jnp.sum(jnp.exp(policy[r]) * (policy[r] - ref_log_prob[r])) for r in rows)
    np.testing.assert_allclose(slope_kl, want, rtol=1e-12)


@pytest.mark.parametrize("kl_coef", [0, -0.1, float("nan"), jnp.array([1.0, -1.0])])
def test_a_coefficient_that_is_not_positive_is_refused(kl_coef):
    x = jnp.zeros(2)
    for call in (
        lambda: gibbs.log_prob(x, x, kl_coef=kl_coef),
        lambda: gibbs.free_energy(x, x, kl_coef=kl_coef),
        lambda: gibbs.value(x, x, x, kl_coef=kl_coef),
        lambda: gibbs.gap(x, x, x, kl_coef=kl_coef),
        lambda: gibbs.implicit_reward(x, x, kl_coef=kl_coef),
    ):
        with pytest.raises(ValueError, match="kl_coef must be > 0, got"):
            call()
