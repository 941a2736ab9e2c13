"""The top share of a choice set: on a law by hand, and on draws with ties and masks."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import choices, targets


def test_on_draws_it_is_the_best_ones_with_their_ties():
    rng = np.random.default_rng(0)
    reward = rng.integers(0, 4, (40, 8)).astype(np.float32)
    keep = rng.random((40, 8)) < 0.7
    keep[0] = False
    rows = np.broadcast_to(np.arange(8)[None, :, None], (40, 8, 1))
    made = choices.drawn(jnp.asarray(rows), where=jnp.asarray(keep), reward=jnp.asarray(reward))
    found = np.exp(targets.top(made, share=0.4))
    assert not found[0].any()
    for row in range(1, 40):
        kept = np.sort(reward[row][keep[row]])[::-1]
        if len(kept):
            least = kept[max(int(np.ceil(0.4 * len(kept) - 1e-9)), 1) - 1]
            taken = keep[row] & (reward[row] >= least)
            np.testing.assert_allclose(found[row], taken / taken.sum(), rtol=1e-6)


def test_on_a_law_it_is_the_upper_tail_in_its_own_proportions():
    law = np.array([0.4, 0.1, 0.2, 0.3], np.float32)
    reward = jnp.array([0.0, 3.0, 2.0, 1.0])
    every = choices.enumerated(jnp.log(jnp.asarray(law)), reward=reward)
    for share, number in ((0.05, 1), (0.1, 1), (0.11, 2), (0.5, 3), (0.61, 4), (1.0, 4)):
        best = np.argsort(-np.asarray(reward))[:number]
        wanted = np.zeros(4)
        wanted[best] = law[best] / law[best].sum()
        np.testing.assert_allclose(np.exp(targets.top(every, share=share)), wanted, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1])
def test_a_share_out_of_range_is_refused(share):
    every = choices.enumerated(jnp.zeros(2), reward=jnp.zeros(2))
    with pytest.raises(ValueError, match="share"):
        targets.top(every, share=share)
