"""The core serves both worlds: counted, so that it stays so."""

import functools

from tests import callers

reached = functools.cache(callers.reached)


def test_most_of_the_core_is_reached_from_both_worlds_and_nothing_from_neither():
    """A function that only its own test calls is shown to a user, in a page that runs, or goes."""
    found = reached()
    assert sum(len(by) == 2 for by in found.values()) >= 150
    assert [name for name, by in found.items() if not by] == []


def test_the_walk_follows_names_through_the_core():
    """Controls: through a value and a default, and not to what merely has the same name."""
    trees = callers.modules()
    edges = callers.graph(trees)
    assert "enhancer.option_one" in edges["pairs.enhancer"]  # a default value
    assert "ellipsoid.whiten" in edges["ellipsoid.norm"]
    assert "ellipsoid.init" not in edges["ellipsoid.norm"]
    found = reached()
    assert found["pairs.best_worst"] == {callers.BANDIT, callers.LANGUAGE}
    assert found["sequence.token_log_prob"] == {callers.LANGUAGE}
