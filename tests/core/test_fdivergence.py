"""Divergences as values: their functions against their generators, the optimum, F1 to F3."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

from jax_klrlhf.core import divergence, fdivergence, gibbs, regularized
from jax_klrlhf.core.fdivergence import FDivergence

ETA = 0.4


def of_alpha(a):
    return lambda z: (z - 1) / a - (z ** (1 - a) - 1) / (a * (1 - a))


# Each member with its generator f, in NumPy.
MEMBERS = {
    "reverse_kl": (fdivergence.reverse_kl, lambda z: z * np.log(z) - z + 1),
    "forward_kl": (fdivergence.forward_kl, lambda z: z - 1 - np.log(z)),
    "jensen_shannon": (
        fdivergence.jensen_shannon,
        lambda z: z * np.log(z) - (z + 1) * np.log((z + 1) / 2),
    ),
    "alpha": (fdivergence.alpha(0.5), of_alpha(0.5)),
    "chi_po": (fdivergence.chi_po, lambda z: (z - 1) ** 2 / 2 + z * np.log(z) - z + 1),
}
# What has no place among them: f'(0) is finite.
CHI_SQUARE = FDivergence(
    link=lambda u: jnp.exp(u) - 1,
    inverse=lambda v: jnp.log1p(v),
    surrogate=lambda u: jnp.exp(u) - 1 - u,
    value=lambda u: 2 * jnp.sinh(u / 2) ** 2,
    supremum=math.inf,
    at_zero=0.5,
)


@pytest.fixture(params=MEMBERS)
def member(request):
    return MEMBERS[request.param]


def test_functions_follow_from_the_generator(member, x64):
    """Link by differences of f, surrogate by quadrature of the link, value and limits by f."""
    found, f = member
    u = np.array([-6.0, -2.0, -0.49, -0.2, 0.2, 0.49, 0.51, 2.0, 6.0])
    z = np.exp(u)
    x = jnp.array(u)
    slope = (f(z * (1 + 1e-6)) - f(z * (1 - 1e-6))) / (2e-6 * z)
    np.testing.assert_allclose(found.link(x), slope, rtol=1e-6, atol=1e-9)
    area = [
        scipy.integrate.quad(lambda s: float(found.link(jnp.array(s))), 0, b)[0] for b in u[::3]
    ]
    np.testing.assert_allclose(found.surrogate(x[::3]), area, rtol=1e-9)
    np.testing.assert_allclose(found.value(x), f(z) / z, rtol=1e-9)
    np.testing.assert_allclose(found.inverse(found.link(x)), u, rtol=1e-9)
    assert found.link(jnp.array(0.0)) == found.surrogate(jnp.array(0.0)) == 0
    tiny = 1e-200
    assert found.at_zero == pytest.approx(f(tiny), rel=1e-9) or f(tiny) > 400
    largest = float(found.link(jnp.array(29.0)))
    assert found.supremum == pytest.approx(largest, rel=1e-5) or largest > 20


def test_gradients_are_the_link_its_inverse_and_finite_everywhere(member, x64):
    found, _ = member
    u = jnp.array([-25.0, -3.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 3.0, 25.0])
    by_surrogate = jax.vmap(jax.grad(found.surrogate))(u)
    np.testing.assert_allclose(by_surrogate, found.link(u), rtol=1e-10, atol=1e-15)
    inner = u[1:-1]
    slope = jax.vmap(jax.grad(found.link))(inner)
    back = jax.vmap(jax.grad(found.inverse))(found.link(inner))
    np.testing.assert_allclose(back * slope, 1, rtol=1e-9)
    assert np.isfinite(jax.vmap(jax.grad(found.value))(u)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_values_are_never_negative_and_keep_their_digits_near_equality(member, dtype, x64):
    found, f = member
    # f''(1)/2 u^2 to first order; every f here is smooth, so 1e-4 leaves 1e-4 relative.
    u = jnp.array([1e-4, -1e-4], dtype)
    bend = (f(1.001) + f(0.999)) / 1e-6
    for function in (found.value, found.surrogate):
        got = function(u)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, bend / 2 * np.float64(u) ** 2, rtol=1e-2)
        assert (function(jnp.linspace(-1, 1, 2001).astype(dtype)) >= 0).all()


def laws(seed, actions=6):
    rng = np.random.default_rng(seed)
    weight = rng.exponential(size=(2, 3, actions))
    p, q = weight / weight.sum(-1, keepdims=True)
    return rng.normal(size=(3, actions)), p, q


def test_categorical_is_its_definition_where_either_law_has_zeros(member, x64):
    found, f = member
    _, p, q = laws(0)
    p[1, 2] = q[1, 4] = 0
    p[2] = [1 - 1e-30, 1e-30, 0, 0, 0, 0]
    for row in (0, 1, 2):
        want = 0.0
        for a, b in zip(p[row], q[row], strict=True):
            alone = found.supremum * a if a > 0 else 0.0
            want += b * f(a / b) if a > 0 and b > 0 else (found.at_zero * b if b > 0 else alone)
        with np.errstate(divide="ignore"):
            logs = jnp.log(jnp.array(p[row])), jnp.log(jnp.array(q[row]))
        got, slopes = jax.value_and_grad(
            lambda *x: fdivergence.categorical(*x, divergence=found), (0, 1)
        )(*logs)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        assert np.isfinite(np.stack(slopes)).all()


def test_members_meet_at_the_ends_of_alpha_and_are_the_estimators(x64):
    u = jnp.linspace(-3, 3, 13)
    near = {0: fdivergence.alpha(1e-6), 1: fdivergence.alpha(1 - 1e-6)}
    for order, end in enumerate((fdivergence.reverse_kl, fdivergence.forward_kl)):
        assert fdivergence.alpha(order) is end
        for name in ("link", "surrogate", "value"):
            got, want = getattr(near[order], name)(u), getattr(end, name)(u)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-9, err_msg=name)
    np.testing.assert_array_equal(divergence.k2(u), fdivergence.reverse_kl.surrogate(u))
    for k3 in (fdivergence.reverse_kl.value, fdivergence.forward_kl.surrogate):
        np.testing.assert_array_equal(divergence.k3(u), k3(u))


def test_f2_the_surrogate_has_the_gradient_of_the_divergence_and_value_its_value(member, x64):
    """On samples of pi, exact expectations; the control is the gradient of the other estimator."""
    found, _ = member
    _, _, q = laws(1)
    logits, log_q = jnp.array([0.3, -1.0, 0.8, 0.1, 0.0, -0.4]), jnp.log(jnp.array(q[0]))

    def of_samples(estimator, logits):
        log_p = jax.nn.log_softmax(logits)
        return jax.lax.stop_gradient(jnp.exp(log_p)) @ estimator(log_p - log_q)

    def exact(logits):
        return fdivergence.categorical(jax.nn.log_softmax(logits), log_q, divergence=found)

    np.testing.assert_allclose(of_samples(found.value, logits), exact(logits), rtol=1e-12)
    got, other = (
        jax.grad(of_samples, 1)(estimator, logits) for estimator in (found.surrogate, found.value)
    )
    want = jax.grad(exact)(logits)
    np.testing.assert_allclose(got, want, atol=1e-14)
    assert abs(other - want).max() > 1e-2


def test_f3_the_optimum_is_the_best_and_inverts_the_implicit_reward(member, x64):
    found, _ = member
    reward, p, q = laws(2)
    reward, log_q = jnp.array(reward), jnp.log(jnp.array(q))
    given = {"kl_coef": ETA, "divergence": found}
    optimum = regularized.log_prob(reward, log_q, **given)
    np.testing.assert_allclose(jnp.exp(optimum).sum(-1), 1, rtol=1e-14)
    back = regularized.implicit_reward(optimum, log_q, **given) - reward
    np.testing.assert_allclose(back - back[:, :1], 0, atol=1e-11)
    for rival in (jnp.log(jnp.array(p)), log_q, jax.nn.log_softmax(optimum + 0.05 * reward)):
        assert (regularized.gap(rival, reward, log_q, **given) > 1e-6).all()
    np.testing.assert_allclose(regularized.gap(optimum, reward, log_q, **given), 0, atol=1e-15)
    shifted = regularized.log_prob(reward + 7, log_q, **given)
    np.testing.assert_allclose(shifted, optimum, atol=1e-12)

    def first(reward, log_q, kl_coef):
        log_q = jax.nn.log_softmax(log_q)
        return regularized.log_prob(reward, log_q, kl_coef=kl_coef, divergence=found)[0, 1]

    slopes = jax.grad(first, (0, 1, 2))(reward, log_q, ETA)
    step = 1e-6
    for k, slope in enumerate(slopes):
        at = [reward, log_q, jnp.array(ETA)]
        direction = jnp.array(np.random.default_rng(k).normal(size=at[k].shape))
        ends = [first(*(x + s * step * direction if j == k else x for j, x in enumerate(at)))
                for s in (1, -1)]  # fmt: skip
        np.testing.assert_allclose(
            jnp.sum(slope * direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-6
        )


def test_the_reverse_kl_is_gibbs(x64):
    reward, p, q = laws(3)
    reward, log_q, log_p = jnp.array(reward), jnp.log(jnp.array(q)), jnp.log(jnp.array(p))
    given = {"kl_coef": ETA, "divergence": fdivergence.reverse_kl}
    closed = gibbs.log_prob(reward, log_q, kl_coef=ETA)
    np.testing.assert_allclose(regularized.log_prob(reward, log_q, **given), closed, atol=1e-12)
    for name in ("value", "gap"):
        got = getattr(regularized, name)(log_p, reward, log_q, **given)
        want = getattr(gibbs, name)(log_p, reward, log_q, kl_coef=ETA)
        np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_array_equal(
        regularized.implicit_reward(log_p, log_q, **given),
        gibbs.implicit_reward(log_p, log_q, kl_coef=ETA),
    )


@pytest.mark.parametrize("kl_coef", [1e-3, 1.0, 1e3])
def test_masks_extremes_and_empty_rows_in_float32(member, kl_coef):
    found, _ = member
    reward = jnp.array([[1e3, 0.0, -1e3, 5.0], [1.0, 1.0, -jnp.inf, 5.0], [0.0, 0.0, 0.0, 0.0]])
    log_q = jnp.log(jnp.array([[0.1, 0.6, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1], [0.25] * 4]))
    where = jnp.array([[True, True, True, False]] * 2 + [[False] * 4])

    def total(reward, log_q, kl_coef):
        log_prob = regularized.log_prob(
            reward, log_q, kl_coef=kl_coef, divergence=found, where=where
        )
        return jnp.sum(jnp.where(jnp.exp(log_prob) > 1e-6, log_prob, 0)), log_prob

    both = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, log_prob), slopes = both(reward, log_q, kl_coef)
    np.testing.assert_allclose(jnp.exp(log_prob[:2]).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(log_prob[1]), [0.5, 0.5, 0, 0], atol=1e-6)
    assert (jnp.exp(log_prob)[~where] == 0).all()
    assert all(np.isfinite(s).all() for s in slopes)


def f_dpo(reward, log_q, member, pairs):
    """Minimizer of the population's f-DPO loss over softmax policies, by SciPy."""
    won = 1 / (1 + np.exp(-(reward[:, None] - reward[None, :])))
    weight = (pairs + pairs.T) * won

    @jax.jit
    def loss(logits):
        implicit = ETA * member.link(jax.nn.log_softmax(logits) - log_q)
        return jnp.sum(weight * jax.nn.softplus(implicit[None, :] - implicit[:, None]))

    found = scipy.optimize.minimize(
        lambda x: tuple(np.asarray(v) for v in jax.value_and_grad(loss)(jnp.array(x))),
        np.asarray(log_q),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-12},
    )
    return jax.nn.softmax(jnp.array(found.x))


def test_f1_f_dpo_has_the_optimum_whoever_is_compared_and_chi_square_has_not(member, x64):
    reward, _, q = laws(4)
    reward, log_q = 1.5 * reward[0], jnp.log(jnp.array(q[0]))
    rng = np.random.default_rng(0)
    two = [np.ones((6, 6)), np.outer(*rng.exponential(size=(2, 6)))]
    found, _ = member
    optimum = jnp.exp(regularized.log_prob(jnp.array(reward), log_q, kl_coef=ETA, divergence=found))
    for pairs in two:
        np.testing.assert_allclose(f_dpo(reward, log_q, found, pairs), optimum, atol=1e-6)
    if found is fdivergence.forward_kl:
        one, other = (f_dpo(reward, log_q, CHI_SQUARE, pairs) for pairs in two)
        assert abs(one - other).sum() / 2 > 1e-2
