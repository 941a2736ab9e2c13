r"""Many rewards of one trunk: ensemble members, objectives, groups or users as heads.

.. math:: r_m(x, y) = w_m^T \phi(x, y)

The trunk reads prompts and responses once, whatever the number of heads: eight cost little more
than one. What comes out is ``[members, B, K]``, which :mod:`core.aggregate` makes one reward of and
:mod:`core.saddle` plays against a policy. ``RewardParams.head`` is ``[M, D]``.

Axes: ``M`` heads, ``B`` prompts, ``K`` responses, ``D`` hidden size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import reward as single
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.reward import RewardParams


def init(
    key: Key[Array, ""], *, members: int, dim: int, scale: float | None = None
) -> Float[Array, "M D"]:
    """Random heads, each as :func:`models.reward.init_head`: a shared trunk, different heads."""
    draw = lambda k: single.init_head(k, dim=dim, scale=scale)  # noqa: E731
    return jax.vmap(draw)(jax.random.split(key, members))


def rewards(
    model: LanguageModel,
    params: RewardParams,
    prompts: Ragged,
    responses: Ragged,
    *,
    pooling: Callable[[Array, Array, Array], Array] = single.last,
) -> Float[Array, "M B K"]:
    """Every head's reward of each response, by one forward pass; differentiable in both.

    Raises:
        ValueError: where ``params.head`` is one head, ``[D]``.
    """
    if params.head.ndim != 2:
        raise ValueError(
            f"head has shape {params.head.shape}, expected [members, dim]; models.reward.reward "
            "is for one head, heads.init makes several"
        )
    found = single.features(model, params.model, prompts, responses, pooling=pooling)
    return jax.vmap(single.score, in_axes=(0, None))(params.head, found)


def member(params: RewardParams, number: int) -> RewardParams:
    """One head with the trunk: a reward model of its own, to save or to load elsewhere."""
    return params._replace(head=params.head[number])


def per_user(weight: Float[Array, "B M"], rewards: Float[Array, "M B K"]) -> Float[Array, "B K"]:
    """Each prompt's own mixture of heads: a user's place among prototypes, or a direction."""
    return jnp.einsum("bm,mbk->bk", weight, rewards)
