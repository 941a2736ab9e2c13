"""Group regression: gradients identical sample by sample, laws by enumeration, with controls."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import fdivergence, gibbs, policy_gradient, regression

ETA = 0.7
REWARD = np.array([0.3, -0.8, 1.1, 0.0])
REF = np.log(np.array([0.4, 0.3, 0.1, 0.2]))
LOGITS = np.array([0.5, -0.2, 0.1, 0.9])
MEMBERS = {
    "reverse_kl": fdivergence.reverse_kl,
    "forward_kl": fdivergence.forward_kl,
    "jensen_shannon": fdivergence.jensen_shannon,
    "alpha": fdivergence.alpha(0.5),
}

pytestmark = pytest.mark.usefixtures("x64")


def _numpy_f(name, z):
    """f of D_f(pi || q) = E_q f(pi/q), written out."""
    if name == "reverse_kl":
        return z * jnp.log(z)
    if name == "forward_kl":
        return -jnp.log(z)
    if name == "jensen_shannon":
        return z * jnp.log(z) - (z + 1) * jnp.log((z + 1) / 2)
    a = 0.5
    return (z ** (1 - a) - (1 - a) * z - a) / (a * (a - 1))


def _expected_gradient(per_group, logits, samples, law=None):
    """Gradient in the logits of E over all groups of `samples` draws of ``law`` (held fixed)."""
    groups = np.array(list(itertools.product(range(len(logits)), repeat=samples)))

    def total(logits):
        log_prob = jax.nn.log_softmax(logits)
        drawn = jax.lax.stop_gradient(log_prob) if law is None else law
        chance = jnp.exp(drawn[groups].sum(-1))
        return jnp.sum(chance * per_group(log_prob[groups], groups))

    return jax.grad(total)(jnp.asarray(logits))


def _delta(log_prob, groups):
    return regression.residual(
        log_prob - jnp.asarray(REF)[groups], jnp.asarray(REWARD)[groups], kl_coef=ETA
    )


def _optimum():
    return gibbs.log_prob(jnp.asarray(REWARD), jnp.asarray(REF), kl_coef=ETA)


def test_prdp_vargrad_and_rloo_are_one_gradient_sample_by_sample():
    rng = np.random.default_rng(0)
    log_prob, ref, reward = (jnp.asarray(rng.normal(size=(5, 6))) for _ in range(3))
    where = jnp.asarray(rng.random((5, 6)) < 0.8)

    def rloo(log_prob):
        priced = policy_gradient.regularized(reward, log_prob - ref, kl_coef=ETA)
        weight = policy_gradient.leave_one_out(priced, where=where)
        return policy_gradient.surrogate(log_prob, weight, where=where).sum() / ETA

    def vargrad(log_prob):
        delta = regression.residual(log_prob - ref, reward, kl_coef=ETA)
        return regression.loss(delta, where=where).sum()

    def prdp(log_prob):
        # Over pairs, as eq. 10 of the paper writes it.
        delta = regression.residual(log_prob - ref, reward, kl_coef=ETA)
        both = where[:, :, None] & where[:, None] & ~jnp.eye(6, dtype=bool)[None]
        square = jnp.where(both, (delta[:, :, None] - delta[:, None]) ** 2, 0)
        return (square.sum((1, 2)) / both.sum((1, 2), dtype=square.dtype)).sum() / 4

    first, second, third = (jax.grad(f)(log_prob) for f in (rloo, vargrad, prdp))
    np.testing.assert_allclose(first, second, atol=1e-12)
    np.testing.assert_allclose(second, third, atol=1e-12)
    assert float(jnp.abs(second).max()) > 0.1

    # The group's own mean as the baseline (GRPO's) is (K - 1) / K of it, and so another number.
    def own_mean(log_prob):
        priced = policy_gradient.regularized(reward, log_prob - ref, kl_coef=ETA)
        weight = policy_gradient.group_mean(priced, where=where)
        return policy_gradient.surrogate(log_prob, weight, where=where).sum() / ETA

    count = np.asarray(where).sum(-1, keepdims=True).astype(float)
    np.testing.assert_allclose(
        jax.grad(own_mean)(log_prob), first * (count - 1) / count, atol=1e-12
    )


def test_pairs_by_hand():
    rng = np.random.default_rng(1)
    delta = rng.normal(size=5)
    keep = np.array([True, True, False, True, True])
    kept = delta[keep]
    pairs = [(a - b) ** 2 for a, b in itertools.permutations(kept, 2)]
    half = regression.loss(jnp.asarray(delta), where=jnp.asarray(keep))
    np.testing.assert_allclose(half, np.mean(pairs) / 4, rtol=1e-12)
    np.testing.assert_allclose(half, np.var(kept, ddof=1) / 2, rtol=1e-12)


@pytest.mark.parametrize("name", MEMBERS)
def test_on_policy_gradient_is_that_of_the_divergence_to_the_optimum(name):
    log_z = float(gibbs.free_energy(jnp.asarray(REWARD), jnp.asarray(REF), kl_coef=ETA)) / ETA
    offset = jnp.full((len(LOGITS),), -log_z)

    def loss(log_prob, groups):
        return regression.loss(_delta(log_prob, groups), divergence=MEMBERS[name], offset=offset)

    target = jnp.exp(_optimum())

    def exact(logits):
        ratio = jax.nn.softmax(logits) / target
        return jnp.sum(target * _numpy_f(name, ratio))

    wanted = jax.grad(exact)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(_expected_gradient(loss, LOGITS, 1), wanted, atol=1e-10)
    # Off-policy it is another gradient ...
    elsewhere = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    other = _expected_gradient(loss, LOGITS, 1, law=elsewhere)
    assert float(jnp.abs(other - wanted).max()) > 0.01
    # ... with the same minimum, the Gibbs law, and not pi0.
    at_optimum = _expected_gradient(loss, np.asarray(_optimum()), 1, law=elsewhere)
    np.testing.assert_allclose(at_optimum, 0, atol=1e-10)
    assert float(jnp.abs(_expected_gradient(loss, REF, 1, law=elsewhere)).max()) > 0.01


@pytest.mark.parametrize("name", MEMBERS)
def test_with_its_own_normalizer_the_minimum_is_gibbs(name):
    def loss(log_prob, groups):
        return regression.loss(_delta(log_prob, groups), divergence=MEMBERS[name])

    np.testing.assert_allclose(_expected_gradient(loss, np.asarray(_optimum()), 3), 0, atol=1e-9)
    assert float(jnp.abs(_expected_gradient(loss, REF, 3)).max()) > 0.01


def test_fitted_mean_leaves_the_gradient_unbiased():
    def loss(log_prob, groups):
        return regression.loss(_delta(log_prob, groups))

    target = jnp.exp(_optimum())

    def exact(logits):
        log_prob = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_prob) * (log_prob - jnp.log(target)))

    wanted = jax.grad(exact)(jnp.asarray(LOGITS))
    for samples in (2, 3):
        np.testing.assert_allclose(_expected_gradient(loss, LOGITS, samples), wanted, atol=1e-12)


@pytest.mark.parametrize("name", MEMBERS)
def test_normalizer_is_the_root_of_the_mean_link(name):
    rng = np.random.default_rng(2)
    delta = jnp.asarray(rng.normal(size=(7, 5)))
    where = jnp.asarray(rng.random((7, 5)) < 0.7).at[0].set(False)
    centre = regression.log_normalizer(delta, divergence=MEMBERS[name], where=where)
    links = MEMBERS[name].link(delta - centre[:, None])
    np.testing.assert_allclose(jnp.sum(jnp.where(where, links, 0), -1), 0, atol=1e-10)
    assert float(centre[0]) == 0
    if name == "forward_kl":
        kept = np.asarray(where[1])
        wanted = -np.log(np.mean(np.exp(-np.asarray(delta[1])[kept])))
        np.testing.assert_allclose(centre[1], wanted, rtol=1e-9)


def test_one_response_or_copies_of_one_teach_nothing_without_an_offset():
    one = jnp.array([[2.0]])
    copies = jnp.full((1, 4), 2.0)
    for delta in (one, copies):
        value, gradient = jax.value_and_grad(lambda d: regression.loss(d).sum())(delta)
        assert float(value) == 0
        assert not np.any(gradient)
    with_offset = regression.loss(one, offset=jnp.array([0.0]))
    assert float(with_offset[0]) == 2.0


def test_quantile_rewards_have_a_known_normalizer_and_ties_do_not():
    for eta in (0.05, 0.5, 3.0):
        grid = (np.arange(200_000) + 0.5) / 200_000
        shift = 1 / eta
        log_z = shift + math.log(np.mean(np.exp(grid / eta - shift)))
        np.testing.assert_allclose(regression.uniform_offset(eta), -log_z, rtol=1e-6)
    # A reward of two atoms: the quantile is 1/4 or 3/4, and Z is another number.
    reward = jnp.array([0.0, 1.0])
    ranks = regression.quantile(reward, reward)
    np.testing.assert_allclose(ranks, [0.25, 0.75])
    log_z = float(jnp.log(jnp.mean(jnp.exp(ranks / 0.5))))
    assert abs(log_z + float(regression.uniform_offset(0.5))) > 0.02


def test_listwise_is_bradley_terry_on_pairs_and_has_no_minimum():
    log_prob = jnp.log(jnp.array([0.5, 0.2, 0.3]))
    winner = jnp.array([1.0, 0.0])
    pair = regression.listwise(log_prob[:2], winner)
    np.testing.assert_allclose(pair, -jax.nn.log_sigmoid(log_prob[0] - log_prob[1]), rtol=1e-12)
    target = jnp.array([2.0, 0.0, 1.0])
    by_hand = -(2 / 3 * math.log(0.5) + 1 / 3 * math.log(0.3))
    np.testing.assert_allclose(regression.listwise(log_prob, target), by_hand, rtol=1e-12)
    # The farther the winner's logit, the smaller the loss, without end.
    far = [float(regression.listwise(jnp.array([s, 0.0]), winner)) for s in (0.0, 5.0, 20.0)]
    assert far[0] > far[1] > far[2] > 0
    # A masked response is deleted, in value and gradient; no target mass is no loss.
    keep = jnp.array([True, True, False])
    masked = jax.grad(lambda p: regression.listwise(p, jnp.array([1.0, 0, 5.0]), where=keep))
    plain = jax.grad(lambda p: regression.listwise(p, winner))
    np.testing.assert_allclose(masked(log_prob)[:2], plain(log_prob[:2]), rtol=1e-12)
    assert float(masked(log_prob)[2]) == 0
    assert float(regression.listwise(log_prob, jnp.zeros(3))) == 0


def test_proximal_takes_the_gradient_away_only_where_the_step_would_gain():
    reward, old = jnp.array([4.0, 0.0]), jnp.zeros(2)

    def loss(log_ratio):
        return regression.loss(regression.residual(log_ratio, reward, kl_coef=1.0))

    def clipped(log_ratio):
        return regression.proximal(loss, log_ratio, old, clip=0.5)

    inside, gaining, losing = jnp.array([0.3, 0.0]), jnp.array([2.0, 0.0]), jnp.array([-2.0, 0.0])
    np.testing.assert_allclose(jax.grad(clipped)(inside), jax.grad(loss)(inside))
    np.testing.assert_allclose(clipped(gaining), loss(jnp.array([0.5, 0.0])))
    assert float(jax.grad(clipped)(gaining)[0]) == 0
    np.testing.assert_allclose(jax.grad(clipped)(losing), jax.grad(loss)(losing))
    assert float(jnp.abs(jax.grad(loss)(losing)).max()) > 1


@pytest.mark.parametrize("eta", [0.0, -1.0, float("nan")])
def test_a_coefficient_that_is_not_positive_is_refused(eta):
    with pytest.raises(ValueError, match="kl_coef"):
        regression.residual(jnp.zeros(2), jnp.zeros(2), kl_coef=eta)
    with pytest.raises(ValueError, match="kl_coef"):
        regression.uniform_offset(eta)
