"""The atlas's rows of the policy side (`policy_checks.py`)."""

from experiments.atlas import policy_checks as checks
from experiments.atlas.rows import Row

ROWS = (
    Row(
        system="GRPO (2402.03300)",
        claim="the published KL term (k3 as a loss) leads to the KL-regularized optimum",
        function="group_losses.grpo",
        check=checks.the_published_kl_term_leads_to_the_gibbs_policy,
        control="k2 as a loss",
    ),
    Row(
        system="GRPO (2402.03300)",
        claim="dividing by the deviation keeps the policy stochastic at small coefficients",
        function="policy_gradient.by_std",
        check=checks.dividing_by_the_deviation_keeps_the_policy_stochastic,
        control="1.5 times the least coefficient with a fixed point",
    ),
    Row(
        system="PRDP (2402.08714), RLOO (2402.14740)",
        claim="regression on rewards and leave-one-out REINFORCE are one gradient",
        function="regression.loss",
        check=checks.regression_and_rloo_are_one_gradient,
        control="over the deviation",
    ),
    Row(
        system="DNO (2404.03715)",
        claim="the last iterate is the equilibrium (on a cycle)",
        function="self_play.mirror_step",
        check=checks.the_last_iterate_of_win_rate_regression_is_the_equilibrium,
        control="pi0 held fixed (NashMD)",
    ),
    Row(
        system="best-of-n",
        claim="its KL is log n - (n - 1)/n (6 actions, n = 8)",
        function="targets.best_of",
        check=checks.best_of_n_costs_its_formula,
        control="2000 equally likely actions",
    ),
    Row(
        system="best-of-n",
        claim="it lies on the frontier of reward against KL (6 actions, n = 4)",
        function="measure.frontier_gap",
        check=checks.best_of_n_is_on_the_frontier,
        control="the Gibbs policy",
    ),
    Row(
        system="RPO (2405.16436)",
        claim="a likelihood term leaves the population's optimum (c = 0.1)",
        function="objectives.rpo",
        check=checks.a_likelihood_term_costs_nothing,
        control="c = 0",
    ),
    Row(
        system="TR-DPO (2404.09656)",
        claim="a moving reference regularizes as a fixed one (10 rounds)",
        function="pairwise.moved_reference",
        check=checks.a_moving_reference_still_regularizes,
        control="no update",
    ),
    Row(
        system="SubPO (2307.13372)",
        claim="greedy marginal gains alone follow the set reward's gradient",
        function="sets.greedy_marginal",
        check=checks.greedy_gains_follow_the_set_rewards_gradient,
        control="leave-one-out",
    ),
    Row(
        system="QRPO (2507.08068)",
        claim="the normalizer is known whatever the reward (right or wrong)",
        function="regression.uniform_offset",
        check=checks.a_quantile_reward_has_a_known_normalizer,
        control="no ties",
    ),
    Row(
        system="controlled decoding (2310.17022)",
        claim="guidance by the mean value of a prefix is on the frontier",
        function="guided.mean_value",
        check=checks.the_mean_value_guides_to_the_frontier,
        control="the soft value",
    ),
)
