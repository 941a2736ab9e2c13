"""Every loss against float64 NumPy, at extremes, and at the optimum its theory promises."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jax_klrlhf.core import bradley_terry, fdivergence, gibbs, objectives, onesided
from jax_klrlhf.core.scores import Scores

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


# What stands beside the log-ratios of every pair of these tests.
LENGTHS, REWARD, BONUS, EXPLORED = (4, 10), (0.9, 0.2), (0.7, 0.1), -7.0


def scores_of(chosen, rejected):
    """Pairs with these log-ratios, a reference of log-probability 0."""
    pair = jnp.stack(jnp.broadcast_arrays(chosen, rejected), -1)
    beside = [jnp.broadcast_to(jnp.array(x, pair.dtype), pair.shape) for x in (REWARD, BONUS)]
    return Scores(
        pair,
        jnp.zeros_like(pair),
        jnp.broadcast_to(jnp.array(LENGTHS), pair.shape),
        *beside,
        exploration_log_prob=jnp.full(pair.shape[:-1], EXPLORED, pair.dtype),
    )


def on(loss, **settings):
    """A loss as a function of two log-ratios."""
    return lambda chosen, rejected, *, kl_coef: loss(
        scores_of(chosen, rejected), kl_coef=kl_coef, **settings
    )


def f_divergence(member):
    return on(objectives.f_divergence, divergence=member)


def chi(log_ratio):
    return np.exp(log_ratio) + log_ratio


def one_sided(winner, loser):
    return lambda c, r, eta: winner(eta * c) + loser(eta * r)


def logistic(x):
    return softplus(-x)


CASES = {
    "sigmoid": Case(on(objectives.sigmoid), twin_of(lambda x: x), normalized=True, shift_free=True),
    "smoothed": Case(
        on(objectives.sigmoid, label_smoothing=0.1),
        lambda c, r, eta: 0.9 * softplus(-eta * (c - r)) + 0.1 * softplus(eta * (c - r)),
        shift_free=True,
        monotone=False,
    ),
    "ipo": Case(
        on(objectives.ipo),
        lambda c, r, eta: (c - r - 1 / (2 * eta)) ** 2,
        shift_free=True,
        monotone=False,
    ),
    "hinge": Case(
        on(objectives.hinge), lambda c, r, eta: np.maximum(0, 1 - eta * (c - r)), shift_free=True
    ),
    "robust": Case(
        on(objectives.robust, flip_rate=0.1),
        lambda c, r, eta: (0.9 * softplus(-eta * (c - r)) - 0.1 * softplus(eta * (c - r))) / 0.8,
        shift_free=True,
    ),
    "rpo": Case(
        on(objectives.rpo, sft_coef=0.5), lambda c, r, eta: softplus(-eta * (c - r)) - 0.5 * c / 4
    ),
    "cpo": Case(
        on(objectives.cpo, sft_coef=0.5), lambda c, r, eta: softplus(-eta * (c - r)) - 0.5 * c / 4
    ),
    "simpo": Case(
        on(objectives.simpo, margin=0.5),
        lambda c, r, eta: softplus(-(eta * c / 4 - eta * r / 10 - 0.5)),
    ),
    "length_normalized": Case(
        on(objectives.length_normalized),
        lambda c, r, eta: softplus(-eta * (c / 4 - r / 10)),
    ),
    "chi_po": Case(
        on(objectives.chi_po, clip=2.0),
        lambda c, r, eta: softplus(-np.clip(eta * (chi(c) - chi(r)), -2, 2)),
        normalized=True,
    ),
    "reverse_kl": Case(
        f_divergence(fdivergence.reverse_kl),
        twin_of(lambda x: 1 + x),  # f' with its constant: it cancels
        normalized=True,
        shift_free=True,
    ),
    "forward_kl": Case(
        f_divergence(fdivergence.forward_kl), twin_of(lambda x: -1 / np.exp(x)), normalized=True
    ),
    "jensen_shannon": Case(
        f_divergence(fdivergence.jensen_shannon),
        twin_of(lambda x: np.log(2) + x - np.logaddexp(0, x)),
        normalized=True,
    ),
    "alpha": Case(
        f_divergence(fdivergence.alpha(0.3)),
        twin_of(lambda x: (1 - np.exp(x) ** -0.3) / 0.3),
        normalized=True,
    ),
    "pessimistic": Case(
        on(objectives.pessimistic),
        lambda c, r, eta: softplus(-(eta * (c - r) + 0.7 - 0.1)),
        shift_free=True,
    ),
    "exploratory": Case(
        on(objectives.exploratory, optimism=0.01),
        lambda c, r, eta: softplus(-eta * (c - r)) - 0.07,
        shift_free=True,
    ),
    "modpo": Case(
        on(objectives.modpo, weight=0.6),
        lambda c, r, eta: softplus(-(eta * (c - r) - 0.7) / 0.6),
        shift_free=True,
    ),
    "odpo": Case(
        on(objectives.odpo, margin_coef=0.5),
        lambda c, r, eta: softplus(0.5 * np.log(1.7) - eta * (c - r)),
        shift_free=True,
    ),
    "mm_dpo": Case(
        on(objectives.mm_dpo, growth=0.5, rate=2.0),
        lambda c, r, eta: softplus(-eta * (1 + 0.5 * (1 - np.exp(-1.4))) * (c - r)),
        normalized=True,  # of a pair whose rewards stay what they are
        shift_free=True,
    ),
    "exo": Case(
        on(objectives.exo, label_smoothing=0.1),
        lambda c, r, eta: (
            -np.exp(-softplus(-eta * (c - r))) * (softplus(-eta * (c - r)) + np.log(0.9))
            - np.exp(-softplus(eta * (c - r))) * (softplus(eta * (c - r)) + np.log(0.1))
        ),
        shift_free=True,
        monotone=False,
    ),
    "discopop": Case(
        on(objectives.discopop, temperature=0.5),
        lambda c, r, eta: (
            softplus(-eta * (c - r)) * np.exp(-softplus(2 * eta * (c - r)))
            + np.exp(-eta * (c - r) - softplus(-2 * eta * (c - r)))
        ),
        shift_free=True,
    ),
    "nca": Case(
        on(onesided.nca),
        one_sided(lambda x: logistic(x) + logistic(-x) / 2, lambda x: logistic(-x) / 2),
        monotone=False,
    ),
    "bco": Case(
        on(onesided.bco, shift=0.2),
        one_sided(lambda x: logistic(x - 0.2), lambda x: logistic(0.2 - x)),
    ),
    "sppo": Case(
        on(onesided.sppo),
        lambda c, r, eta: (c - 1 / (2 * eta)) ** 2 + (r + 1 / (2 * eta)) ** 2,
        monotone=False,
    ),
    "kto": Case(
        on(onesided.kto, shift=0.7, desirable=1.3, undesirable=0.6),
        lambda c, r, eta: (
            1.3 * np.exp(-softplus(eta * (c - 0.7))) + 0.6 * np.exp(-softplus(eta * (0.7 - r)))
        ),
    ),
    "apo_zero": Case(
        on(onesided.apo_zero),
        one_sided(lambda x: np.exp(-softplus(x)), lambda x: np.exp(-softplus(-x))),
    ),
    "apo_down": Case(
        on(onesided.apo_down),
        lambda c, r, eta: np.exp(-softplus(-eta * c)) + np.exp(-softplus(eta * (c - r))),
        monotone=False,
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


def test_equals_the_formula_to_the_last_digits_in_float64(case, x64):
    chosen, rejected = 3 * np.random.default_rng(1).normal(size=(2, 50))
    got = case.loss(jnp.array(chosen), jnp.array(rejected), kl_coef=ETA)
    np.testing.assert_allclose(got, case.twin(chosen, rejected, ETA), rtol=1e-12, atol=1e-13)


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
    got = jax.value_and_grad(lambda x: on(objectives.sigmoid)(x, jnp.array(0.0), kl_coef=kl_coef))(
        jnp.array(margin / kl_coef)
    )
    np.testing.assert_allclose(got, (loss, slope * kl_coef), rtol=1e-5)


def test_sigmoid_is_the_likelihood_of_the_margin_of_implicit_rewards():
    log_prob = jnp.array([[-3.0, -5.0], [-2.0, -2.0], [-9.0, -1.0]])
    ref_log_prob = jnp.array([[-4.0, -4.0], [-2.0, -2.0], [-1.0, -9.0]])
    pairs = Scores(log_prob, ref_log_prob, jnp.full((3, 2), 5))
    reward = gibbs.implicit_reward(log_prob, ref_log_prob, kl_coef=ETA)
    np.testing.assert_array_equal(
        objectives.sigmoid(pairs, kl_coef=ETA), bradley_terry.nll(reward[:, 0] - reward[:, 1])
    )


def test_members_that_are_one_loss_agree_bit_by_bit():
    ratio = jnp.array([-20.0, -1.0, 0.0, 0.5, 20.0])
    pairs = scores_of(ratio, ratio[::-1] / 3)
    nothing = pairs._replace(reward=0 * pairs.log_prob, bonus=0 * pairs.log_prob)
    given = {"kl_coef": ETA}
    margin = ETA * (pairs.log_prob[:, 0] - pairs.log_prob[:, 1])
    sigmoid = objectives.sigmoid(pairs, **given)
    for same in (
        bradley_terry.nll(margin),  # the formula as it stood
        objectives.f_divergence(pairs, divergence=fdivergence.reverse_kl, **given),
        objectives.f_divergence(pairs, divergence=fdivergence.alpha(0.0), **given),
        objectives.robust(pairs, flip_rate=0.0, **given),
        objectives.pessimistic(nothing, **given),
        objectives.exploratory(pairs, optimism=0.0, **given),
        objectives.rpo(pairs, sft_coef=0.0, **given),
        objectives.cpo(pairs, sft_coef=0.0, **given),
        objectives.modpo(nothing, weight=1.0, **given),
        objectives.odpo(pairs, margin_coef=0.0, **given),
        objectives.mm_dpo(pairs, growth=0.0, **given),
        objectives.weighted(sigmoid, jnp.ones(5)),
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
    return lambda ratio, w, l: on(loss, **settings)(ratio[w], ratio[l], kl_coef=ETA)  # noqa: E741


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
        (plain(objectives.f_divergence, divergence=fdivergence.forward_kl), lambda z: -np.log(z)),
        (
            plain(objectives.f_divergence, divergence=fdivergence.jensen_shannon),
            lambda z: z * np.log(z) - (z + 1) * np.log((z + 1) / 2),
        ),
        (
            plain(objectives.f_divergence, divergence=fdivergence.alpha(0.4)),
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
        pairs = scores_of(ratio[w], ratio[l])
        pairs = pairs._replace(bonus=jnp.stack([bonus[w], bonus[l]], -1))
        return objectives.pessimistic(pairs, kl_coef=ETA)

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

    clean = on(objectives.sigmoid)(ratio, other, kl_coef=ETA)
    robust = functools.partial(on(objectives.robust, flip_rate=rate), kl_coef=ETA)
    np.testing.assert_allclose(mean_over_flips(robust), clean, rtol=1e-5)
    smoothed = functools.partial(on(objectives.sigmoid, label_smoothing=rate), kl_coef=ETA)
    assert abs(mean_over_flips(smoothed) - clean).max() > 0.1


def test_ipo_recovers_the_preference_itself(x64):
    # Two actions, P(first preferred) = p: the expected loss is least at h = (p - 1/2) / tau.
    p = 0.8

    def expected(h):
        zero = jnp.zeros_like(h)
        win, lose = (on(objectives.ipo)(*pair, kl_coef=ETA) for pair in ((h, zero), (zero, h)))
        return p * win + (1 - p) * lose

    assert abs(jax.grad(expected)(jnp.array((p - 0.5) / ETA))) < 1e-13


def test_optimism_raises_the_optimal_value_of_the_implicit_reward(bandit):
    reward, ref_log_prob = bandit
    # The implicit reward is known up to a constant; centre it under the exploration law, pi_0.
    reward = reward - jnp.exp(ref_log_prob) @ reward
    log_prob = gibbs.log_prob(reward, ref_log_prob, kl_coef=ETA)
    value = gibbs.free_energy(reward, ref_log_prob, kl_coef=ETA)
    zero, optimism = jnp.zeros(ACTIONS), 0.7
    pairs = scores_of(zero, zero)._replace(exploration_log_prob=log_prob)
    loss = objectives.exploratory(pairs, kl_coef=ETA, optimism=optimism)
    dpo = objectives.sigmoid(pairs, kl_coef=ETA)
    bonus = jnp.exp(ref_log_prob) @ (loss - dpo)
    constant = optimism * jnp.exp(ref_log_prob) @ ref_log_prob
    # So the loss falls as the value rises: optimism > 0 is optimism.
    np.testing.assert_allclose(bonus, constant - optimism / ETA * value, rtol=1e-12)


def test_scores_name_the_two_responses_and_travel_through_jit():
    rng = np.random.default_rng(0)
    log_prob, ref_log_prob = jnp.array(rng.normal(size=(2, 4, 3, 2)), jnp.float32)
    pairs = Scores(log_prob, ref_log_prob, jnp.array(rng.integers(1, 9, (4, 3, 2))))

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
    one, three = (Scores(x := jnp.zeros((4, k)), x, jnp.ones((4, k), int)) for k in (1, 3))
    for scores in (one, three):
        assert scores.chosen_log_prob.shape == (4,)
        for name in ("rejected_log_prob", "rejected_log_ratio", "rejected_length"):
            with pytest.raises(ValueError, match="two responses on its last axis"):
                getattr(scores, name)
    alone = Scores(jnp.zeros((4, 2)), None, jnp.ones((4, 2), int))
    assert alone.rejected_log_prob.shape == (4,)
    with pytest.raises(ValueError, match=r"objectives\.simpo"):
        alone.chosen_log_ratio  # noqa: B018


def test_an_empty_response_is_not_a_division_by_zero():
    def loss(x):
        pair = scores_of(x, -x)._replace(length=jnp.zeros(2, int))
        return objectives.length_normalized(pair, kl_coef=1.0)

    found = jax.value_and_grad(loss)(jnp.array(0.0))
    np.testing.assert_allclose(found, (math.log(2), -1.0), rtol=1e-6)


def test_pairs_swap_and_whoever_explored_stays():
    pairs = scores_of(jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0]))
    pairs = pairs._replace(label=jnp.array([1.0, 0.25]))
    other = pairs.swapped()
    for name in ("log_prob", "ref_log_prob", "length", "reward", "bonus"):
        np.testing.assert_array_equal(getattr(other, name), getattr(pairs, name)[:, ::-1])
    np.testing.assert_array_equal(other.exploration_log_prob, pairs.exploration_log_prob)
    np.testing.assert_array_equal(other.label, [0.0, 0.75])


@pytest.mark.parametrize(
    ("loss", "field"),
    [
        (functools.partial(objectives.modpo, weight=1.0), "reward"),
        (functools.partial(objectives.odpo, margin_coef=1.0), "reward"),
        (objectives.mm_dpo, "reward"),
        (objectives.pessimistic, "bonus"),
        (functools.partial(objectives.exploratory, optimism=1.0), "exploration_log_prob"),
        (objectives.sigmoid, "ref_log_prob"),
        (onesided.nca, "ref_log_prob"),
    ],
)
def test_a_field_that_is_absent_is_asked_for_by_name(loss, field):
    pairs = scores_of(jnp.zeros(2), jnp.zeros(2))._replace(**{field: None})
    with pytest.raises(ValueError, match=rf"reads Scores\.{field}, which is None"):
        loss(pairs, kl_coef=ETA)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        *(
            (functools.partial(objectives.robust, kl_coef=ETA, flip_rate=rate), r"flip_rate must l")
            for rate in (-0.1, 0.5, 0.9)
        ),
        (
            functools.partial(objectives.sigmoid, kl_coef=ETA, label_smoothing=0.6),
            "label_smoothing",
        ),
        (functools.partial(objectives.exo, kl_coef=ETA, label_smoothing=0.0), "label_smoothing"),
        (functools.partial(objectives.modpo, kl_coef=ETA, weight=-1.0), "scale must be > 0"),
        *(
            (functools.partial(loss, kl_coef=bad), "kl_coef must be > 0, got")
            for loss in (objectives.sigmoid, objectives.ipo, objectives.mm_dpo, onesided.sppo)
            for bad in (0.0, -0.1, math.nan)
        ),
    ],
)
def test_numbers_without_a_meaning_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(scores_of(jnp.zeros(2), jnp.zeros(2)))


def test_a_weight_is_a_constant_to_the_gradient():
    log_prob, ref = jnp.array([[-3.0, -4.0]]), jnp.array([[-3.5, -3.0]])
    at = lambda p: Scores(p, ref, jnp.array([[2, 3]]))  # noqa: E731
    assert not np.any(jax.grad(lambda p: objectives.wpo_weight(at(p)).sum())(log_prob))
    loss = objectives.sigmoid(at(log_prob), kl_coef=ETA)
    assert not np.any(jax.grad(lambda w: objectives.weighted(loss, w).sum())(jnp.ones(1)))


def test_orpo_by_hand_and_finite_where_a_response_is_certain():
    """Odds of the geometric mean of the tokens' probabilities."""
    scores = Scores(jnp.array([-4.0, -6.0]), None, jnp.array([4, 10]))
    p, q = np.exp(-1.0), np.exp(-0.6)
    wanted = 1.0 + 0.3 * softplus(-(np.log(p / (1 - p)) - np.log(q / (1 - q))))
    np.testing.assert_allclose(objectives.orpo(scores, odds_coef=0.3), wanted, rtol=1e-6)

    def certain(log_prob):
        pair = Scores(jnp.stack([log_prob, jnp.float32(-3.0)]), None, jnp.array([4, 4]))
        return objectives.orpo(pair, odds_coef=0.3)

    value, gradient = jax.value_and_grad(certain)(jnp.float32(0.0))
    assert np.isfinite([value, gradient]).all()
