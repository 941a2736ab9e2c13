"""Every loss against float64 NumPy, at extremes, and at the optimum its theory promises."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jax_klrlhf.core import bradley_terry, gibbs, objectives

ETA = 0.3


def softplus(x):
    return np.logaddexp(0.0, x)


class Case(NamedTuple):
    """One loss as a function of two log-ratios, its NumPy twin, and the laws that it obeys."""

    loss: object
    twin: object
    normalized: bool = False
    """exp(-loss) and exp(-swapped loss) sum to one: the loss is a likelihood of the two orders."""
    shift_free: bool = False
    """Only the difference of the log-ratios counts."""
    monotone: bool = True
    """A larger chosen log-ratio never costs more, a larger rejected one never less."""


def twin_of(link):
    return lambda c, r, eta: softplus(-eta * (link(c) - link(r)))


def f_divergence(member):
    return functools.partial(objectives.f_divergence, derivative=member)


LENGTHS = {"chosen_length": 4, "rejected_length": 10}


def with_lengths(loss):
    def call(chosen, rejected, *, kl_coef):
        lengths = (jnp.full(chosen.shape, n) for n in LENGTHS.values())
        return loss(chosen, rejected, *lengths, kl_coef=kl_coef)

    return call


def with_bonus(chosen, rejected, *, kl_coef):
    bonus = jnp.full(chosen.shape, 0.7)
    return objectives.pessimistic(chosen, rejected, bonus, bonus / 7, kl_coef=kl_coef)


def with_sft(chosen, rejected, *, kl_coef):
    length = jnp.full(chosen.shape, 4)
    log_prob = chosen - 2.0
    return objectives.rpo(chosen, rejected, log_prob, length, kl_coef=kl_coef, sft_coef=0.5)


def with_exploration(chosen, rejected, *, kl_coef):
    explored = jnp.full(chosen.shape, -7.0)
    return objectives.exploratory(chosen, rejected, explored, kl_coef=kl_coef, optimism=0.01)


def chi(log_ratio):
    return np.exp(log_ratio) + log_ratio


CASES = {
    "sigmoid": Case(objectives.sigmoid, twin_of(lambda x: x), normalized=True, shift_free=True),
    "smoothed": Case(
        functools.partial(objectives.sigmoid, label_smoothing=0.1),
        lambda c, r, eta: 0.9 * softplus(-eta * (c - r)) + 0.1 * softplus(eta * (c - r)),
        shift_free=True,
        monotone=False,
    ),
    "ipo": Case(
        objectives.ipo,
        lambda c, r, eta: (c - r - 1 / (2 * eta)) ** 2,
        shift_free=True,
        monotone=False,
    ),
    "hinge": Case(
        objectives.hinge, lambda c, r, eta: np.maximum(0, 1 - eta * (c - r)), shift_free=True
    ),
    "robust": Case(
        functools.partial(objectives.robust, flip_rate=0.1),
        lambda c, r, eta: (0.9 * softplus(-eta * (c - r)) - 0.1 * softplus(eta * (c - r))) / 0.8,
        shift_free=True,
    ),
    "rpo": Case(with_sft, lambda c, r, eta: softplus(-eta * (c - r)) - 0.5 * (c - 2) / 4),
    "simpo": Case(
        with_lengths(functools.partial(objectives.simpo, margin=0.5)),
        lambda c, r, eta: softplus(-(eta * c / 4 - eta * r / 10 - 0.5)),
    ),
    "length_normalized": Case(
        with_lengths(objectives.length_normalized),
        lambda c, r, eta: softplus(-eta * (c / 4 - r / 10)),
    ),
    "chi_po": Case(
        functools.partial(objectives.chi_po, clip=2.0),
        lambda c, r, eta: softplus(-np.clip(eta * (chi(c) - chi(r)), -2, 2)),
        normalized=True,
    ),
    "reverse_kl": Case(
        f_divergence(objectives.reverse_kl),
        twin_of(lambda x: 1 + x),  # f' with its constant: it cancels
        normalized=True,
        shift_free=True,
    ),
    "forward_kl": Case(
        f_divergence(objectives.forward_kl), twin_of(lambda x: -1 / np.exp(x)), normalized=True
    ),
    "jensen_shannon": Case(
        f_divergence(objectives.jensen_shannon),
        twin_of(lambda x: np.log(2) + x - np.logaddexp(0, x)),
        normalized=True,
    ),
    "alpha": Case(
        f_divergence(objectives.alpha(0.3)),
        twin_of(lambda x: (1 - np.exp(x) ** -0.3) / 0.3),
        normalized=True,
    ),
    "pessimistic": Case(
        with_bonus, lambda c, r, eta: softplus(-(eta * (c - r) + 0.7 - 0.1)), shift_free=True
    ),
    "exploratory": Case(
        with_exploration, lambda c, r, eta: softplus(-eta * (c - r)) - 0.07, shift_free=True
    ),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]


def test_equals_numpy_with_free_leading_axes_under_jit_and_vmap(case):
    rng = np.random.default_rng(0)
    chosen, rejected = 3 * rng.normal(size=(2, 2, 3, 5))
    arrays = jnp.array(chosen, jnp.float32), jnp.array(rejected, jnp.float32)
    want = case.twin(chosen, rejected, ETA)
    loss = functools.partial(case.loss, kl_coef=ETA)
    for name, got in {
        "plain": loss(*arrays),
        "jit and vmap": jax.jit(jax.vmap(jax.vmap(loss)))(*arrays),
        "a traced coefficient": jax.jit(lambda eta: case.loss(*arrays, kl_coef=eta))(ETA),
    }.items():
        assert got.shape == (2, 3, 5)
        np.testing.assert_allclose(got, want, rtol=5e-5, atol=1e-5, err_msg=name)


def test_gradient_equals_finite_differences_and_laws_hold(case, x64):
    grid = jnp.linspace(-6.0, 6.0, 7) + 0.01  # off the kinks of hinge and clip
    chosen, rejected = (x.ravel() for x in jnp.meshgrid(grid, grid))

    @jax.jit
    def everything(chosen, rejected):
        loss = functools.partial(case.loss, kl_coef=ETA)
        gradient = jax.grad(lambda c, r: jnp.sum(loss(c, r)), (0, 1))(chosen, rejected)
        return (
            loss(chosen, rejected),
            loss(rejected, chosen),
            loss(chosen + 1, rejected + 1),
            *gradient,
        )

    value, swapped, shifted, by_chosen, by_rejected = everything(chosen, rejected)
    step = 1e-6
    c, r = np.asarray(chosen), np.asarray(rejected)
    for got, dc, dr in ((by_chosen, step, 0), (by_rejected, 0, step)):
        want = (case.twin(c + dc, r + dr, ETA) - case.twin(c - dc, r - dr, ETA)) / (2 * step)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)

    probability = np.exp(-value) + np.exp(-swapped)
    assert np.allclose(probability, 1, atol=1e-12) == case.normalized
    assert np.allclose(value, shifted, atol=1e-12) == case.shift_free
    assert bool((by_chosen <= 0).all() and (by_rejected >= 0).all()) == case.monotone


def test_extremes_have_right_values_and_finite_gradients_that_push_the_right_way(case):
    extreme = jnp.array([-1e4, -1e4, -1e4, 0.0, 0.0, 0.0, 1e4, 1e4, 1e4])
    other = jnp.array([-1e4, 0.0, 1e4] * 3)

    def total(chosen, rejected, kl_coef):
        loss = case.loss(chosen, rejected, kl_coef=kl_coef)
        return jnp.sum(loss), loss

    kl_coef = jnp.array([1e-4, 1.0, 1e4])
    gradient = jax.vmap(jax.grad(total, (0, 1), has_aux=True), (None, None, 0))
    slopes, loss = jax.jit(gradient)(extreme, other, kl_coef)
    assert jnp.isfinite(loss).all()
    assert jnp.isfinite(jnp.stack(slopes)).all()
    with np.errstate(all="ignore"):
        want = case.twin(np.float64(extreme), np.float64(other), np.float64(kl_coef)[:, None])
    representable = np.isfinite(want)  # a ratio of e^10000 is not, in NumPy's plain formula
    assert representable.any()
    np.testing.assert_allclose(loss[representable], want[representable], rtol=1e-5, atol=1e-6)
    if case.monotone:
        assert (slopes[0] <= 0).all()
        assert (slopes[1] >= 0).all()


@pytest.mark.parametrize(
    ("margin", "loss", "slope"), [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0), (0.0, math.log(2), -0.5)]
)
@pytest.mark.parametrize("kl_coef", [1e-4, 1e4])
def test_sigmoid_is_right_at_extreme_margins(margin, loss, slope, kl_coef):
    def dpo(chosen):
        return objectives.sigmoid(chosen, jnp.array(0.0), kl_coef=kl_coef)

    got = jax.value_and_grad(dpo)(jnp.array(margin / kl_coef))
    np.testing.assert_allclose(got, (loss, slope * kl_coef), rtol=1e-5)


def test_sigmoid_is_the_likelihood_of_the_margin_of_implicit_rewards():
    log_prob = jnp.array([[-3.0, -5.0], [-2.0, -2.0], [-9.0, -1.0]])
    ref_log_prob = jnp.array([[-4.0, -4.0], [-2.0, -2.0], [-1.0, -9.0]])
    pairs = objectives.Scores(log_prob, ref_log_prob, jnp.full((3, 2), 5))
    reward = gibbs.implicit_reward(log_prob, ref_log_prob, kl_coef=ETA)
    np.testing.assert_array_equal(
        objectives.sigmoid(pairs.chosen_log_ratio, pairs.rejected_log_ratio, kl_coef=ETA),
        bradley_terry.nll(reward[:, 0] - reward[:, 1]),
    )


def test_members_that_are_one_loss_agree_bit_by_bit():
    ratio = jnp.array([-20.0, -1.0, 0.0, 0.5, 20.0])
    other = ratio[::-1] / 3
    sigmoid = objectives.sigmoid(ratio, other, kl_coef=ETA)
    for same in (
        objectives.f_divergence(ratio, other, kl_coef=ETA, derivative=objectives.reverse_kl),
        objectives.f_divergence(ratio, other, kl_coef=ETA, derivative=objectives.alpha(0.0)),
        objectives.robust(ratio, other, kl_coef=ETA, flip_rate=0.0),
        objectives.pessimistic(ratio, other, 0 * ratio, 0 * ratio, kl_coef=ETA),
        objectives.exploratory(ratio, other, ratio, kl_coef=ETA, optimism=0.0),
        objectives.rpo(ratio, other, ratio, jnp.ones(5, int), kl_coef=ETA, sft_coef=0.0),
    ):
        np.testing.assert_array_equal(same, sigmoid)


def test_identical_responses_cost_log_two_and_move_nothing_that_only_compares():
    ratio = jnp.array([-3.0, 0.0, 3.0])
    for name in (
        "sigmoid",
        "smoothed",
        "robust",
        "chi_po",
        "forward_kl",
        "jensen_shannon",
        "alpha",
    ):
        loss = functools.partial(CASES[name].loss, kl_coef=ETA)
        both = jax.jit(jax.vmap(jax.value_and_grad(lambda x, loss=loss: loss(x, x))))
        value, slope = both(ratio)
        np.testing.assert_allclose(value, math.log(2), rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(slope, 0, atol=1e-5, err_msg=name)


def test_alpha_runs_from_reverse_to_forward_kl(x64):
    log_ratio = jnp.linspace(-3, 3, 13)
    reverse, forward = objectives.reverse_kl(log_ratio), objectives.forward_kl(log_ratio)
    np.testing.assert_allclose(objectives.alpha(1.0)(log_ratio), 1 + forward, rtol=1e-12)
    # First order in alpha: alpha/2 times the square, below 1e-8 * 9/2.
    np.testing.assert_allclose(objectives.alpha(1e-8)(log_ratio), reverse, atol=5e-8)
    slope = jax.vmap(jax.grad(objectives.alpha(0.3)))(log_ratio)
    np.testing.assert_allclose(slope, np.exp(-0.3 * log_ratio), rtol=1e-12)


def test_small_alpha_does_not_cancel_in_float32():
    log_ratio = jnp.array([0.01, -0.01, 1.0])
    np.testing.assert_allclose(objectives.alpha(1e-4)(log_ratio), log_ratio, rtol=1e-4)


# What a loss is for: at the optimum that its theory names, its expected gradient is zero.

ACTIONS = 5


@pytest.fixture
def bandit(x64):
    """Rewards and a reference over five actions."""
    rng = np.random.default_rng(3)
    reward = jnp.array(rng.normal(size=ACTIONS))
    return reward, jax.nn.log_softmax(jnp.array(rng.normal(size=ACTIONS)))


def expected_gradient(pair_loss, log_prob, ref_log_prob, reward):
    """Gradient in the log-ratios of the mean loss over all ordered pairs, labels Bradley-Terry."""
    first, second = (x.ravel() for x in np.mgrid[:ACTIONS, :ACTIONS])
    preferred = jax.nn.sigmoid(reward[first] - reward[second])

    def mean_loss(log_ratio):
        return jnp.mean(preferred * pair_loss(log_ratio, first, second))

    return jax.grad(mean_loss)(log_prob - ref_log_prob)


def plain(loss, **settings):
    return lambda ratio, w, l: loss(ratio[w], ratio[l], kl_coef=ETA, **settings)  # noqa: E741


def regularized_optimum(reward, ref_log_prob, generator):
    """argmax E_pi r - eta E_pi0 f(pi/pi0), by a generic optimizer that knows nothing of losses."""
    reward, ref = np.asarray(reward), np.exp(np.asarray(ref_log_prob))

    def negative(logits):
        prob = np.exp(logits - logits.max())
        prob /= prob.sum()
        return -(prob @ reward - ETA * ref @ generator(prob / ref))

    found = minimize(negative, np.log(ref), method="BFGS", options={"gtol": 1e-10})
    for _ in range(3):  # polish: BFGS with differences stops at their noise
        found = minimize(
            negative,
            found.x,
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-15, "maxfev": 4000},
        )
    return jax.nn.log_softmax(jnp.array(found.x))


@pytest.mark.parametrize(
    ("loss", "generator"),
    [
        (plain(objectives.sigmoid), lambda z: z * np.log(z)),
        (plain(objectives.f_divergence, derivative=objectives.forward_kl), lambda z: -np.log(z)),
        (
            plain(objectives.f_divergence, derivative=objectives.jensen_shannon),
            lambda z: z * np.log(z) - (z + 1) * np.log((z + 1) / 2),
        ),
        (
            plain(objectives.f_divergence, derivative=objectives.alpha(0.4)),
            lambda z: (z**0.6 - 0.6 * z - 0.4) / (0.4 * (0.4 - 1)),
        ),
        (plain(objectives.chi_po, clip=1e3), lambda z: z**2 / 2 + z * np.log(z) - z),
    ],
    ids=["sigmoid", "forward_kl", "jensen_shannon", "alpha", "chi_po"],
)
def test_expected_loss_is_stationary_at_the_optimum_of_its_regularizer(bandit, loss, generator):
    reward, ref_log_prob = bandit
    optimum = regularized_optimum(reward, ref_log_prob, generator)
    gradient = expected_gradient(loss, optimum, ref_log_prob, reward)
    # The generic optimizer gives the policy to about 1e-6; elsewhere the gradient is of order 0.01.
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    elsewhere = expected_gradient(loss, ref_log_prob, ref_log_prob, reward)
    assert abs(elsewhere).max() > 1e-3


def test_pessimistic_is_stationary_at_the_gibbs_policy_of_the_discounted_reward(bandit):
    reward, ref_log_prob = bandit
    bonus = jnp.array([0.1, 2.0, 0.0, 0.5, 1.0])
    optimum = gibbs.log_prob(reward - bonus, ref_log_prob, kl_coef=ETA)

    def loss(ratio, w, l):  # noqa: E741
        return objectives.pessimistic(ratio[w], ratio[l], bonus[w], bonus[l], kl_coef=ETA)

    np.testing.assert_allclose(
        expected_gradient(loss, optimum, ref_log_prob, reward), 0, atol=1e-14
    )
    assert (
        abs(expected_gradient(plain(objectives.sigmoid), optimum, ref_log_prob, reward)).max()
        > 1e-3
    )


def test_robust_is_unbiased_for_flipped_labels_and_smoothing_is_not():
    ratio, other = jnp.linspace(-4, 4, 9), jnp.linspace(1, -2, 9)
    rate = 0.2

    def mean_over_flips(loss):
        return (1 - rate) * loss(ratio, other) + rate * loss(other, ratio)

    clean = objectives.sigmoid(ratio, other, kl_coef=ETA)
    robust = functools.partial(objectives.robust, kl_coef=ETA, flip_rate=rate)
    np.testing.assert_allclose(mean_over_flips(robust), clean, rtol=1e-5)
    smoothed = functools.partial(objectives.sigmoid, kl_coef=ETA, label_smoothing=rate)
    assert abs(mean_over_flips(smoothed) - clean).max() > 0.1


def test_ipo_recovers_the_preference_itself(x64):
    # Two actions, P(first preferred) = p: the expected loss is least at h = (p - 1/2) / tau.
    p = 0.8

    def expected(h):
        zero = jnp.zeros_like(h)
        win, lose = (objectives.ipo(*pair, kl_coef=ETA) for pair in ((h, zero), (zero, h)))
        return p * win + (1 - p) * lose

    assert abs(jax.grad(expected)(jnp.array((p - 0.5) / ETA))) < 1e-13


def test_optimism_raises_the_optimal_value_of_the_implicit_reward(bandit):
    reward, ref_log_prob = bandit
    # The implicit reward is known up to a constant; centre it under the exploration law, pi_0.
    reward = reward - jnp.exp(ref_log_prob) @ reward
    log_prob = gibbs.log_prob(reward, ref_log_prob, kl_coef=ETA)
    value = gibbs.free_energy(reward, ref_log_prob, kl_coef=ETA)
    zero, optimism = jnp.zeros(ACTIONS), 0.7
    loss = objectives.exploratory(zero, zero, log_prob, kl_coef=ETA, optimism=optimism)
    dpo = objectives.sigmoid(zero, zero, kl_coef=ETA)
    bonus = jnp.exp(ref_log_prob) @ (loss - dpo)
    constant = optimism * jnp.exp(ref_log_prob) @ ref_log_prob
    # So the loss falls as the value rises: optimism > 0 is optimism.
    np.testing.assert_allclose(bonus, constant - optimism / ETA * value, rtol=1e-12)


def test_scores_name_the_two_responses_and_travel_through_jit():
    rng = np.random.default_rng(0)
    log_prob, ref_log_prob = jnp.array(rng.normal(size=(2, 4, 3, 2)), jnp.float32)
    pairs = objectives.Scores(log_prob, ref_log_prob, jnp.array(rng.integers(1, 9, (4, 3, 2))))

    @jax.jit
    def read(pairs):
        return (
            pairs.chosen_log_ratio,
            pairs.rejected_log_ratio,
            pairs.chosen_log_prob,
            pairs.rejected_log_prob,
            pairs.chosen_length,
            pairs.rejected_length,
        )

    ratio = log_prob - ref_log_prob
    want = [x[..., k] for x in (ratio, log_prob, pairs.length) for k in (0, 1)]
    for got, expected in zip(read(pairs), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_scores_refuse_what_is_not_a_pair_and_a_reference_that_is_not_there():
    one, three = (
        objectives.Scores(x := jnp.zeros((4, k)), x, jnp.ones((4, k), int)) for k in (1, 3)
    )
    for scores in (one, three):
        assert scores.chosen_log_prob.shape == (4,)
        for name in ("rejected_log_prob", "rejected_log_ratio", "rejected_length"):
            with pytest.raises(ValueError, match="two responses on its last axis"):
                getattr(scores, name)
    alone = objectives.Scores(jnp.zeros((4, 2)), None, jnp.ones((4, 2), int))
    assert alone.rejected_log_prob.shape == (4,)
    with pytest.raises(ValueError, match=r"objectives\.simpo"):
        alone.chosen_log_ratio  # noqa: B018


def test_an_empty_response_is_not_a_division_by_zero():
    nothing = jnp.array(0)
    loss = jax.value_and_grad(
        lambda x: objectives.length_normalized(x, -x, nothing, nothing, kl_coef=1.0)
    )(jnp.array(0.0))
    np.testing.assert_allclose(loss, (math.log(2), -1.0), rtol=1e-6)


@pytest.mark.parametrize("flip_rate", [-0.1, 0.5, 0.9])
def test_a_flip_rate_without_information_is_refused(flip_rate):
    ratio = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"flip_rate must lie in \[0, 0\.5\)"):
        objectives.robust(ratio, ratio, kl_coef=ETA, flip_rate=flip_rate)


@pytest.mark.parametrize("order", [-0.1, 1.1])
def test_an_alpha_outside_the_family_is_refused(order):
    with pytest.raises(ValueError, match="alpha must lie in"):
        objectives.alpha(order)
