r"""What pairwise losses are made of: a score of each response, a margin, and a shape.

.. math:: s = f'\Big(\frac{\pi}{\pi_0^w}\Big) \frac{1}{\text{length}}, \qquad
    m = \frac{\eta\,(s_w - s_l) + \text{offset}}{\text{scale}}, \qquad \ell = \text{shape}(m)

:mod:`.objectives` has the named compositions; a new one is a line. **Only a proper loss of a
constant coefficient has a fixed point that doesn't depend on who is compared with whom**: the
logistic shape, with offsets that are a difference of something of each response, and a score of
whole responses. Its law is then that of the score's inverse. Source of the normal form: arXiv
2509.11298, extended here by links and clips.

Axes: ``batch`` (free axes, one entry per pair), ``responses`` (chosen at 0, rejected at 1).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.core import bradley_terry, numerics, preferences
from jax_klrlhf.core.fdivergence import FDivergence, reverse_kl
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.preferences import PreferenceModel
from jax_klrlhf.core.scores import Scores, second


def score(
    scores: Scores,
    *,
    divergence: FDivergence = reverse_kl,
    reference: Scalar = 1.0,
    per_token: bool = False,
) -> Float[Array, "*batch responses"]:
    """What a policy says of each response, in nats: its log-ratio, or another one's link.

    ``reference`` is the power of pi0 in the ratio: at 0 it is not read. ``per_token`` divides the
    log-ratio by the length (a response of length 0 counts as length 1): of unequal lengths that is
    the implicit reward of no regularizer.
    """
    ratio = scores.log_prob
    if not isinstance(reference, (int, float)) or reference != 0:
        ref = scores.given("ref_log_prob")
        ratio = ratio - (ref if isinstance(reference, (int, float)) and reference == 1
                         else reference * ref)  # fmt: skip
    if per_token:
        ratio = ratio / jnp.maximum(scores.length, 1).astype(ratio.dtype)
    return divergence.link(ratio)


def margin(
    score: Float[Array, "*batch responses"],
    *,
    kl_coef: Scalar,
    offset: Scalar = 0.0,
    scale: Scalar = 1.0,
    clip: Scalar = jnp.inf,
) -> Float[Array, "*batch"]:
    """``(kl_coef (chosen - rejected) + offset) / scale``, within ``[-clip, clip]``.

    ``kl_coef`` may be one number per pair. Beyond the clip there is no gradient.
    """
    numerics.check_positive("kl_coef", kl_coef)
    found = kl_coef * (score[..., 0] - second(score))
    if not isinstance(offset, float) or offset:
        found = found + offset
    if not isinstance(scale, float) or scale != 1:
        numerics.check_positive("scale", scale)
        found = found / scale
    if isinstance(clip, float) and clip == jnp.inf:
        return found
    return jnp.clip(found, -clip, clip)


def logistic(
    margin: Float[Array, "*batch"],
    *,
    label: Scalar = 1.0,
    preference: PreferenceModel = preferences.bradley_terry,
) -> Float[Array, "*batch"]:
    """The likelihood of a label under a preference model: proper, so the law is the model's own."""
    return preference.nll(margin, label=label)


def squared(margin: Float[Array, "*batch"], *, target: Scalar) -> Float[Array, "*batch"]:
    """Squared error to a target margin: a regression, whose fixed point depends on the pairs."""
    return (margin - target) ** 2


def hinge(margin: Float[Array, "*batch"], *, target: Scalar = 1) -> Float[Array, "*batch"]:
    """``max(0, target - margin)``. The population's minimizer depends on the pairs."""
    return jax.nn.relu(target - margin)


def robust(margin: Float[Array, "*batch"], *, flip_rate: Scalar) -> Float[Array, "*batch"]:
    """Unbiased estimate of the clean logistic loss from labels flipped at a rate below 1/2."""
    numerics.check_between(
        "flip_rate", flip_rate, 0, 0.5, high_open=True,
        why="labels that are wrong more often than right should be swapped; at 0.5 they carry no "
        "information",
    )  # fmt: skip
    right, wrong = bradley_terry.nll(margin), bradley_terry.nll(-margin)
    return ((1 - flip_rate) * right - flip_rate * wrong) / (1 - 2 * flip_rate)


def moved_reference(
    ref_log_prob: Float[Array, "*batch responses"],
    log_prob: Float[Array, "*batch responses"],
    *,
    share: Scalar,
) -> Float[Array, "*batch responses"]:
    r"""TR-DPO's soft update of laws, :math:`\pi_0^{1-a} \pi^a`, up to a constant per context.

    With exact steps round t, from 1, has the Gibbs law at :math:`\eta / (1 + a (t - 1))`: a moving
    reference is a schedule of eta, and has no fixed point. (Averaging the *weights* of two networks
    is something else.) Source: arXiv 2404.09656; the law is derived here. ``share`` is a.
    """
    numerics.check_between("share", share, 0, 1)
    return (1 - share) * ref_log_prob + share * log_prob
