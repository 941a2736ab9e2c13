r"""Policy improvement from the policy's own draws: regression on rewards, and policy gradients.

.. math:: \text{draw } a_{1..K} \sim \pi_\theta(\cdot|x), \quad \text{score } r, \quad
          \theta \leftarrow \theta - \nabla\, \ell(\text{group})

again and again, with any ``loss(group)`` of :mod:`core.group_losses`: RLOO, GRPO and its
relatives, PRDP, or one's own. The reward is what the run believes (a reward model, an ensemble, a
judge), the reference the situation's. The optimizer goes on from one draw to the next.

A draw is taken under the policy as it is sampled, and trained on as it is *scored*; in another
precision these are two laws. ``drawn/sampler_scorer_mismatch`` reports how far apart they are, and
``importance_limit`` weighs each response by their (truncated) ratio.

Axes: ``B`` prompts, ``K`` responses, ``C`` response positions.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jax_klrlhf.core import policy_gradient, regression
from jax_klrlhf.core.group_losses import GroupLoss
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.results import Metric, mean
from jax_klrlhf.training import loop
from jax_klrlhf.training.checkpoint import Checkpoints
from jax_klrlhf.training.group import GroupBatch, group
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.fitting import Deal, Fitting
from jax_klrlhf.training.rounds.parts import Improve, Improved, Situation, ragged
from jax_klrlhf.training.rounds.samplers import Draw
from jax_klrlhf.training.state import cast_floating


def on_policy(
    model: LanguageModel,
    draw: Draw,
    loss: GroupLoss,
    *,
    fitting: Fitting,
    iterations: int,
    prompts: int | None = None,
    informative_only: bool = False,
    importance_limit: float | None = None,
    quantiles: int | None = None,
    rows: int = 64,
) -> Improve:
    """Improve the policy by ``iterations`` draws of its own, each followed by a few steps.

    Args:
        model: the policy.
        draw: K responses to each of the round's prompts, at temperature 1 and from the whole law:
            the gradient is that of the law that is drawn from.
        loss: ``loss(group) -> [B]``.
        fitting: optimizer and sizes; ``steps`` are those after each draw, on batches of
            ``batch_size`` *prompts*. One pass over the draws is on-policy; more are stale.
        iterations: how often is drawn.
        prompts: of each draw, one portion of the round's after the other, from the first again;
            None: all of them.
        informative_only: drop prompts whose rewards are all equal (DAPO's filter).
        importance_limit: weigh each response by scored over sampled probability, at most this.
        quantiles: replace each reward by its quantile among those of so many draws of the
            reference (QRPO).
        rows: prompts that are scored at one time.

    Reports the last steps' metrics (:data:`.group.NAMES`), and of the last draw ``reward/drawn``
    and ``groups/informative``.

    A fit with a folder is saved after the first draw's steps that end ``fitting.save_every`` steps
    after the last save, and goes on from there to the same bits.

    Raises:
        ValueError: where the numbers are out of range, ``draw`` is of another law than the
            policy's, ``fitting`` holds rows out, or no prompt is informative.
    """
    for name, count in (("iterations", iterations), ("prompts", prompts), ("quantiles", quantiles)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if draw.samples < 2:
        raise ValueError(f"a group has at least two responses, got samples={draw.samples}")
    if draw.temperature != 1.0 or draw.top_k is not None or draw.top_p is not None:
        raise ValueError(
            "on_policy draws from the policy itself: temperature 1, without top_k and top_p; of "
            "another law its gradient would be another's"
        )
    if importance_limit is not None and not importance_limit > 0:
        raise ValueError(f"importance_limit must be positive, got {importance_limit}")
    if fitting.held_out:
        raise ValueError("held_out is a share of data that stay; on_policy draws its own anew")
    task = group(model, loss, importance_limit=importance_limit)
    begin = fitting.begin(task)

    def tokens(params: Any, prompts: Ragged, responses: Ragged) -> Array:
        params = cast_floating(params, fitting.compute_dtype)
        return scoring.token_log_prob(model, params, prompts, responses)

    score = fitting.shared(
        ("tokens", model, rows), lambda: mapped(tokens, rows=rows, mesh=fitting.mesh, narrow=False)
    )

    of_reference = None if quantiles is None else dataclasses.replace(draw, samples=quantiles)

    def rewards(key: Any, asked: Ragged, responses: Ragged, situation: Situation) -> Any:
        reward = np.asarray(situation.score(asked, responses).reward, np.float32)
        if of_reference is None:
            return reward
        drawn = of_reference(key, situation.policies.reference, asked)
        below = np.asarray(situation.score(asked, drawn).reward, np.float32)
        return np.asarray(regression.quantile(jnp.asarray(reward), jnp.asarray(below)))

    def groups(
        key: Key[Array, ""], params: Any, asked: Ragged, situation: Situation
    ) -> tuple[GroupBatch, dict[str, Metric]]:
        key_draw, key_reference = jax.random.split(key)
        responses, sampled = draw.with_log_prob(key_draw, params, asked)
        # Any: NumPy, on the host, where the record says arrays.
        reward: Any = rewards(key_reference, asked, responses, situation)
        ref: Any = np.asarray(score(situation.policies.reference, asked, responses))
        useful = np.asarray(policy_gradient.informative(jnp.asarray(reward)))
        weight: Any = (
            useful.astype(np.float32) if informative_only else np.ones(len(reward), np.float32)
        )
        # The one step after a draw is at the parameters that drew, and scores them itself.
        old: Any = None if fitting.steps == 1 else np.asarray(score(params, asked, responses))
        batch = GroupBatch(
            asked, responses, weight, reward,
            ref_log_prob=ref, old_log_prob=old, sampled_log_prob=sampled,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        return batch, {
            "reward/drawn": mean(reward.mean(1)),
            "groups/informative": mean(useful.astype(np.float64)),
        }

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        key_state, key_data = jax.random.split(key)
        reference = situation.policies.reference
        step, state = begin(key_state, situation.start, pi0=reference)
        store = _store(situation.folder, fitting)
        metrics: dict[str, Metric] = {}
        every = fitting.save_every or 1
        try:
            if store is not None:
                state = loop.resume(store, state, loop.Repeat([()]), console=fitting.console).state
            for number in range(int(state.step) // fitting.steps, iterations):
                final, done = number == iterations - 1, (number + 1) * fitting.steps
                key_draw, key_rows = jax.random.split(jax.random.fold_in(key_data, number))
                asked = _portion(situation.prompts, number, prompts)
                batch, found = groups(key_draw, state.policy, asked, situation)
                keep = np.asarray(batch.weight) > 0
                if not keep.any():
                    raise ValueError(
                        f"on_policy, draw {number + 1} of {iterations}: at every prompt all "
                        "rewards are equal, so there is nothing to learn; draw more responses, or "
                        "take a reward that tells them apart."
                    )
                kept = jax.tree.map(lambda x, at=keep: np.asarray(x)[at], batch)
                outcome = loop.train(
                    step,
                    state,
                    Deal(kept, [int(keep.sum())], None).stream(
                        key_rows, batch_size=fitting.batch_size, mesh=fitting.mesh
                    ),
                    steps=done,
                    names=task.names,
                    log_every=fitting.log_every,
                    # After the last draw the result is about to be written anyway.
                    save_last=not final and done // every > (done - fitting.steps) // every,
                    evaluate=fitting.evaluate if final else None,
                    checkpoints=store,
                    limits=fitting.limits,
                    console=fitting.console,
                )
                state, metrics = outcome.state, {**outcome.metrics, **found}
        finally:
            if store is not None:
                store.close()
        return Improved(state.policy, metrics)

    return improve


def _portion(prompts: Ragged, number: int, count: int | None) -> Ragged:
    """The prompts of a draw: ``count`` of them, where the draw before left off."""
    if count is None:
        return prompts
    index = (np.arange(count) + number * count) % len(prompts.lengths)
    return ragged(np.asarray(prompts.ids)[index], np.asarray(prompts.lengths)[index])


def _store(folder: Path | None, fitting: Fitting) -> Checkpoints | None:
    return None if folder is None or fitting.save_every is None else Checkpoints(folder)
