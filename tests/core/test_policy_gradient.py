"""Policy gradients on groups: what each choice converges to, each beside the law it must not be.

Fixed points are tested on a *group whose counts are the policy*: response numbers repeated in
proportion to pi, so that a mean over the group is the exact expectation under pi (K to infinity);
pi0 is then made such that pi is the claimed fixed point. Where K is finite by nature, all groups
are enumerated.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import fdivergence, policy_gradient, regression

ETA = 0.7
COUNTS = np.array([7, 4, 2, 6, 1])
PI = COUNTS / COUNTS.sum()
DRAWS = np.repeat(np.arange(5), COUNTS)
REWARD = np.array([0.4, -0.9, 1.2, 0.1, -0.3])
LENGTH = np.array([3, 9, 5, 2, 12])
MEAN = PI @ REWARD
DEVIATION = np.sqrt(PI @ (REWARD - MEAN) ** 2)

pytestmark = pytest.mark.usefixtures("x64")


def gibbs_ref(eta, reward=REWARD):
    """The pi0 whose Gibbs law at eta is PI."""
    ref = PI * np.exp(-(reward - reward.max()) / eta)
    return ref / ref.sum()


def forward_ref(eta):
    """The pi0 with PI = eta pi0 / (lambda - r), lambda = eta + E r."""
    ref = PI * (eta + MEAN - REWARD) / eta
    assert (ref > 0).all()
    np.testing.assert_allclose(ref.sum(), 1)
    return ref


def group_gradient(loss, ref):
    """Gradient in the logits of a loss on the group, at the policy PI."""

    def total(logits):
        log_prob = jax.nn.log_softmax(logits)[DRAWS]
        return loss(log_prob, log_prob - jnp.log(jnp.asarray(ref))[DRAWS])

    return np.asarray(jax.grad(total)(jnp.log(jnp.asarray(PI))))


def drawn():
    return jnp.asarray(REWARD)[DRAWS]


def price(member, log_ratio):
    return ETA * jnp.mean(member.surrogate(log_ratio))


def kl_in_reward(log_prob, log_ratio):
    priced = policy_gradient.regularized(drawn(), log_ratio, kl_coef=ETA)
    return policy_gradient.surrogate(log_prob, policy_gradient.leave_one_out(priced))


def k2_loss(log_prob, log_ratio):
    weight = policy_gradient.group_mean(drawn())
    member = fdivergence.reverse_kl
    return policy_gradient.surrogate(log_prob, weight) + price(member, log_ratio)


def k3_loss(log_prob, log_ratio):
    weight = policy_gradient.group_mean(drawn())
    member = fdivergence.forward_kl
    return policy_gradient.surrogate(log_prob, weight) + price(member, log_ratio)


def k2_by_std(log_prob, log_ratio):
    weight = policy_gradient.by_std(drawn())
    member = fdivergence.reverse_kl
    return policy_gradient.surrogate(log_prob, weight) + price(member, log_ratio)


def k3_by_std(log_prob, log_ratio):
    weight = policy_gradient.by_std(drawn())
    member = fdivergence.forward_kl
    return policy_gradient.surrogate(log_prob, weight) + price(member, log_ratio)


def per_length(log_prob, log_ratio):
    tokens = jnp.asarray(LENGTH, float)[DRAWS]
    weight = policy_gradient.group_mean(drawn()) / tokens
    cost = jnp.mean(fdivergence.reverse_kl.surrogate(log_ratio) / tokens)
    return policy_gradient.surrogate(log_prob, weight) + ETA * cost


def length_ref():
    """pi0 with PI = Gibbs of r + (eta KL / E len) len, found in one unknown."""
    low, high = 0.0, 2.0

    def ref_at(bonus):
        return PI * np.exp(-(REWARD + bonus * LENGTH - MEAN) / ETA)

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if ref_at(middle).sum() > 1 else (low, middle)
    ref = ref_at(low)
    kl = PI @ np.log(PI / ref)
    np.testing.assert_allclose(ETA * kl / (PI @ LENGTH), low, rtol=1e-9)
    assert low > 0.001
    return ref


# loss, the pi0 at which the policy is its fixed point, and the neighbour's, at which it is not
LAWS = {
    "KL in the reward: Gibbs": (kl_in_reward, gibbs_ref(ETA), forward_ref(2.0)),
    "k2: Gibbs": (k2_loss, gibbs_ref(ETA), gibbs_ref(ETA * DEVIATION)),
    "k2 over the deviation": (k2_by_std, gibbs_ref(ETA * DEVIATION), gibbs_ref(ETA)),
    "per length: a length bonus": (per_length, length_ref(), gibbs_ref(ETA)),
}


@pytest.mark.parametrize("name", LAWS)
def test_fixed_point_and_the_neighbour_that_is_not(name):
    loss, ref, neighbour = LAWS[name]
    np.testing.assert_allclose(group_gradient(loss, ref), 0, atol=1e-12)
    assert np.abs(group_gradient(loss, neighbour)).max() > 0.01


def test_k3_as_a_loss_leads_to_the_forward_kl_law(monkeypatch):
    monkeypatch.setitem(globals(), "ETA", 2.0)
    np.testing.assert_allclose(group_gradient(k3_loss, forward_ref(2.0)), 0, atol=1e-12)
    assert np.abs(group_gradient(k3_loss, gibbs_ref(2.0))).max() > 0.01
    # GRPO as published: the same at eta times the policy's own deviation of the reward.
    monkeypatch.setitem(globals(), "ETA", 2.0 / DEVIATION)
    np.testing.assert_allclose(group_gradient(k3_by_std, forward_ref(2.0)), 0, atol=1e-12)
    assert np.abs(group_gradient(k3_by_std, forward_ref(2.0 / DEVIATION))).max() > 0.01


def test_below_a_coefficient_k2_over_the_deviation_has_no_interior_fixed_point():
    """PI = Gibbs(tau) needs eta = tau / sd_tau; the least over tau is the least eta with one."""
    ref, reward = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    taus = np.geomspace(0.05, 1e3, 4000)
    prob = 1 / (1 + ref[1] / ref[0] * np.exp(-1 / taus))
    needed = taus / np.sqrt(prob * (1 - prob))
    least = needed.min()

    def drift(p, eta):
        """d E-loss / d logit of the better action, by the library, at K to infinity."""
        counts = np.round(np.array([p, 1 - p]) * 4000).astype(int)
        at = np.repeat(np.arange(2), counts)
        weight = policy_gradient.by_std(jnp.asarray(reward)[at])

        def loss(logit):
            log_prob = jax.nn.log_softmax(jnp.array([logit, 0.0]))[at]
            member = fdivergence.reverse_kl.surrogate(log_prob - jnp.log(0.5))
            return policy_gradient.surrogate(log_prob, weight) + eta * jnp.mean(member)

        return float(jax.grad(loss)(jnp.log(counts[0] / counts[1])))

    inside = np.linspace(0.55, 0.995, 30)
    # Below: every policy is pushed further towards the better action. Above: some are pushed back.
    assert all(drift(p, 0.9 * least) < 0 for p in inside)
    assert any(drift(p, 1.3 * least) > 0 for p in inside)


def _enumerated(loss, logits, samples):
    groups = np.array(list(itertools.product(range(len(logits)), repeat=samples)))

    def total(logits):
        log_prob = jax.nn.log_softmax(logits)
        chance = jnp.exp(jax.lax.stop_gradient(log_prob)[groups].sum(-1))
        return jnp.sum(chance * loss(log_prob[groups], groups))

    return np.asarray(jax.grad(total)(jnp.asarray(logits)))


def _pairs_by_std(reward, ref):
    def loss(log_prob, groups):
        weight = policy_gradient.by_std(jnp.asarray(reward)[groups])
        log_ratio = log_prob - jnp.log(jnp.asarray(ref))[groups]
        cost = jnp.mean(fdivergence.reverse_kl.surrogate(log_ratio), -1)
        return policy_gradient.surrogate(log_prob, weight) + ETA * cost

    return loss


def test_two_draws_over_their_deviation_learn_win_rates():
    below = (PI[None] * (REWARD[None] < REWARD[:, None])).sum(1)
    ties = (PI[None] * (REWARD[None] == REWARD[:, None])).sum(1)
    win = 2 * (below + ties / 2) - 1
    ref = gibbs_ref(ETA, win)
    at = np.log(PI)
    found = _enumerated(_pairs_by_std(REWARD, ref), at, 2)
    np.testing.assert_allclose(found, 0, atol=1e-12)
    # Invariant under a monotone map of the reward, which Gibbs is not.
    mapped = _enumerated(_pairs_by_std(np.exp(3 * REWARD), ref), at, 2)
    np.testing.assert_allclose(mapped, 0, atol=1e-12)
    assert np.abs(_enumerated(_pairs_by_std(REWARD, gibbs_ref(ETA)), at, 2)).max() > 0.01


@pytest.mark.parametrize("samples", [2, 3])
def test_kl_in_the_reward_has_the_gibbs_law_at_every_k(samples):
    def loss(log_prob, groups):
        log_ratio = log_prob - jnp.log(jnp.asarray(gibbs_ref(ETA)))[groups]
        priced = policy_gradient.regularized(jnp.asarray(REWARD)[groups], log_ratio, kl_coef=ETA)
        return policy_gradient.surrogate(log_prob, policy_gradient.leave_one_out(priced))

    np.testing.assert_allclose(_enumerated(loss, np.log(PI), samples), 0, atol=1e-12)


@pytest.mark.parametrize("member", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_priced_rewards_climb_the_regularized_objective(member):
    """E of the policy gradient is the gradient of E r - eta D_f, for any divergence."""
    record = getattr(fdivergence, member)
    ref = np.array([0.3, 0.1, 0.2, 0.25, 0.15])
    f = {
        "reverse_kl": lambda z: z * jnp.log(z),
        "forward_kl": lambda z: -jnp.log(z),
        "jensen_shannon": lambda z: z * jnp.log(z) - (z + 1) * jnp.log((z + 1) / 2),
    }[member]

    def loss(log_prob, log_ratio):
        priced = policy_gradient.regularized(drawn(), log_ratio, kl_coef=ETA, divergence=record)
        return policy_gradient.surrogate(log_prob, policy_gradient.group_mean(priced))

    def objective(logits):
        prob = jax.nn.softmax(logits)
        return prob @ REWARD - ETA * jnp.sum(ref * f(prob / ref))

    wanted = np.asarray(jax.grad(objective)(jnp.log(jnp.asarray(PI))))
    np.testing.assert_allclose(group_gradient(loss, ref), -wanted, atol=1e-12)


def test_advantages_by_hand():
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(6, 5))
    keep = rng.random((6, 5)) < 0.75
    keep[0], keep[1] = False, [True, False, False, False, False]
    reward[2] = 3.0
    x, where = jnp.asarray(np.where(keep, reward, np.nan)), jnp.asarray(keep)
    found = {
        name: np.asarray(getattr(policy_gradient, name)(x, where=where))
        for name in ("leave_one_out", "group_mean", "by_std", "by_batch_std")
    }
    kept = [reward[row][keep[row]] for row in range(6)]
    centred = np.concatenate([k - k.mean() for k in kept if len(k)])
    scale = np.sqrt((centred**2).mean())
    for row in range(6):
        group = kept[row]
        for name in found:
            assert not found[name][row][~keep[row]].any()
        if len(group) < 2:
            assert not any(found[name][row].any() for name in found)
            continue
        others = [group[i] - np.delete(group, i).mean() for i in range(len(group))]
        np.testing.assert_allclose(found["leave_one_out"][row][keep[row]], others, atol=1e-12)
        own = group - group.mean()
        np.testing.assert_allclose(found["group_mean"][row][keep[row]], own, atol=1e-12)
        np.testing.assert_allclose(found["by_batch_std"][row][keep[row]], own / scale, atol=1e-12)
        if group.std() > 1e-12:
            deviation = own / group.std()
            np.testing.assert_allclose(found["by_std"][row][keep[row]], deviation, atol=1e-12)
        else:
            assert not found["by_std"][row].any()
    np.testing.assert_array_equal(
        policy_gradient.informative(x, where=where), [len(k) > 1 and np.ptp(k) > 0 for k in kept]
    )


def test_a_group_of_equal_rewards_gives_nothing_whatever_eps():
    for eps in (0.0, 1e-4):
        weight = policy_gradient.by_std(jnp.full((1, 4), 0.1), eps=eps)
        assert not np.any(weight)


def test_the_clip_by_hand():
    rng = np.random.default_rng(1)
    ratio = np.exp(rng.normal(size=200))
    weight = rng.normal(size=200)
    found = policy_gradient.clipped(
        jnp.asarray(ratio), jnp.asarray(weight), low=0.2, high=0.3, dual=2.0
    )
    wanted = np.minimum(ratio * weight, np.clip(ratio, 0.8, 1.3) * weight)
    wanted = np.where(weight < 0, np.maximum(wanted, 2.0 * weight), wanted)
    np.testing.assert_allclose(found, -wanted, rtol=1e-12)
    assert ((weight < 0) & (ratio > 2)).any()


def test_at_the_old_policy_every_ratio_gives_the_policy_gradient():
    log_prob = jnp.asarray(np.log(PI))
    weight = jnp.asarray(REWARD)
    length = jnp.asarray(LENGTH)

    def token(p):
        ratio = policy_gradient.ratio(p, log_prob)
        return jnp.mean(policy_gradient.clipped(ratio, weight, low=0.2, high=0.2))

    def sequence(p):
        ratio = policy_gradient.sequence_ratio(p, log_prob, length)
        return jnp.mean(policy_gradient.clipped(ratio, weight, low=0.2, high=0.2))

    plain = jax.grad(lambda p: policy_gradient.surrogate(p, weight))(log_prob)
    np.testing.assert_allclose(jax.grad(token)(log_prob), plain, atol=1e-12)
    np.testing.assert_allclose(
        jax.grad(sequence)(log_prob), plain / LENGTH.astype(float), atol=1e-12
    )
    # Beyond the clip a gain has no gradient, and a loss has.
    far = log_prob + jnp.log(2.0)
    moved = jax.grad(token)(far)
    np.testing.assert_array_equal(np.asarray(moved) == 0, REWARD > 0)


def test_who_drew_is_a_constant_to_the_gradient():
    """Of the policy's own scores, handed in for those of the one that drew: 1, and not 0. And the
    price of a divergence, which is a part of the reward."""
    log_prob, length = jnp.asarray(np.log(PI)), jnp.asarray(LENGTH)
    reward = jnp.asarray(REWARD)
    price = lambda p: policy_gradient.regularized(reward, p, kl_coef=ETA).sum()  # noqa: E731
    assert not np.any(jax.grad(price)(log_prob))
    for loss in (
        lambda w: policy_gradient.surrogate(log_prob, w),
        lambda w: policy_gradient.clipped(jnp.exp(log_prob), w, low=0.2, high=0.2).sum(),
    ):
        assert not np.any(jax.grad(loss)(reward))
    slope = jax.grad(lambda p: policy_gradient.ratio(p, p).sum())(log_prob)
    np.testing.assert_allclose(slope, 1, rtol=1e-12)
    slope = jax.grad(lambda p: policy_gradient.sequence_ratio(p, p, length).sum())(log_prob)
    np.testing.assert_allclose(slope, 1 / LENGTH, rtol=1e-12)


def test_truncated_weights_are_constants_to_the_gradient():
    ratio = jnp.array([0.5, 3.0])
    np.testing.assert_allclose(policy_gradient.truncated(ratio, limit=2.0), [0.5, 2.0])
    assert not np.any(jax.grad(lambda r: policy_gradient.truncated(r, limit=2.0).sum())(ratio))


def test_means_over_tokens_by_hand():
    rng = np.random.default_rng(2)
    lengths = np.array([[3, 1, 0], [5, 5, 2]])
    where = np.arange(5) < lengths[..., None]
    value = rng.normal(size=(2, 3, 5))
    x = jnp.asarray(np.where(where, value, np.nan))
    rows = [[value[b, k, : lengths[b, k]] for k in range(3)] for b in range(2)]
    each = [np.mean([r.mean() if len(r) else 0.0 for r in row]) for row in rows]
    whole = [np.concatenate(row).mean() for row in rows]
    summed = [np.mean([r.sum() / 7 for r in row]) for row in rows]
    mask = jnp.asarray(where)
    found = policy_gradient.over_tokens(x, mask, mean="response")
    np.testing.assert_allclose(found, each, atol=1e-12)
    np.testing.assert_allclose(
        policy_gradient.over_tokens(x, mask, mean="group"), whole, atol=1e-12
    )
    found = policy_gradient.over_tokens(x, mask, mean="constant", size=7)
    np.testing.assert_allclose(found, summed, atol=1e-12)
    with pytest.raises(ValueError, match="size"):
        policy_gradient.over_tokens(x, mask, mean="group", size=7)
    with pytest.raises(ValueError, match="size"):
        policy_gradient.over_tokens(x, mask, mean="constant")


def test_consistency_is_a_set_reward_whose_gradient_is_shared_by_all():
    """COPO: G as every response's weight is the gradient of E G; all-wrong groups give 0."""
    classes = np.array([0, 1, 1, 2, 0])
    right = (classes == 1).astype(float)
    groups = np.array(list(itertools.product(range(5), repeat=3)))
    found = policy_gradient.consistency(jnp.asarray(right)[groups], jnp.asarray(classes)[groups])
    for group, value in zip(groups, np.asarray(found), strict=True):
        _, number = np.unique(classes[group], return_counts=True)
        share = number / 3
        entropy = -(share * np.log2(share)).sum()
        wanted = right[group].mean() * (1 - (1 - 1 / 3) / np.log2(3) * entropy)
        np.testing.assert_allclose(value, wanted, atol=1e-12)
    assert not np.any(np.asarray(found)[right[groups].sum(-1) == 0])

    def expected(logits):
        return jnp.sum(jnp.exp(jax.nn.log_softmax(logits)[groups].sum(-1)) * found)

    weight = jnp.broadcast_to(found[:, None], groups.shape)
    shared = _enumerated(
        lambda log_prob, _: -3 * policy_gradient.surrogate(log_prob, weight), np.log(PI), 3
    )
    np.testing.assert_allclose(shared, jax.grad(expected)(jnp.log(jnp.asarray(PI))), atol=1e-12)


def test_rloo_is_the_regression_on_the_same_group():
    """The bridge between the families, on the group's own numbers."""
    ref = np.array([0.3, 0.1, 0.2, 0.25, 0.15])

    def regress(log_prob, log_ratio):
        return ETA * regression.loss(regression.residual(log_ratio, drawn(), kl_coef=ETA))

    np.testing.assert_allclose(
        group_gradient(kl_in_reward, ref), group_gradient(regress, ref), atol=1e-12
    )


@pytest.mark.parametrize(
    ("bad", "match"),
    [({"low": 0.0}, "low"), ({"high": -0.1}, "high"), ({"dual": 0.5}, "dual")],
)
def test_clips_out_of_range_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        policy_gradient.clipped(jnp.ones(1), jnp.ones(1), **{"low": 0.2, "high": 0.2, **bad})
