"""Every function of the core's first half on a mesh: the same code, the same numbers.

The leading axis is sharded over eight devices (axis type Auto, the library's choice). One program
computes everything, values and gradients; it must equal one device, jitted or not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_klrlhf.core import (
    bradley_terry,
    divergence,
    fdivergence,
    gibbs,
    numerics,
    objectives,
    onesided,
    regularized,
    sequence,
)

ROWS, ACTIONS, LENGTH, VOCAB = 16, 5, 6, 7
KL_COEF = 0.5


def batch():
    rng = np.random.default_rng(0)
    float32 = {
        "reward": rng.normal(size=(ROWS, ACTIONS)),
        "ref_log_prob": np.log(rng.dirichlet(np.ones(ACTIONS), ROWS)),
        "policy": np.log(rng.dirichlet(np.ones(ACTIONS), ROWS)),
        "log_prob": -rng.exponential(size=(ROWS, 2)),
        "logits": rng.normal(size=(ROWS, LENGTH, VOCAB)),
    }
    return {
        **{name: jnp.array(x, jnp.float32) for name, x in float32.items()},
        "where": jnp.array(rng.random((ROWS, ACTIONS)) < 0.7).at[3].set(False),
        "tokens": jnp.array(rng.integers(VOCAB, size=(ROWS, LENGTH)), jnp.int32),
        "length": jnp.array(rng.integers(LENGTH + 1, size=(ROWS, 2)), jnp.int32),
    }


def everything(x):
    """Name to array, for every public function that takes arrays with a leading axis."""
    reward, ref, policy, where = (x[k] for k in ("reward", "ref_log_prob", "policy", "where"))
    pairs = objectives.Scores(x["log_prob"], x["log_prob"][..., ::-1], x["length"])
    chosen, settings = pairs.chosen_log_ratio, {"kl_coef": KL_COEF}
    pairs = pairs._replace(
        reward=reward[:, :2], bonus=abs(reward[:, 1:3]), exploration_log_prob=x["log_prob"][:, 0]
    )
    rows = sequence.Ragged(x["tokens"], x["length"][:, 0])
    token_log_prob = sequence.token_log_prob(x["logits"], rows.ids)
    members = {
        "jensen_shannon": fdivergence.jensen_shannon,
        "alpha": fdivergence.alpha(0.5),
        "chi_po": fdivergence.chi_po,
    }
    return {
        "at_least_float32": numerics.at_least_float32(reward.astype(jnp.bfloat16)),
        "exp_remainder": numerics.exp_remainder(reward),
        "expectation": numerics.expectation(policy, reward, where=where),
        "linear_exp": numerics.linear_exp(reward),
        "masked_logsumexp": numerics.masked_logsumexp(reward, where),
        "masked_max": numerics.masked_max(reward, where),
        "safe_sqrt": numerics.safe_sqrt(reward),
        "support": numerics.support(policy, where),
        "log_likelihood": bradley_terry.log_likelihood(chosen),
        "nll": bradley_terry.nll(chosen, label=0.9),
        "curvature": bradley_terry.curvature(chosen),
        "sample": bradley_terry.sample(jax.random.key(0), chosen),
        "categorical": divergence.categorical(policy, ref, where=where),
        "k1": divergence.k1(chosen),
        "k2": divergence.k2(chosen),
        "k3": divergence.k3(chosen),
        "gibbs.log_prob": gibbs.log_prob(reward, ref, where=where, **settings),
        "implicit_reward": gibbs.implicit_reward(policy, ref, **settings),
        "free_energy": gibbs.free_energy(reward, ref, where=where, **settings),
        "value": gibbs.value(policy, reward, ref, where=where, **settings),
        "gap": gibbs.gap(policy, reward, ref, where=where, **settings),
        "token_log_prob": token_log_prob,
        "sum_log_prob": sequence.sum_log_prob(token_log_prob, where=rows.mask),
        "length_desensitized": sequence.length_desensitized(
            jnp.stack([token_log_prob, 2 * token_log_prob], -2), x["length"], tail=0.4
        ),
        "sigmoid": objectives.sigmoid(pairs, label_smoothing=0.1, **settings),
        "ipo": objectives.ipo(pairs, **settings),
        "hinge": objectives.hinge(pairs, **settings),
        "robust": objectives.robust(pairs, flip_rate=0.1, **settings),
        "rpo": objectives.rpo(pairs, sft_coef=0.1, **settings),
        "cpo": objectives.cpo(pairs, sft_coef=0.1, **settings),
        "simpo": objectives.simpo(pairs, margin=0.5, **settings),
        "length_normalized": objectives.length_normalized(pairs, **settings),
        "chi_po": objectives.chi_po(pairs, clip=2.0, **settings),
        "pessimistic": objectives.pessimistic(pairs, **settings),
        "exploratory": objectives.exploratory(pairs, optimism=0.1, **settings),
        "modpo": objectives.modpo(pairs, weight=0.7, **settings),
        "odpo": objectives.odpo(pairs, margin_coef=0.7, **settings),
        "mm_dpo": objectives.mm_dpo(pairs, **settings),
        "exo": objectives.exo(pairs, label_smoothing=0.1, **settings),
        "discopop": objectives.discopop(pairs, **settings),
        "orpo": objectives.orpo(pairs, odds_coef=0.3),
        "aot": objectives.aot(pairs, **settings),
        "wpo_weight": objectives.wpo_weight(pairs),
        "weighted": objectives.weighted(chosen, policy[..., 0]),
        "f_divergence": objectives.f_divergence(
            pairs, divergence=fdivergence.forward_kl, **settings
        ),
        "nca": onesided.nca(pairs, **settings),
        "kto": onesided.kto(pairs, shift=0.2, **settings),
        "bco": onesided.bco(pairs, shift=0.1, **settings),
        "sppo": onesided.sppo(pairs, **settings),
        "apo_zero": onesided.apo_zero(pairs, **settings),
        "apo_down": onesided.apo_down(pairs, **settings),
        **{
            f"{name}/{function}": value
            for name, member in members.items()
            for function, value in {
                "link": member.link(chosen),
                "surrogate": member.surrogate(chosen),
                "value": member.value(chosen),
                "categorical": fdivergence.categorical(policy, ref, divergence=member, where=where),
                "optimum": regularized.log_prob(
                    reward, ref, divergence=member, where=where, **settings
                ),
            }.items()
        },
    }


def values_and_gradients(x):
    """All outputs, and the gradient of the sum of the finite ones in every float input."""
    integer = {k: v for k, v in x.items() if not jnp.issubdtype(v.dtype, jnp.floating)}

    def total(floats):
        found = everything(floats | integer)
        finite = (
            jnp.sum(jnp.where(jnp.isfinite(v), v, 0))
            for v in found.values()
            if jnp.issubdtype(v.dtype, jnp.floating)
        )
        return sum(finite), found

    floats = {k: v for k, v in x.items() if k not in integer}
    gradient, found = jax.grad(total, has_aux=True)(floats)
    return found | {f"gradient/{k}": v for k, v in gradient.items()}


@pytest.fixture(scope="module")
def sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


@pytest.fixture(scope="module")
def one_device():
    return jax.jit(values_and_gradients)(batch())


def test_every_public_function_is_in_the_table():
    done = {name.split("/")[0].split(".")[-1] for name in jax.eval_shape(everything, batch())}
    for module in (bradley_terry, divergence, gibbs, numerics, objectives, sequence):
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and callable(value)
            and not isinstance(value, type)
            and getattr(value, "__module__", None) == module.__name__
        }
        public -= {"pad", "check_positive", "check_between"}  # take no arrays with a batch
        assert public <= done, f"{module.__name__}: add to the table {public - done}"


@pytest.mark.slow
def test_eight_devices_equal_one(sharding, one_device):
    x = jax.device_put(batch(), sharding)
    found = jax.jit(values_and_gradients)(x)
    assert len(found["gap"].sharding.device_set) == 8
    for name, want in one_device.items():
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_sharded_without_jit_equals_one_device_with_it(sharding, one_device):
    found = everything(jax.device_put(batch(), sharding))
    for name, got in found.items():
        np.testing.assert_allclose(got, one_device[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_no_gradient_is_nan_beside_an_empty_row(one_device):
    for name, got in one_device.items():
        if name.startswith("gradient/"):
            assert jnp.isfinite(got).all(), name
