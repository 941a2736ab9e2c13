"""What each loss converges to, at the population, and that its neighbours converge elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jax_klrlhf.core import (
    fdivergence,
    gibbs,
    objectives,
    onesided,
    pairwise,
    preferences,
    regularized,
)
from jax_klrlhf.core.scores import Scores

ETA, ACTIONS = 0.7, 5
RNG = np.random.default_rng(11)
REWARD, OTHER = RNG.normal(size=(2, ACTIONS))
BONUS = RNG.uniform(size=ACTIONS)
LENGTH = np.array([3, 1, 2, 5, 4])
LOG_REF = np.log(RNG.dirichlet(np.ones(ACTIONS)))
FIRST, SECOND = (x.ravel() for x in np.mgrid[:ACTIONS, :ACTIONS])
# Two laws of who is compared with whom: all alike, and each action as often as something draws it.
PAIRS = {
    "even": np.ones((ACTIONS, ACTIONS)) / ACTIONS**2,
    "uneven": np.outer(*[RNG.dirichlet(np.ones(ACTIONS))] * 2),
}


def population(loss, log_ratio, pairs, model=preferences.bradley_terry, flip_rate=0.0):
    """Mean loss over who is compared and what is said, of any log-ratios (normalized or not)."""
    ref = jnp.array(LOG_REF)
    table = {
        "log_prob": ref + log_ratio,
        "ref_log_prob": ref,
        "length": jnp.array(LENGTH),
        "reward": jnp.array(OTHER),
        "bonus": jnp.array(BONUS),
    }
    scores = Scores(**{k: jnp.stack([v[FIRST], v[SECOND]], -1) for k, v in table.items()})
    scores = scores._replace(exploration_log_prob=scores.log_prob[:, 1])
    margin = jnp.array(REWARD[FIRST] - REWARD[SECOND])
    probs = [jnp.exp(x) for x in model.of(margin)]
    total = 0.0
    for outcome, prob, opposite in zip(model.outcomes, probs, probs[::-1], strict=True):
        said = (1 - flip_rate) * prob + flip_rate * opposite
        label = jnp.full(margin.shape, outcome)
        # Losses of Bradley-Terry take the winner first, and a half as half of each.
        each = outcome * loss(scores) + (1 - outcome) * loss(scores.swapped())
        if not model.merges:
            each = loss(scores._replace(label=label))
        total += jnp.array(pairs.ravel()) @ (said * each)
    return total


def slope(loss, log_prob, pairs, **given):
    """Gradient over softmax policies at a policy."""

    def of(logits):
        return population(loss, jax.nn.log_softmax(logits) - jnp.array(LOG_REF), pairs, **given)

    return np.abs(jax.jit(jax.grad(of))(jnp.array(log_prob))).max()


def gibbs_of(reward):
    return np.asarray(gibbs.log_prob(jnp.array(reward), jnp.array(LOG_REF), kl_coef=ETA))


def by_length(ref):
    """ref e^(length (r - level)/eta), normalized."""

    def log_law(level):
        return ref + LENGTH * (REWARD - level) / ETA

    level = scipy.optimize.brentq(lambda x: np.exp(log_law(x)).sum() - 1, -50, 50)
    return log_law(level)


def optimum_of(divergence):
    return np.asarray(
        regularized.log_prob(
            jnp.array(REWARD), jnp.array(LOG_REF), kl_coef=ETA, divergence=divergence
        )
    )


def bind(loss, **settings):
    return functools.partial(loss, kl_coef=ETA, **settings)


ROWS = {
    "sigmoid": (bind(objectives.sigmoid), lambda: gibbs_of(REWARD), {}),
    "robust, flipped labels": (
        bind(objectives.robust, flip_rate=0.2),
        lambda: gibbs_of(REWARD),
        {"flip_rate": 0.2},
    ),
    "flipped likelihood": (
        bind(objectives.sigmoid, preference=preferences.flipped(0.2)),
        lambda: gibbs_of(REWARD),
        {"flip_rate": 0.2},
    ),
    "ties": (
        bind(objectives.sigmoid, preference=preferences.rao_kupper(1.0)),
        lambda: gibbs_of(REWARD),
        {"model": preferences.rao_kupper(1.0)},
    ),
    "davidson": (
        bind(objectives.sigmoid, preference=preferences.davidson(0.8)),
        lambda: gibbs_of(REWARD),
        {"model": preferences.davidson(0.8)},
    ),
    "cpo at 0": (
        bind(objectives.cpo, sft_coef=0.0),
        lambda: np.asarray(jax.nn.log_softmax(jnp.array(REWARD) / ETA)),
        {},
    ),
    "simpo at 0": (bind(objectives.simpo, margin=0.0), lambda: by_length(np.zeros(ACTIONS)), {}),
    "length_normalized": (bind(objectives.length_normalized), lambda: by_length(LOG_REF), {}),
    "forward_kl": (
        bind(objectives.f_divergence, divergence=fdivergence.forward_kl),
        lambda: optimum_of(fdivergence.forward_kl),
        {},
    ),
    "jensen_shannon": (
        bind(objectives.f_divergence, divergence=fdivergence.jensen_shannon),
        lambda: optimum_of(fdivergence.jensen_shannon),
        {},
    ),
    "chi_po": (bind(objectives.chi_po, clip=50.0), lambda: optimum_of(fdivergence.chi_po), {}),
    "pessimistic": (bind(objectives.pessimistic), lambda: gibbs_of(REWARD - BONUS), {}),
    "modpo": (bind(objectives.modpo, weight=0.6), lambda: gibbs_of(0.6 * REWARD + OTHER), {}),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_proper_loss_has_its_law_whoever_is_compared(name, x64):
    """Stationary at its own law under two laws of pairs; the control: not at a neighbour's."""
    loss, law, given = ROWS[name]
    names = list(ROWS)
    others = [ROWS[other][1]() for other in names]
    for pairs in PAIRS.values():
        assert slope(loss, law(), pairs, **given) < 1e-7
        apart = [x for x in others if abs(np.exp(x) - np.exp(law())).max() > 0.02]
        assert slope(loss, apart[0], pairs, **given) > 1e-4
    # Taken for Bradley-Terry's, labels with ties or flips have another minimizer.
    if given and name != "robust, flipped labels":
        assert slope(bind(objectives.sigmoid), law(), PAIRS["even"], **given) > 1e-4


@pytest.mark.parametrize(
    "loss",
    [
        bind(objectives.ipo),
        bind(objectives.sigmoid, label_smoothing=0.1),
        bind(objectives.simpo, margin=1.0),
        bind(objectives.odpo, margin_coef=1.0),
        bind(objectives.mm_dpo, growth=2.0),
        bind(objectives.rpo, sft_coef=0.3),
    ],
    ids=["ipo", "smoothed", "simpo", "odpo", "mm_dpo", "rpo"],
)
def test_others_depend_on_who_is_compared(loss, x64):
    """The minimizer of one law of pairs is no stationary point of another."""

    def of(logits, pairs):
        return population(loss, jax.nn.log_softmax(logits) - jnp.array(LOG_REF), pairs)

    both = jax.jit(jax.value_and_grad(of))
    even, uneven = (jnp.array(p) for p in PAIRS.values())
    found = scipy.optimize.minimize(
        lambda x: tuple(np.asarray(v) for v in both(jnp.array(x), even)),
        gibbs_of(REWARD),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9},
    )
    assert np.abs(both(jnp.array(found.x), even)[1]).max() < 1e-6
    assert np.abs(both(jnp.array(found.x), uneven)[1]).max() > 1e-4


def test_one_sided_losses_see_win_rates(x64):
    """Stationary in free log-ratios at what the table of the module says; rewards are not enough.

    A monotone map of the reward that leaves win rates alone there leaves the minimum alone: it is
    a function of the win rate, and Gibbs is no stationary point.
    """
    pairs = PAIRS["uneven"]
    won = 1 / (1 + np.exp(-(REWARD[:, None] - REWARD[None, :])))
    win = (pairs * won).sum(1) / pairs.sum(1)
    rows = {
        "nca": (bind(onesided.nca), np.log(2 * win) / ETA),
        "bco": (bind(onesided.bco, shift=0.3), (0.3 + np.log(win / (1 - win))) / ETA),
        "sppo": (bind(onesided.sppo), (win - 0.5) / ETA),
    }
    for name, (loss, ratio) in rows.items():
        gradient = jax.grad(lambda u, loss=loss: population(loss, u, pairs))
        np.testing.assert_allclose(gradient(jnp.array(ratio)), 0, atol=1e-12, err_msg=name)
        others = [other for key, (_, other) in rows.items() if key != name]
        for wrong in (*others, gibbs_of(REWARD) - LOG_REF):
            assert abs(gradient(jnp.array(wrong))).max() > 1e-3, name
    # KTO is APO-zero moved by its point of reference, which moves no edge.
    at = jnp.array(REWARD)
    moved = population(bind(onesided.kto, shift=0.4), at + 0.4, pairs)
    still = population(bind(onesided.apo_zero), at, pairs)
    np.testing.assert_allclose(moved, still, rtol=1e-12)
    # APO-zero is linear in sigma: further out is better for whoever wins more than it loses.
    best = int(np.argmax(win))
    further = [
        float(population(bind(onesided.apo_zero), jnp.array(x), pairs))
        for x in (np.zeros(ACTIONS), 5.0 * np.eye(ACTIONS)[best], 50.0 * np.eye(ACTIONS)[best])
    ]
    assert further == sorted(further, reverse=True)


def test_a_moving_reference_is_a_schedule_of_the_coefficient(x64):
    """T1: with soft updates of laws, round t has the Gibbs law at eta / (1 + a (t - 1))."""
    ref, share = jnp.array(LOG_REF), 0.3
    for number in range(1, 6):
        policy = gibbs.log_prob(jnp.array(REWARD), ref, kl_coef=ETA)
        want = gibbs.log_prob(
            jnp.array(REWARD), jnp.array(LOG_REF), kl_coef=ETA / (1 + share * (number - 1))
        )
        np.testing.assert_allclose(policy, want, atol=1e-12)
        ref = pairwise.moved_reference(ref, policy, share=share)


def test_the_log_ratio_of_a_strong_to_a_weak_model_is_a_reward_that_returns_it(x64):
    """CDR with eta = 1 and the weak model as reference; another eta extrapolates geometrically."""
    strong = jnp.log(jnp.array(RNG.dirichlet(np.ones(ACTIONS))))
    weak = jnp.array(LOG_REF)
    reward = gibbs.implicit_reward(strong, weak, kl_coef=1.0)
    np.testing.assert_allclose(gibbs.log_prob(reward, weak, kl_coef=1.0), strong, atol=1e-12)
    far = gibbs.log_prob(reward, weak, kl_coef=0.5)
    np.testing.assert_allclose(far, jax.nn.log_softmax(2 * strong - weak), atol=1e-12)


def test_aot_is_dpo_of_the_sorted_batch_and_weights_have_no_gradient():
    chosen, rejected = jnp.array([3.0, -1.0, 0.5]), jnp.array([0.0, 2.0, -4.0])

    def scores(chosen, rejected):
        pair = jnp.stack([chosen, rejected], -1)
        return Scores(pair - 5, jnp.full_like(pair, -5.0), jnp.full(pair.shape, 2))

    got = objectives.aot(scores(chosen, rejected), kl_coef=ETA)
    want = objectives.sigmoid(scores(jnp.sort(chosen), jnp.sort(rejected)), kl_coef=ETA)
    np.testing.assert_array_equal(got, want)

    def loss(x):
        pairs = scores(x, rejected)
        return jnp.sum(
            objectives.weighted(
                objectives.sigmoid(pairs, kl_coef=ETA), objectives.wpo_weight(pairs)
            )
        )

    weight = np.exp((np.asarray(chosen) - 5) / 2 + (np.asarray(rejected) - 5) / 2)
    np.testing.assert_allclose(objectives.wpo_weight(scores(chosen, rejected)), weight, rtol=1e-6)
    plain = jax.vmap(jax.grad(lambda c, r: objectives.sigmoid(scores(c, r), kl_coef=ETA)))(
        chosen, rejected
    )
    np.testing.assert_allclose(jax.grad(loss)(chosen), weight * plain, rtol=1e-5)


def test_optimism_is_unbounded_below_where_an_action_is_in_no_comparison(x64):
    """P5: XPO's bonus on a third action, explored and never compared; pessimism is bounded."""
    losses = {0.1: [], -0.1: []}
    for optimism, found in losses.items():
        for box in (5.0, 50.0, 500.0):
            log_prob = jax.nn.log_softmax(jnp.array([1.0, 0.0, -box]))
            pair = log_prob[:2]
            scores = Scores(pair, jnp.zeros(2), jnp.ones(2, int), exploration_log_prob=log_prob[2])
            found.append(float(objectives.exploratory(scores, kl_coef=ETA, optimism=optimism)))
    np.testing.assert_allclose(np.diff(losses[0.1]), [-4.5, -45.0], rtol=1e-2)
    assert np.diff(losses[-0.1]).min() > 0
