r"""Warning signs of a policy under optimization, and where each of them is.

======================================= ==========================================================
sign                                    function
======================================= ==========================================================
likelihood is displaced                 :func:`displacement`
top-k entropy and mass, both early low  `diversity.top`; per token `scoring.score(top=k)`
states lose rank                        `diversity.effective_rank`
the policy jumps at ties of the reward  `measure.variation_bound`, tanh(span / 4 eta)
reward short of the frontier            `measure.frontier_gap`, never negative: else it is a bug
======================================= ==========================================================

Axes: ``batch`` (free), ``actions`` (what is chosen among), ``dim`` (of features or parameters).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.core import numerics


def displacement(
    features: Float[Array, "*batch actions dim"],
    log_prob: Float[Array, "*batch actions"],
    direction: Float[Array, "*batch dim"],
) -> Float[Array, "*batch actions"]:
    r"""How fast each log-probability moves along a step of the parameters.

    .. math:: \frac{d}{dt} \log \pi(a) = \kappa_a - E_\pi \kappa, \qquad
        \kappa_a = \langle \phi_a, d \rangle

    for a softmax-linear policy with features phi, or any policy's with phi its gradient of the
    logits. The step of any loss of the margin is along d = phi_w - phi_l, so **the chosen
    response's likelihood falls where kappa_w is below the policy's mean**, whatever the loss, while
    the margin grows: a third response with features nearer to d takes the mass. [derived]

    >>> features = jnp.array([[1.0], [0.0], [2.0]])
    >>> moved = displacement(features, jnp.log(jnp.array([0.2, 0.2, 0.6])), jnp.array([1.0]))
    >>> [round(float(x), 1) for x in moved]  # the first is chosen over the second, and falls
    [-0.4, -1.4, 0.6]
    """
    kappa = jnp.sum(features * direction[..., None, :], -1)
    return kappa - numerics.expectation(log_prob, kappa)[..., None]
