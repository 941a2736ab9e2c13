"""Rewards made of rewards, ensembles read from `goodhart`, and distances: one function a claim."""

from functools import partial

import jax
import jax.numpy as jnp

from experiments.atlas.rows import Effect, Row
from experiments.atlas.worlds import (
    ACTIONS,
    at_kl,
    correlation,
    law,
    rank_correlation,
    reward,
    uniform,
    worth,
)
from jax_klrlhf.core import aggregate, diversity, estimation, gibbs, measure, reshape

LEVELS = (0.25, 0.5, 1.0, 2.0, 3.0)


def win_rate_is_harmless(key, level):
    """PAR of an exact reward, gold at equal KL; control: another scale."""
    gold, ref = reward(key, 1, 40), uniform(1, 40)
    plain = worth(gold, gold, ref, level)
    par = worth(reshape.win_rate(gold, ref), gold, ref, level)
    return Effect(par - plain, worth(7 * gold, gold, ref, level) - plain)


def resists_hacks(transform, key, setting):
    """Gold gained at equal KL where 5 % of actions are too good; control: without hacks."""
    excess, level = setting
    gold, ref = reward(key, 1, 200), uniform(1, 200)
    hacked = jnp.arange(200) < 10

    def gain(excess):
        proxy = gold + jnp.where(hacked, excess, 0.0)
        truth = gold - jnp.where(hacked & (excess > 0), 3.0, 0.0)
        changed = worth(transform(proxy, ref), truth, ref, level)
        return changed - worth(proxy, truth, ref, level)

    return Effect(gain(excess), gain(0.0))


def _ceiling(r, ref):
    return reshape.ceiling(r, reference=reshape.quantile(r, ref, level=0.85))


def _log_sigmoid(r, ref):
    return reshape.log_sigmoid(r, reference=reshape.quantile(r, ref, level=0.5))


def log_sigmoids_sum_to_and(key, level):
    """P(both in the best 30 %) against the plain sum, at equal KL; control: the raw sum."""
    rewards, ref = reward(key, 2, 1, 200), uniform(1, 200)
    bars = jnp.stack([reshape.quantile(r, ref, level=0.7) for r in rewards])
    good = jnp.all(rewards >= bars[..., None], 0)
    both, plain = (
        jnp.exp(at_kl(proxy, ref, level))
        for proxy in (aggregate.conjunction(rewards, bars), rewards.sum(0))
    )
    return Effect(jnp.sum((both - plain) * good), jnp.sum((both - plain) * rewards.sum(0)))


def rarity_makes_policies_diverse(key, shift):
    """DARLING's product: class entropy at equal KL; control: minus log P(class), added."""
    classes, ref = jnp.array([[0, 0, 1, 1, 2, 2]]), uniform(1, ACTIONS)
    r = reward(key) + shift
    kl = lambda p: jnp.sum(jnp.exp(p) * (p - ref))  # noqa: E731

    def gain(reward_of):
        many = reshape.fixed_point(reward_of, ref, kl_coef=0.5, damping=0.1, steps=300).log_prob
        plain = at_kl(r, ref, kl(many))
        return (diversity.class_entropy(many, classes) - diversity.class_entropy(plain, classes))[0]

    return Effect(
        gain(lambda p: r * reshape.rarity(p, classes)),
        gain(lambda p: r + 0.5 * reshape.surprise(p, classes)),
    )


def step_rewards_keep_the_optimum(key, kl_coef):
    """Minus the gap that shaping leaves: free ends, and (control) a potential that ends at 0."""
    keys = jax.random.split(key, 2)
    rewards, ref = reward(keys[0], 8, 3), uniform(8)
    potential = jnp.concatenate([jnp.zeros((8, 1)), reward(keys[1], 8, 3)], -1)

    def gap(potential):
        shaped = reshape.shaped(rewards, potential).sum(-1)
        return gibbs.gap(law(shaped, ref, kl_coef), rewards.sum(-1), ref, kl_coef=kl_coef)

    return Effect(-gap(potential), -gap(potential.at[:, -1].set(0.0)))


def orthogonal_features_mend_a_length_bias(key, setting):
    """ODIN, linear: gold at KL 1 gained over the biased fit; control: no bias to mend.

    ``alignment`` is how much of quality lies along length, ``bias`` what a unit of length is worth
    to who labels.
    """
    alignment, bias = setting
    keys = jax.random.split(key, 4)
    count, ref = 300, uniform(1, 300)
    length = jax.random.normal(keys[0], (count, 1))
    other = jax.random.normal(keys[1], (count, 4))
    slope = jnp.sqrt(jnp.maximum(1 - alignment**2, 0))
    quality = jnp.concatenate([alignment * length + slope * other[:, :1], other[:, 1:]], -1)
    features = jnp.concatenate([quality, length], -1)
    theta = jnp.append(1 + 0.3 * jax.random.normal(keys[2], (4,)), 0.0) / 2
    gold = measure.canonical((features @ theta)[None], ref)
    pair = jax.random.randint(keys[3], (2, 400), 0, count)

    def gain(bias):
        p = jax.nn.sigmoid((features[pair[0]] - features[pair[1]]) @ theta.at[-1].set(bias))
        flat = reshape.orthogonal(features[None], length[None], ref, context_prob=jnp.ones(1))[0]
        found = []
        for x in (flat, features):
            fit = estimation.fit(x[pair[0]] - x[pair[1]], p, ridge=1e-2).theta
            found.append(worth((x @ fit)[None], gold, ref, 1.0))
        return found[0] - found[1]

    return Effect(gain(bias), gain(0.0))


def distance_0_is_no_gap(key, scale):
    """STARC: minus the gap of c r, whose distance to r is 0; control: minus that distance."""
    r, ref = reward(key), uniform(1, ACTIONS)
    gap = gibbs.gap(law(scale * r, ref, 0.5), r, ref, kl_coef=0.5)[0]
    return Effect(-gap, -jnp.round(measure.starc(r, scale * r, ref), 3))


def entropy_makes_the_map_smooth(key, kl_coef):
    """Policy cliff: room under tanh(span / 4 eta), as a share of it; control: two actions.

    From one side of a tie to the other; of two actions the bound is attained.
    """

    def room(actions):
        ref = uniform(1, actions)
        side = 0.005 * reward(key, 1, actions)
        span = measure.span(side, -side)[0]
        moved = jnp.abs(jnp.exp(law(side, ref, kl_coef)) - jnp.exp(law(-side, ref, kl_coef)))
        return 1 - moved.sum() / 2 / measure.variation_bound(span, kl_coef=kl_coef)

    return Effect(room(ACTIONS), jnp.round(room(2), 2))


def ratios_beat_the_strong_policy(key, sharpness):
    """CDR: correlation with the reward of log strong/weak, weak unrelated, less log strong's.

    Control: weak is strong's own base.
    """
    keys = jax.random.split(key, 3)
    r, base = reward(keys[0], 1, 60), jax.nn.log_softmax(reward(keys[1], 1, 60))
    foreign = jax.nn.log_softmax(reward(keys[2], 1, 60))
    strong = law(r, base, 1 / sharpness)
    ratio = lambda weak: gibbs.implicit_reward(strong, weak, kl_coef=1.0)  # noqa: E731
    alone = correlation(strong, r)
    return Effect(correlation(ratio(foreign), r) - alone, correlation(ratio(base), r) - alone)


def one_of_many_predicts_the_policy(key, level):
    """RewardMATH: rank correlation with gold at this KL, one of 10 less pairs.

    64 reward models of four kinds of error, 16 strengths each: noise, rare hacks, saturation, a
    wrong direction. Control: the mean within a kind.
    """
    keys = jax.random.split(key, 3)
    count, ref = 100, uniform(100)
    features = jax.random.normal(keys[0], (count, 3))
    gold = features @ jnp.array([1.0, 0.5, 0.0])
    noise = jax.random.normal(keys[1], (count,))
    hacked = jax.random.permutation(keys[2], count) < 3
    kinds = (
        lambda t: gold + 2 * t * noise,
        lambda t: gold + jnp.where(hacked, 6 * t, 0.0),
        lambda t: jnp.tanh((0.2 + 3 * t) * (gold + 1.5)) + 0.05 * noise,
        lambda t: gold + 2 * t * features[:, 2],
    )
    strength = jnp.linspace(0.05, 1, 16)
    models = jnp.stack([jax.vmap(kind)(strength) for kind in kinds])
    right = gold >= jnp.quantile(gold, 0.7)

    def judged(model):
        accuracy = lambda n: measure.one_of_n(model, ref, right, n=n)  # noqa: E731
        return accuracy(2), accuracy(10), worth(model, jnp.where(hacked, -1.0, gold), ref, level)

    pairs, many, value = jax.vmap(jax.vmap(judged))(models)
    better = rank_correlation(many.reshape(-1), value.reshape(-1))
    worse = rank_correlation(pairs.reshape(-1), value.reshape(-1))
    within = jax.vmap(rank_correlation)(many, value) - jax.vmap(rank_correlation)(pairs, value)
    return Effect(better - worse, within.mean())


PAR, LSC = "PAR (2502.18770)", "transforming and combining (2402.00742)"
COSTE, HERDING = "reward ensembles (2310.02743)", "Helping or Herding (2312.09244)"
GRID = tuple((e, k) for e in (2.0, 4.0, 6.0) for k in (0.5, 1.0, 2.0, 3.0))
DIVERGENCES = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)


def _hacks(system: str, name: str, function: str, transform) -> Row:
    return Row(
        system=system, claim=f"{name} resists rare hacks", function=function,
        check=partial(resists_hacks, transform), axis="excess, KL", settings=GRID,
        control="no hacks",
    )  # fmt: skip


def _goodhart(system: str, claim: str, function: str, regime: str, rule: str) -> Row:
    names = tuple(f"{regime}, KL {level:g}/{rule}/gain over mean" for level in DIVERGENCES)
    return Row(
        system=system, claim=claim, function=function, source="goodhart", metrics=names,
        axis="KL", settings=DIVERGENCES,
    )  # fmt: skip


ROWS = (
    Row(system=PAR, claim="the win rate is harmless when the reward is exact",
        function="reshape.win_rate", check=win_rate_is_harmless, axis="KL", settings=LEVELS,
        control="another scale"),
    _hacks(PAR, "the win rate", "reshape.win_rate", reshape.win_rate),
    _hacks(LSC, "log-sigmoid at the median", "reshape.log_sigmoid", _log_sigmoid),
    _hacks("clipped rewards", "a ceiling at the 85 % quantile", "reshape.ceiling", _ceiling),
    Row(system=LSC, claim="a sum of log-sigmoids is an AND: more responses that are good in both",
        function="aggregate.conjunction", check=log_sigmoids_sum_to_and, axis="KL",
        settings=LEVELS, control="raw sum of rewards"),
    Row(system="DARLING (2509.02534)", claim="reward times rarity makes a policy more diverse",
        function="reshape.rarity", check=rarity_makes_policies_diverse, axis="mean reward",
        settings=(-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0), control="surprise, added"),
    Row(system="TP-GRPO, potential shaping", claim="step rewards with free ends keep the optimum",
        function="reshape.shaped", check=step_rewards_keep_the_optimum, axis="kl_coef",
        settings=(0.1, 0.3, 1.0, 3.0), control="a potential that ends at 0"),
    Row(system="ODIN (2402.07319)", claim="features freed of length mend a length bias",
        function="reshape.orthogonal", check=orthogonal_features_mend_a_length_bias,
        axis="share of quality along length, bias",
        settings=tuple((a, b) for a in (0.0, 0.5, 0.9) for b in (0.25, 0.5, 1.0, 2.0)),
        control="no bias"),
    Row(system="STARC (2309.15257)", claim="a distance of 0 means no KL-regularized gap",
        function="measure.starc", check=distance_0_is_no_gap, axis="scale",
        settings=(0.25, 0.5, 2.0, 5.0), control="minus the distance"),
    Row(system="policy cliff (2507.20150)",
        claim="entropy makes the map smooth: total variation is below tanh(span / 4 eta)",
        function="measure.variation_bound", check=entropy_makes_the_map_smooth, axis="kl_coef",
        settings=(0.001, 0.01, 0.1, 1.0), control="two actions, where it is attained"),
    Row(system="CDR (2411.02481)",
        claim="log strong/weak ranks better than the strong policy alone (foreign weak)",
        function="gibbs.implicit_reward", check=ratios_beat_the_strong_policy,
        axis="strong's 1 / kl_coef", settings=(0.25, 0.5, 1.0, 2.0, 4.0),
        control="weak is strong's own base"),
    Row(system="RewardMATH (2410.01729)",
        claim="one-of-10 accuracy predicts the policy better than pairs, over kinds of error",
        function="measure.one_of_n", check=one_of_many_predicts_the_policy, axis="KL",
        settings=(0.5, 1.0, 2.0, 3.0), control="within a kind"),
    _goodhart(COSTE, "an ensemble's minimum beats its mean, the model being right",
              "aggregate.minimum", "well specified", "minimum"),
    _goodhart(COSTE, "an ensemble's minimum beats its mean where the proxy extrapolates",
              "aggregate.minimum", "extrapolating", "minimum"),
    _goodhart(COSTE, "an ensemble's minimum beats its mean where it extrapolates from 25 % flips",
              "aggregate.minimum", "extrapolating, 25 % flips", "minimum"),
    _goodhart(COSTE, "mean less variance beats the mean where the proxy extrapolates",
              "aggregate.penalized", "extrapolating", "mean - variance"),
    _goodhart(HERDING, "one member does as well as the mean",
              "aggregate.mean", "well specified", "single"),
    _goodhart(HERDING, "the minimum mends an error that all members share",
              "aggregate.minimum", "shared bias", "minimum"),
)  # fmt: skip
