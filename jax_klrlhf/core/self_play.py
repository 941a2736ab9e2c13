r"""Self-play: policies that learn to beat themselves, as mirror steps on win rates (family N).

With the win rate against the present policy in the place of a reward (`links.win_rate`), everything
else of the library applies unchanged:

========== ================================================================= =================
system     composition                                                       source (arXiv)
========== ================================================================= =================
SPPO       `group_losses.regression` on win rates, the reference pi_t        2405.00675
DNO        logistic pairs, label sigma(win_1 - win_2), the reference pi_t    2404.03715
IPO        squared pairs, both responses from pi_t                           2310.12036
NashMD     :func:`mirror_step` with ``kl_coef`` > 0                          2312.00886
INPO       the same, by regression on pairs                                  2407.00617
Think-RM   `policy_gradient` on pairwise judgements averaged over the group  2505.16265
========== ================================================================= =================

The first three are *one* step, :math:`\pi_{t+1} \propto \pi_t e^{win/\eta}`: :func:`mirror_step` at
``kl_coef`` 0. Each step beats the policy before it, :math:`P(\pi_{t+1} \succ \pi_t) \ge 1/2`, and
that is *not* convergence: where preferences cycle the last iterate cycles too, and the average
converges; under Bradley-Terry it ends deterministic. Only a fixed pi0 (``kl_coef`` > 0, and steps
that are short enough) leads the last iterate to the equilibrium of the regularized game
(`links.nash`). That equilibrium is not the Gibbs policy of the reward either: win rates saturate.
[Derived; tests.]

Axes: ``batch`` (free), ``actions``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core import gibbs, numerics
from jax_klrlhf.core.numerics import Scalar


def mirror_step(
    log_prob: Float[Array, "*batch actions"],
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    step: Scalar,
    kl_coef: Scalar,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    r"""One step of mirror ascent on :math:`E r - \eta\,\mathrm{KL}(\pi \| \pi_0)` from the policy.

    .. math:: \pi_{t+1} \propto \pi_t^{1 - \alpha\eta}\, \pi_0^{\alpha\eta}\, e^{\alpha r}

    alpha is ``step`` (1/eta of SPPO and DNO), eta is ``kl_coef``. With a fixed reward and
    alpha eta = 1 it is the Gibbs policy at once; with ``kl_coef`` 0 pi0 is forgotten.

    Args:
      log_prob: log pi_t, normalized.
      reward: a reward, or the win rate against pi_t.
      ref_log_prob: log pi0.
      step: alpha > 0.
      kl_coef: eta in [0, 1 / alpha].
      where: True keeps an action.

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> to = mirror_step(uniform, jnp.log(jnp.array([3.0, 1.0])), uniform, step=1.0, kl_coef=0.0)
    >>> jnp.exp(to).tolist()
    [0.75, 0.25]
    """
    numerics.check_positive("step", step)
    numerics.check_positive("kl_coef", kl_coef, or_zero=True)
    share = jnp.asarray(step * kl_coef, log_prob.dtype)
    keep = numerics.support(log_prob, where) & numerics.support(ref_log_prob, where)
    old, ref = (jnp.where(keep, x, 0) for x in (log_prob, ref_log_prob))
    base = jnp.where(keep, (1 - share) * old + share * ref, -jnp.inf)
    return gibbs.log_prob(reward, base, kl_coef=1 / jnp.asarray(step, log_prob.dtype), where=where)
