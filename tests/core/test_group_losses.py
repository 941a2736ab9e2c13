"""Named losses on groups: by hand, by the families' own pieces, and by their laws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import fdivergence, gibbs, policy_gradient, regression
from jax_klrlhf.core import group_losses as groups

RNG = np.random.default_rng(0)
SHAPE = (3, 4, 5)
LENGTH = RNG.integers(1, 6, SHAPE[:2])
WHERE = np.arange(5) < LENGTH[..., None]
CURRENT, OLD, REF = (-RNG.exponential(size=SHAPE) for _ in range(3))
REWARD = RNG.normal(size=SHAPE[:2])

pytestmark = pytest.mark.usefixtures("x64")


def group(current=None, **changes):
    """What stands at padding is NaN, so that reading it shows."""
    token = lambda x: jnp.where(jnp.asarray(WHERE), jnp.asarray(x), jnp.nan)  # noqa: E731
    whole = groups.Group(
        token_log_prob=token(CURRENT if current is None else current),
        reward=jnp.asarray(REWARD),
        token_where=jnp.asarray(WHERE),
        ref_token_log_prob=token(REF),
        old_token_log_prob=token(OLD),
    )
    return whole._replace(**changes)


def _summed(x):
    return np.where(WHERE, x, 0).sum(-1)


def _clipped_by_hand(advantage, low, high, ratio, penalty):
    wanted = np.zeros(SHAPE)
    for index in np.ndindex(SHAPE):
        rho, a = ratio[index], advantage[index[:2]]
        wanted[index] = -min(rho * a, min(max(rho, 1 - low), 1 + high) * a) + penalty[index]
    return wanted


def _mean_by_hand(term, mean, size=None):
    found = []
    for b in range(SHAPE[0]):
        rows = [term[b, k, : LENGTH[b, k]] for k in range(SHAPE[1])]
        if mean == "response":
            found.append(np.mean([row.mean() for row in rows]))
        elif mean == "group":
            found.append(np.concatenate(rows).mean())
        else:
            found.append(np.mean([row.sum() / size for row in rows]))
    return found


def test_grpo_dr_grpo_dapo_and_gspo_by_hand():
    centred = REWARD - REWARD.mean(-1, keepdims=True)
    over = centred / (REWARD.std(-1, keepdims=True) + 1e-4)
    ratio = np.exp(CURRENT - OLD)
    u = CURRENT - REF
    k3, none = 0.3 * (np.exp(-u) - 1 + u), np.zeros(SHAPE)
    sequence = np.exp((_summed(CURRENT) - _summed(OLD)) / LENGTH)[..., None] * np.ones(SHAPE)
    for loss, wanted in (
        (
            groups.grpo(kl_coef=0.3),
            _mean_by_hand(_clipped_by_hand(over, 0.2, 0.2, ratio, k3), "response"),
        ),
        (
            groups.dr_grpo(size=7, kl_coef=0.3),
            _mean_by_hand(_clipped_by_hand(centred, 0.2, 0.2, ratio, k3), "constant", 7),
        ),
        (
            groups.dapo(),
            _mean_by_hand(_clipped_by_hand(over, 0.2, 0.28, ratio, none), "group"),
        ),
        (
            groups.gspo(),
            _mean_by_hand(_clipped_by_hand(over, 3e-4, 4e-4, sequence, none), "response"),
        ),
    ):
        np.testing.assert_allclose(loss(group()), wanted, rtol=1e-9)


@pytest.mark.parametrize(
    "loss",
    [groups.regression(kl_coef=0.3), groups.regression(kl_coef=0.3, clip=0.5),
     groups.rloo(kl_coef=0.3), groups.grpo(kl_coef=0.3), groups.gspo(low=0.5, high=5.0),
     groups.qrpo(kl_coef=0.3), groups.dr_grpo(size=5, kl_coef=0.3), groups.dapo()],
)  # fmt: skip
def test_gradients_are_finite_and_zero_at_padding(loss):
    tokens = jnp.where(jnp.asarray(WHERE), jnp.asarray(CURRENT), jnp.nan)
    gradient = jax.grad(lambda t: loss(group()._replace(token_log_prob=t)).sum())(tokens)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~WHERE].any()
    assert np.abs(gradient).max() > 1e-3


def test_rloo_is_the_regression_times_its_coefficient():
    tokens = jnp.asarray(CURRENT)

    def gradient(loss):
        return jax.grad(lambda t: loss(group(t)).sum())(tokens)

    first = gradient(groups.rloo(kl_coef=0.3))
    second = gradient(groups.regression(kl_coef=0.3))
    np.testing.assert_allclose(first, 0.3 * second, atol=1e-12)


def test_masked_responses_are_deleted():
    """In every loss: a mean over responses divides by those that count."""
    keep = np.array([True, False, True, True])
    classes = jnp.asarray([[0, 1, 0, 1], [0, 2, 1, 2], [3, 3, 3, 3]])
    every = group(classes=classes, importance=jnp.asarray(RNG.uniform(0.5, 2.0, SHAPE[:2])))
    fewer = jax.tree.map(lambda x: x[:, keep], every)
    where = jnp.broadcast_to(jnp.asarray(keep), SHAPE[:2])
    for loss in (
        groups.regression(kl_coef=0.3),
        groups.regression(kl_coef=0.3, divergence=fdivergence.forward_kl, clip=0.5),
        groups.rloo(kl_coef=0.3),
        groups.rebel(kl_coef=0.3),
        groups.f_dpg(kl_coef=0.3),
        groups.gdc(kl_coef=0.3),
        groups.qrpo(kl_coef=0.3),
        groups.grpo(kl_coef=0.3),
        groups.dr_grpo(size=5, kl_coef=0.3),
        groups.reinforce_pp(kl_coef=0.3),
        groups.dapo(),
        groups.gspo(),
        groups.copo(threshold=0.8, sharpness=2.0),
    ):
        np.testing.assert_allclose(loss(every._replace(where=where)), loss(fewer), rtol=1e-9)


def _fixed_point(loss, at, reward, ref, samples):
    """The expected gradient in the logits over all groups of draws of ``at``."""
    drawn = np.array(list(itertools.product(range(len(at)), repeat=samples)))

    def total(logits):
        log_prob = jax.nn.log_softmax(logits)
        old = jax.lax.stop_gradient(log_prob)
        chance = jnp.exp(old[drawn].sum(-1))
        made = groups.from_actions(
            log_prob[drawn],
            jnp.asarray(reward)[drawn],
            ref_log_prob=jnp.asarray(ref)[drawn],
            old_log_prob=old[drawn],
        )
        return jnp.sum(chance * loss(made))

    return np.asarray(jax.grad(total)(jnp.asarray(at)))


def test_laws_on_a_bandit():
    ref = np.log(np.array([0.5, 0.3, 0.2]))
    reward = np.array([0.2, -0.5, 0.9])
    optimum = np.asarray(gibbs.log_prob(jnp.asarray(reward), jnp.asarray(ref), kl_coef=0.6))
    low, high = reward.max() + 1e-9, reward.max() + 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if (0.6 * np.exp(ref) / (middle - reward)).sum() > 1 else (low, middle)
        )
    forward = np.log(0.6 * np.exp(ref) / (low - reward))
    gibbs_losses = [
        groups.rloo(kl_coef=0.6),
        groups.regression(kl_coef=0.6),
        groups.regression(kl_coef=0.6, divergence=fdivergence.forward_kl),
    ]
    for loss in gibbs_losses:
        np.testing.assert_allclose(_fixed_point(loss, optimum, reward, ref, 3), 0, atol=1e-9)
        assert np.abs(_fixed_point(loss, forward, reward, ref, 3)).max() > 0.005
    # Dr. GRPO's own mean is (K - 1) / K of the baseline, so its coefficient grows by K / (K - 1).
    k3 = groups.dr_grpo(size=1, kl_coef=0.6 * 2 / 3)
    np.testing.assert_allclose(_fixed_point(k3, forward, reward, ref, 3), 0, atol=1e-9)
    assert np.abs(_fixed_point(k3, optimum, reward, ref, 3)).max() > 0.005
    # DAPO has no KL: even at pi0 the better action gains.
    assert _fixed_point(groups.dapo(), ref, reward, ref, 3)[2] < -0.01


def test_importance_weights_multiply_the_advantage():
    weight = jnp.asarray(RNG.uniform(0.5, 2.0, SHAPE[:2]))
    priced = policy_gradient.regularized(jnp.asarray(REWARD), group().log_ratio, kl_coef=0.3)
    wanted = -(policy_gradient.leave_one_out(priced) * weight * _summed(CURRENT)).mean(-1)
    np.testing.assert_allclose(groups.rloo(kl_coef=0.3)(group(importance=weight)), wanted)


def test_what_is_missing_is_named():
    bare = group(ref_token_log_prob=None, old_token_log_prob=None)
    with pytest.raises(ValueError, match="ref_token_log_prob is None"):
        groups.rloo(kl_coef=0.3)(bare)
    with pytest.raises(ValueError, match="old_token_log_prob is None"):
        groups.dapo()(bare)
    for make in (groups.rloo, groups.regression, groups.grpo, groups.qrpo):
        with pytest.raises(ValueError, match="kl_coef"):
            make(kl_coef=-0.1)


def test_qrpo_on_a_fine_grid_is_gibbs_of_the_quantile_with_one_response_each():
    size = 4000
    ref = np.full(size, -np.log(size))
    rank = (np.arange(size) + 0.5) / size
    optimum = np.asarray(gibbs.log_prob(jnp.asarray(rank), jnp.asarray(ref), kl_coef=0.4))
    made = groups.from_actions(
        jnp.asarray(optimum)[:, None], jnp.asarray(rank)[:, None],
        ref_log_prob=jnp.asarray(ref)[:, None],
    )  # fmt: skip
    np.testing.assert_allclose(groups.qrpo(kl_coef=0.4)(made), 0, atol=1e-12)
    assert regression.uniform_offset(0.4) < 0


ETA = 0.6
PI0 = np.array([0.5, 0.3, 0.2])
WORTH = np.array([0.2, 1.0, -0.4])
PI = np.array([0.25, 0.35, 0.4])
DRAWER = np.array([0.4, 0.35, 0.25])
TARGET = PI0 * np.exp(WORTH / ETA)


def expected(loss, samples, drawer=DRAWER):
    """Gradient in the logits at PI, in expectation over every group that the drawer may draw."""
    groups_of = np.array(list(itertools.product(range(3), repeat=samples)))
    weight = jnp.asarray(np.prod(drawer[groups_of], -1))
    at = lambda x: jnp.asarray(x)[groups_of]  # noqa: E731

    def total(logits):
        made = groups.from_actions(
            jax.nn.log_softmax(logits)[groups_of],
            at(WORTH),
            ref_log_prob=at(np.log(PI0)),
            old_log_prob=at(np.log(drawer)),
        )
        return jnp.sum(weight * loss(made))

    return np.asarray(jax.grad(total)(jnp.log(jnp.asarray(PI))))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_f_dpg_off_policy_is_the_gradient_of_its_divergence(name):
    """With Z known, from another's draws, for any K; the neighbour's gradient is another one."""
    members = {n: getattr(fdivergence, n) for n in ("reverse_kl", "forward_kl", "jensen_shannon")}
    log_z = float(np.log(TARGET.sum()))

    def of(member):
        def divergence(logits):
            law = jax.nn.log_softmax(logits)
            return fdivergence.categorical(
                law, jnp.log(jnp.asarray(TARGET / TARGET.sum())), divergence=member
            )

        return np.asarray(jax.grad(divergence)(jnp.log(jnp.asarray(PI))))

    loss = groups.f_dpg(kl_coef=ETA, divergence=members[name], log_normalizer=log_z)
    for samples in (2, 3):
        np.testing.assert_allclose(expected(loss, samples), of(members[name]), atol=1e-12)
    other = "forward_kl" if name == "reverse_kl" else "reverse_kl"
    assert np.abs(of(members[name]) - of(members[other])).max() > 1e-2


def test_f_dpg_takes_its_normalizer_from_the_mean_over_the_group():
    one = jax.tree.map(lambda x: x[:1], group())
    weight = REWARD / ETA + _summed(REF) - _summed(OLD)
    log_z = float(np.log(np.exp(weight[0]).mean()))
    for member in (fdivergence.forward_kl, fdivergence.jensen_shannon):
        loss = functools.partial(groups.f_dpg, kl_coef=ETA, divergence=member)
        known = loss(log_normalizer=log_z)(one)
        np.testing.assert_allclose(loss()(one), known, rtol=1e-10)
        assert abs(loss(log_normalizer=log_z + 1)(one) - known) > 1e-3


def test_f_dpg_of_reverse_kl_on_policy_is_rloo_over_eta():
    own = groups.f_dpg(kl_coef=ETA, divergence=fdivergence.reverse_kl)
    np.testing.assert_allclose(
        ETA * expected(own, 3, PI), expected(groups.rloo(kl_coef=ETA), 3, PI), atol=1e-12
    )


def test_gdc_nears_the_forward_kl_as_the_group_grows():
    """F5: self-normalized weights of few draws are too even. The law is the limit's."""
    wanted = PI - TARGET / TARGET.sum()  # of -E_p log pi in the logits
    sizes = [np.linalg.norm(expected(groups.gdc(kl_coef=ETA), k) - wanted) for k in (2, 3, 5, 7)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.4 * sizes[0]
    # One draw says nothing of rewards: it is the likelihood of whoever drew.
    np.testing.assert_allclose(expected(groups.gdc(kl_coef=ETA), 1), PI - DRAWER, atol=1e-12)


def test_an_importance_of_two_is_a_second_copy():
    """To GDC, whose weights are normalized over the group."""
    twice = jnp.asarray([0, 0, 1, 2, 3])
    copies = jax.tree.map(lambda x: x[:, twice], group())
    weight = jnp.broadcast_to(jnp.asarray([2.0, 1.0, 1.0, 1.0]), SHAPE[:2])
    loss = groups.gdc(kl_coef=ETA)
    np.testing.assert_allclose(loss(group(importance=weight)), loss(copies), rtol=1e-12)
    assert np.abs(loss(group()) - loss(copies)).min() > 1e-4


def test_one_exact_step_of_rebel_is_mirror_ascent_from_who_drew():
    step = DRAWER * np.exp(WORTH / ETA)
    made = groups.from_actions(
        jnp.log(jnp.asarray(step / step.sum())), jnp.asarray(WORTH),
        ref_log_prob=jnp.log(jnp.asarray(PI0)), old_log_prob=jnp.log(jnp.asarray(DRAWER)),
    )  # fmt: skip
    assert abs(float(groups.rebel(kl_coef=ETA)(made))) < 1e-12
    assert float(groups.regression(kl_coef=ETA)(made)) > 1e-3  # that one's reference is pi0


def test_kl_in_the_reward_is_priced_before_the_advantage():
    """REINFORCE++ on one-token groups near the drawing policy, whose price it is, by hand."""
    rng = np.random.default_rng(3)
    reward, log_prob, ref = rng.normal(size=(3, 4)), *(-rng.exponential(size=(2, 3, 4)))
    old = log_prob + rng.uniform(-0.3, 0.3, (3, 4))
    priced = reward - ETA * (old - ref)
    centred = priced - priced.mean(-1, keepdims=True)
    advantage = centred / (np.sqrt(np.mean(centred**2)) + 1e-4)

    def total(x):
        made = groups.from_actions(
            x, jnp.asarray(reward), ref_log_prob=jnp.asarray(ref),
            old_log_prob=jnp.asarray(old),
        )  # fmt: skip
        return groups.reinforce_pp(kl_coef=ETA, clip=0.5)(made).sum()

    wanted = -np.exp(log_prob - old) * advantage / 4
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(log_prob)), wanted, atol=1e-12)


def test_copo_blends_by_how_much_answers_differ():
    """All agreeing: the group's shared weight alone; all different: GRPO's own, in the limit."""
    rng = np.random.default_rng(4)
    reward = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    classes = jnp.array([[7, 7, 7, 7], [0, 1, 2, 3]])
    log_prob = jnp.asarray(-rng.exponential(size=(2, 4)))
    made = groups.from_actions(log_prob, jnp.asarray(reward), old_log_prob=log_prob)

    def gradient(loss, group):
        return jax.grad(lambda x: loss(group._replace(token_log_prob=x[..., None])).sum())(log_prob)

    loss = groups.copo(threshold=1.0, sharpness=1000.0)
    found = gradient(loss, made._replace(classes=classes))
    shared = np.array([1.0, 0.5 * (1 - 0.75 / 2 * 2)])  # mean reward (1 - lambda H2)
    over = (shared[0] - shared.mean()) / (shared.std() + 1e-4)
    np.testing.assert_allclose(found[0], np.full(4, -over / 4), rtol=1e-9)
    own = groups.clipped(
        advantage=lambda r, where: policy_gradient.by_std(r, where=where, eps=1e-4),
        low=0.2, high=0.2, mean="response",
    )  # fmt: skip
    np.testing.assert_allclose(found[1], gradient(own, made)[1], rtol=1e-9)
    assert not np.asarray(gradient(own, made)[0]).any()  # alone, it says nothing to who all agree
    with pytest.raises(ValueError, match=r"Group\.classes is None"):
        loss(made)
