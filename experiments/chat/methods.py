"""The methods: the frontier's own, and what a proxy alone can do; each a value handed labels.

Every method but RSO is given as many of gold's labels: ``SFT on chosen`` and
``offline DPO`` all at once, on pairs of pi0's answers; ``online`` an equal part in each round;
``hybrid`` half and half. RSO has none of them: a proxy labels a pair at each prompt, of pi0's
answers that are accepted towards its Gibbs law. There is one RSO for each proxy.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Key

from experiments.chat.judges import PROXIES
from experiments.frontier.methods import (
    Cell,
    Parts,
    Run,
    dpo,
    hybrid,
    offline,
    online,
)
from jax_klrlhf.results import Metric
from jax_klrlhf.training import rounds, tasks
from jax_klrlhf.training.rounds.fitting import deal
from jax_klrlhf.training.rounds.improve import single_responses
from jax_klrlhf.training.rounds.parts import Improve, Improved, Reward, Situation, join, pick
from jax_klrlhf.training.rounds.run import Outcome

SFT, OFFLINE, ONLINE, HYBRID = "SFT on chosen", "offline DPO", "online GSHF-DPO", "hybrid GSHF-DPO"
LIKELIHOOD, GOLD, PROXY = "likelihood", "DPO on gold labels", "DPO on proxy labels"


class Method(NamedTuple):
    """How a cell is run, and by which training objective its learning rate is chosen."""

    run: Run
    objective: str
    proxy: str = "mean"
    """What it believes."""
    coefficient: bool = True
    """Whether it has a kl_coef."""


def chosen(parts: Parts, cell: Cell) -> Improve:
    """Maximum likelihood on the preferred answer of each pair."""
    del cell
    fit = parts.fitting.shared(
        ("chosen", parts.model), lambda: parts.fitting.compile(tasks.likelihood(parts.model))
    )

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        data = join(situation.data.sources)
        best = (data.label < 0.5).astype(np.int32)[:, None]
        rows = single_responses(data.prompts, pick(data.responses, best), data.weight[:, None])
        fitted = fit(key, situation.start, deal([rows]), folder=situation.folder)
        return Improved(fitted.params, fitted.metrics)

    return improve


def rejection(parts: Parts, cell: Cell) -> Improve:
    """RSO that proposes until every prompt has a pair: at a small kl_coef few are accepted."""
    return rounds.rso(
        parts.model, parts.propose, kl_coef=cell.kl_coef, fitting=parts.fitting, keep=2,
        passes="until", labelling=parts.labelling, rows=parts.rows,
    )  # fmt: skip


METHODS: Mapping[str, Method] = {
    SFT: Method(offline(chosen), LIKELIHOOD, coefficient=False),
    OFFLINE: Method(offline(dpo), GOLD),
    ONLINE: Method(online(), GOLD),
    HYBRID: Method(hybrid, GOLD),
    **{f"RSO, {proxy}": Method(offline(rejection), PROXY, proxy) for proxy in PROXIES},
}


def run(
    name: str,
    parts: Parts,
    cell: Cell,
    *,
    proxies: Mapping[str, Reward],
) -> Outcome:
    """Run a method with what it believes."""
    method = METHODS[name]
    return method.run(parts._replace(reward=proxies[method.proxy]), cell)


def pilot(objective: str) -> str:
    """The method whose pilots choose the learning rate of an objective."""
    return next(name for name, method in METHODS.items() if method.objective == objective)


def loss(outcome: Outcome, which: str = "loss") -> Metric:
    """Of the last fit, nats: the mean of its last steps, or ``loss/held_out``."""
    metrics: Any = outcome.metrics[-1]
    return metrics[which]
