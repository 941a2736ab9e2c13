"""The theory on a real trained transformer, small enough that its every response is listed.

The world has 121 responses to each of 4 prompts; pi0 is trained, the gold reward is linear in its
hidden features, policies are trained in float32 and judged in float64.
"""

import jax
import numpy as np
import pytest

from experiments.exact_lm import panels, world
from experiments.exact_lm.run import Config, small

SETTINGS = small(Config())

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def here():
    return world.build(SETTINGS.world)


@pytest.fixture(scope="module")
def fit(here):
    return panels.fixed_point(here, SETTINGS.sizes, jax.random.key(0))


def test_the_enumerated_law_is_one_and_its_optimum_is_gibbs(here):
    np.testing.assert_allclose(np.exp(here.base).sum(1), 1, rtol=1e-12)
    assert len(here.every.lengths) == 121
    star, eta = world.optimum(here), here.config.kl_coef
    log_z = np.log((np.exp(here.base) * np.exp(here.reward / eta)).sum(1))
    # L0: J(pi*) = eta log Z.
    at_star = world.evaluate_law(here, star)
    np.testing.assert_allclose(at_star.value, eta * log_z, rtol=1e-12)
    # No law does better: a hundred random ones.
    rng = np.random.default_rng(0)
    for _ in range(100):
        tilt = rng.normal(size=here.base.shape)
        law = here.base + tilt - np.log((np.exp(here.base + tilt)).sum(1, keepdims=True))
        assert np.all(world.evaluate_law(here, law).gap > 0)


def test_the_gap_is_the_scaled_divergence_all_along_training(fit):
    """J(pi*) - J(pi) = eta KL(pi || pi*), each side by its own definition, 1e-10 in float64."""
    metrics, path = fit
    eta = SETTINGS.world.kl_coef
    assert len(path) >= 5
    moved = [e.gap.mean() for e in path]
    assert moved[-1] < moved[0] / 2  # The policies compared are different ones.
    for exact in path:
        np.testing.assert_allclose(exact.gap, eta * exact.to_optimum, rtol=0, atol=1e-10)
    assert metrics["identity/along training/largest error"].value < 1e-10


def test_dpo_on_all_preferences_goes_to_the_gibbs_policy(fit):
    """Its fixed point is pi*: nine tenths of the divergence of pi0 from it are gone."""
    metrics, path = fit
    first, last = path[0].to_optimum.mean(), path[-1].to_optimum.mean()
    assert last < first / 10
    # Pessimistic or not, no policy is better than pi*.
    assert np.all(path[-1].gap > 0)
    assert metrics["fixed_point/dpo/kl_to_optimum"].value == pytest.approx(last)


def test_each_samplers_draws_have_its_exact_law(here):
    """Four chi-squared tests of 5000 draws or fewer: one false alarm in 2500 (p < 1e-4 in each)."""
    found = panels.samplers(here, SETTINGS.sizes, jax.random.key(2))
    assert len(found) == 4
    for name, metric in found.items():
        assert metric.value > 1e-4, name
    # The test can tell laws apart: pi0's draws are not those of pi*.
    law = np.exp(here.base[-1])
    count = np.random.default_rng(0).multinomial(5000, law / law.sum())
    assert panels._p_value(count, here.base[-1]) > 1e-4
    assert panels._p_value(count, world.optimum(here)[-1]) < 1e-12


def test_multi_step_rejection_accepts_at_the_exact_rate_and_nears_its_target(here):
    found = panels.rejection_chain(here, SETTINGS.sizes, jax.random.key(4))
    for name in ("1 step", "2 steps"):
        for number in range(1, int(name[0]) + 1):
            exact = found[f"rejection/{name}/acceptance exact {number}"].value
            metric = found[f"rejection/{name}/acceptance {number}"]
            # 1024 to 2048 proposals a prompt; a mean of probabilities has at most the standard
            # error of a proportion. 4.5 of them: one false alarm in 150,000.
            draws = SETTINGS.sizes.proposals // int(name[0]) * SETTINGS.world.prompts
            assert abs(metric.value - exact) < 4.5 * np.sqrt(exact * (1 - exact) / draws)
    pi0 = world.evaluate(here, here.params).variation.mean()
    assert found["rejection/2 steps/total_variation"].value < pi0 / 2
    # More draws come nearer the unknown bound: the error falls, and the estimate is of its size.
    error = [
        found[f"rejection/unknown bound, {n} draws/total_variation"].value for n in (8, 64, 512)
    ]
    assert error[0] > error[1] > error[2]
    for n, exact in zip((64, 512), error[1:], strict=True):
        estimated = found[f"rejection/unknown bound, {n} draws/estimated"]
        assert estimated.value < 3 * exact + 4 * estimated.stderr


def test_the_estimated_confidence_set_covers_at_its_rate(here):
    """40 trials at 95 %: fewer than 32 inside has probability 1.5e-4 (binomial)."""
    found = panels.coverage(here, SETTINGS.sizes, jax.random.key(5))
    assert found["coverage/estimated, 1000 labels/frequency"].value >= 32 / 40
    assert found["coverage/theory, 1000 labels/frequency"].value == 1.0
