"""The registry of objectives: every name resolves, every law is said, every choice is read."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import catalogue, group_losses, objectives, onesided

OWN = {
    f"core.{module.__name__.rpartition('.')[2]}.{name}"
    for module in (objectives, onesided, group_losses)
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
}
NO_LOSSES = {"core.objectives.weighted", "core.group_losses.from_actions"}


@pytest.mark.parametrize("path", sorted(OWN - NO_LOSSES - {"core.objectives.wpo_weight"}))
def test_every_objective_states_its_law_and_has_a_name(path):
    """The law stands in the docstring, after "Law:"; or that there is none."""
    (entry,) = [entry for entry in catalogue.ENTRIES if entry.path == path]
    said = catalogue.law(entry.function())
    assert said, path
    assert entry.law is None  # not said a second time


def test_every_entry_has_a_law_or_a_reason():
    names = [entry.name for entry in catalogue.ENTRIES]
    assert len(set(names)) == len(names)
    for entry in catalogue.ENTRIES:
        if entry.path is None:
            assert entry.note, entry.name
        else:
            assert entry.law or catalogue.law(entry.function()), entry.name
    table = catalogue.table()
    assert table.count("\n") == len(names) + 2
    assert "?" not in table
    assert ":func:" not in table


def test_a_law_is_one_sentence():
    def loss():
        """A loss. Law: Gibbs at 0.5, unless
        clipped. Source: none.
        """

    assert catalogue.law(loss) == "Gibbs at 0.5, unless clipped"
    assert catalogue.law(test_every_entry_has_a_law_or_a_reason) is None


@pytest.mark.slow
def test_weighed_methods_are_those_that_read_importance():
    rng = np.random.default_rng(0)
    old, ref = jnp.asarray(-rng.exponential(size=(2, 2, 4)), jnp.float32)
    reward = jnp.asarray(rng.uniform(size=(2, 4)), jnp.float32)

    def gradient(name, importance):
        make, given = catalogue.METHODS[name], {}
        needs = inspect.signature(make).parameters
        if "kl_coef" in needs:
            given["kl_coef"] = 0.5
        if name == "dr_grpo":
            given["size"] = 1
        if name == "clipped":
            given |= {"advantage": catalogue.CHOICES["advantage"]["by_std"], "low": 0.2}
            given |= {"high": 0.2, "mean": "group"}
        loss = make(**given)

        def of(log_prob):
            group = group_losses.from_actions(log_prob, reward, ref_log_prob=ref, old_log_prob=old)
            return jnp.sum(loss(group._replace(importance=importance)))

        return jax.grad(of)(old)

    weight = jnp.asarray(rng.uniform(0.5, 2, size=(2, 4)), jnp.float32)
    for name in catalogue.METHODS:
        same = np.allclose(gradient(name, None), gradient(name, weight), rtol=1e-6)
        assert same != (name in catalogue.WEIGHED), name


def test_words_and_keywords_meet():
    """A keyword that has words is one of some method, and every word makes what it stands for."""
    taken = {p for make in catalogue.METHODS.values() for p in inspect.signature(make).parameters}
    assert set(catalogue.CHOICES) <= taken
