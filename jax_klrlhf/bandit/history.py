r"""All comparisons seen so far, in the smaller of two exact forms.

A likelihood that is linear in the label, as Bradley-Terry's is, depends on the data only through
how often each action beat each other in each context. So where pairs (contexts x actions
(actions - 1) / 2) aren't many times the comparisons to come, a **tally** of wins holds everything,
memory doesn't grow with rounds, and a refit costs the same in the last round as in the first.
Otherwise **rows** are kept, one per comparison, in a buffer of the run's length. Both give the same
:class:`View`, up to its order.
Where labels may not be merged (``preference.merges`` of the setting: a win and a loss are not two
ties), there are rows always.

Axes: ``rows`` (pairs of a tally, or comparisons), ``batch`` (new comparisons).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.bandit.problem import Duels, Setting


class View(NamedTuple):
    """Weighted comparisons: in ``context``, ``first`` won ``wins`` and lost ``losses`` times."""

    context: Int[Array, " rows"]
    first: Int[Array, " rows"]
    second: Int[Array, " rows"]
    wins: Float[Array, " rows"]
    losses: Float[Array, " rows"]


def labelled(rows: View) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """The mean label of each row, and its weight: what a fit takes."""
    count = rows.wins + rows.losses
    return rows.wins / jnp.where(count > 0, count, 1), count


class Tally(NamedTuple):
    """Wins and losses of every pair of actions in every context."""

    wins: Float[Array, "contexts pairs"]
    losses: Float[Array, "contexts pairs"]


class Ordered(NamedTuple):
    """Of every pair in the order in which it was asked, an action against itself included."""

    wins: Float[Array, "contexts actions actions"]
    losses: Float[Array, "contexts actions actions"]


class Rows(NamedTuple):
    """Comparisons in order of arrival; those from ``used`` on are still empty."""

    view: View
    used: Int[Array, ""]


History = Tally | Ordered | Rows

TALLY_ADVANTAGE = 8
"""A tally is used up to this many times as long as the rows: its differences are those of the
problem, which all seeds share, and a refit over shared differences is about ten times faster."""


def init(setting: Setting, *, capacity: int, ordered: bool = False) -> History:
    """An empty history for at most ``capacity`` comparisons.

    With ``ordered`` it also knows who stood first: for a loss in which the second explored.
    """
    contexts, actions, _ = setting.features.shape
    dtype = setting.features.dtype
    pairs = actions**2 if ordered else actions * (actions - 1) // 2
    if setting.preference.merges and contexts * pairs <= TALLY_ADVANTAGE * capacity:
        if ordered:
            return Ordered(*(jnp.zeros((contexts, actions, actions), dtype) for _ in range(2)))
        return Tally(jnp.zeros((contexts, pairs), dtype), jnp.zeros((contexts, pairs), dtype))
    index, number = jnp.zeros(capacity, jnp.int32), jnp.zeros(capacity, dtype)
    return Rows(View(index, index, index, number, number), jnp.zeros((), jnp.int32))


def append(history: History, data: Duels, *, ordered: bool = False) -> History:
    """Add comparisons. A pair of one action with itself says nothing and isn't counted.

    Unless the history is ``ordered``: it says what explored.
    """
    informative = (data.first != data.second) | ordered
    weight = jnp.where(informative, data.weight, 0)
    wins, losses = weight * data.label, weight * (1 - data.label)
    if isinstance(history, Ordered):
        at = (data.context, data.first, data.second)
        return Ordered(history.wins.at[at].add(wins), history.losses.at[at].add(losses))
    if isinstance(history, Tally):
        actions = _actions(history)
        low, high = jnp.minimum(data.first, data.second), jnp.maximum(data.first, data.second)
        # Row-major position of (low, high) above the diagonal; see _pairs.
        pair = low * actions - low * (low + 1) // 2 + high - low - 1
        pair = jnp.where(informative, pair, 0)
        swapped = data.first > data.second
        at = (data.context, pair)
        return Tally(
            history.wins.at[at].add(jnp.where(swapped, losses, wins)),
            history.losses.at[at].add(jnp.where(swapped, wins, losses)),
        )
    new = View(data.context, data.first, data.second, wins, losses)
    # Beyond the capacity rows are dropped, not written over others; `overfull` tells.
    at = history.used + jnp.arange(data.context.shape[0], dtype=jnp.int32)
    merged = jax.tree.map(
        lambda old, row: old.at[at].set(row.astype(old.dtype), mode="drop"), history.view, new
    )
    return Rows(merged, history.used + data.context.shape[0])


def overfull(history: History) -> Bool[Array, ""]:
    """Whether comparisons had to be dropped for want of capacity; never with a tally."""
    if not isinstance(history, Rows):
        return jnp.zeros((), bool)
    return history.used > history.view.wins.shape[0]


def view(history: History) -> View:
    """The comparisons as weighted rows; empty rows have no wins and no losses."""
    if isinstance(history, Rows):
        return history.view
    contexts = history.wins.shape[0]
    low, high = _pairs(history)
    pairs = len(low)
    return View(
        jnp.asarray(np.repeat(np.arange(contexts, dtype=np.int32), pairs)),
        jnp.asarray(np.tile(low, contexts)),
        jnp.asarray(np.tile(high, contexts)),
        history.wins.reshape(-1),
        history.losses.reshape(-1),
    )


def differences(setting: Setting, history: History) -> Float[Array, "rows dim"]:
    """``phi(x, first) - phi(x, second)`` of every row of the view."""
    if isinstance(history, Rows):
        rows = history.view
        return (
            setting.features[rows.context, rows.first]
            - (setting.features[rows.context, rows.second])
        )
    low, high = _pairs(history)
    z = setting.features[:, low] - setting.features[:, high]
    return z.reshape(-1, z.shape[-1])


def both(setting: Setting, rows: View) -> Float[Array, "rows 2 dim"]:
    """``phi(x, first)`` and ``phi(x, second)`` of every row."""
    pair = jnp.stack([rows.first, rows.second], -1)
    return setting.features[rows.context[:, None], pair]


def margins(
    setting: Setting, history: History, theta: Float[Array, " parameters"]
) -> Float[Array, " rows"]:
    """``r_theta(x, first) - r_theta(x, second)`` of every row of the view."""
    if setting.reward_class.is_linear:
        return differences(setting, history) @ theta  # one difference, not one of two rewards
    rows, reward = view(history), setting.reward(theta)
    return reward[rows.context, rows.first] - reward[rows.context, rows.second]


def _actions(tally: Tally) -> int:
    """Inverse of ``pairs = actions (actions - 1) / 2``."""
    return round((1 + (1 + 8 * tally.wins.shape[-1]) ** 0.5) / 2)


def _pairs(history: Tally | Ordered) -> tuple[np.ndarray, np.ndarray]:
    """First and second action of each pair of a context, in the order of the counts."""
    if isinstance(history, Ordered):
        actions = history.wins.shape[-1]
        low, high = (x.ravel() for x in np.mgrid[:actions, :actions])
    else:
        low, high = np.triu_indices(_actions(history), 1)
    return low.astype(np.int32), high.astype(np.int32)
