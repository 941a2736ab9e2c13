"""Which data a round learns from: offline, online, hybrid (arXiv 2312.11456, sections 3 to 5).

A setting is ``setting(offline, history) -> Mixture``; ``history`` holds the rounds' comparisons,
oldest first. The refit from pi0 on *all* data so far is :func:`everything`.
"""

from collections.abc import Sequence

from jax_klrlhf.training.rounds.parts import Comparisons, DataRule, Mixture


def everything(offline: Comparisons | None, history: Sequence[Comparisons]) -> Mixture:
    """Offline data and every round's, all comparisons alike."""
    return Mixture([*_given(offline), *history], None)


def offline_only(offline: Comparisons | None, history: Sequence[Comparisons]) -> Mixture:
    """The offline data alone, however many rounds there were.

    Raises:
        ValueError: where there are none.
    """
    del history
    if offline is None:
        raise ValueError("offline_only: the run has no offline data; hand in offline=.")
    return Mixture([offline], None)


def history_only(offline: Comparisons | None, history: Sequence[Comparisons]) -> Mixture:
    """The rounds' own data; the offline data serve to begin with, before there are any."""
    return Mixture(list(history) or _given(offline), None)


def newest(offline: Comparisons | None, history: Sequence[Comparisons]) -> Mixture:
    """The last round's data alone: an ablation, which forgets."""
    return Mixture(list(history[-1:]) or _given(offline), None)


def hybrid(offline_share: float, *, newest_share: float | None = None) -> DataRule:
    """Offline data in every batch at a fixed share, history for the rest.

    Args:
        offline_share: share of every batch that offline data are given, in [0, 1].
        newest_share: share of the last round; None: the history's rounds are pooled.

    Raises:
        ValueError: where the shares are negative or exceed 1.
    """
    if not 0 <= offline_share <= 1 or not 0 <= (newest_share or 0.0) <= 1 - offline_share:
        raise ValueError(
            f"shares lie in [0, 1] and sum to at most 1: got offline {offline_share}, newest "
            f"{newest_share}"
        )

    def setting(offline: Comparisons | None, history: Sequence[Comparisons]) -> Mixture:
        if offline is None:
            raise ValueError("hybrid: the run has no offline data; hand in offline=.")
        if not history:
            return Mixture([offline], None)
        rest = 1 - offline_share
        # A share among rounds in the proportion of their rows is what pooling them means.
        older, last = list(history[:-1]), history[-1]
        if newest_share is None or not older:
            rows = [len(data.weight) for data in history]
            shares = [rest * count / sum(rows) for count in rows]
            return Mixture([offline, *history], [offline_share, *shares])
        rows = [len(data.weight) for data in older]
        left = rest - newest_share
        shares = [left * count / sum(rows) for count in rows]
        return Mixture([offline, *older, last], [offline_share, *shares, newest_share])

    return setting


def _given(offline: Comparisons | None) -> list[Comparisons]:
    return [] if offline is None else [offline]
