"""One reward or many: what is gained on the real choices of people who differ.

* Train tickets: 235 people, 2,929 choices between two tickets.
* Cars: 4,654 people, *one* choice among six cars each, read as five comparisons of weight 1/5:
  nothing identifies a group but the choice itself, so none can be used for a new person (the
  control).

Some people are known, the others are new. A new person's first labels are revealed one after the
other; everything is scored on the same later choices of theirs: log-likelihood per choice, person
by person, its mean over the worst-off tenth, and calibration.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from rich.console import Console

from experiments import choices as recorded
from experiments import plotting, study
from jax_klrlhf import results
from jax_klrlhf.bandit import human
from jax_klrlhf.core import estimation, measure, mixture, posterior, saddle
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.errors import InputError

METHODS = (
    "one reward",
    "EM groups, routed",
    "PAL prototypes",
    "own posterior (Laplace)",
    "own estimate (plug-in)",
    "MaxMin reward",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Preference models of people who differ."""

    choices_dir: Path
    """Folder with train_tickets.npz and cars.npz."""
    output: Path = Path("results/pluralism")
    """Where results.json and pluralism.png go."""
    datasets: tuple[str, ...] = recorded.DATASETS
    """Which of the two to run."""
    splits: int = 8
    """Random halves of the people."""
    seed: int = 0
    """Root of all randomness."""
    groups: int = 3
    """Groups and prototypes."""
    labels: tuple[int, ...] = (0, 1, 2, 4, 8)
    """How many of a new person's choices are revealed."""
    ridge: float = 0.1
    share: float = 5.0
    """What all known people's choices together count in a person's own fit, in choices."""
    car_people: int = 4654
    """Cars: people taken (at random by the seed, where not all), half of them known."""
    smoke: bool = False
    """Two splits of few people, to see that it runs."""

    def resized(self) -> "Config":
        """This, or the small size if smoke was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, splits=2, groups=2, labels=(0, 4), car_people=60, datasets=self.datasets[:1]
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.splits < 2:
            raise InputError(f"--splits {self.splits}: a standard error needs at least two.")
        recorded.check(self.choices_dir, self.datasets)


class People(NamedTuple):
    """Comparisons by person, padded; ``weight`` 0 where there is none."""

    differences: Float[Array, "people rows dim"]
    label: Float[Array, "people rows"]
    weight: Float[Array, "people rows"]


def open_people(name: str, config: Config) -> People:
    """Read a data set; InputError where the file is missing or not what it should be."""
    choices = recorded.read(config.choices_dir, name)
    data = human.comparisons(choices)
    x = choices.features
    context, first, second = (np.asarray(v) for v in (data.context, data.first, data.second))
    z = x[context, first] - x[context, second]
    weight = np.asarray(data.weight)
    person = choices.person[context]
    # The chosen one comes first in the record: put the smaller number first, so that labels vary.
    swap = first > second
    z = np.where(swap[:, None], -z, z)
    label = np.where(swap, 0.0, 1.0)
    known = np.unique(person)
    if name == "cars":
        known = np.random.default_rng(config.seed).permutation(known)[: config.car_people]
    elif config.smoke:
        known = known[:40]
    rows = [np.flatnonzero(person == p) for p in known]
    longest = max(map(len, rows))
    shape = (len(rows), longest)
    differences = np.zeros((*shape, z.shape[1]), np.float32)
    labels, weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for k, index in enumerate(rows):
        differences[k, : len(index)] = z[index]
        labels[k, : len(index)] = label[index]
        weights[k, : len(index)] = weight[index]
    return People(jnp.asarray(differences), jnp.asarray(labels), jnp.asarray(weights))


class Learned(NamedTuple):
    """Of the known people."""

    single: Float[Array, " dim"]
    groups: mixture.Mixture
    prototypes: mixture.Prototypes
    maxmin: Float[Array, " dim"]


def learn(key: Array, people: People, known: Bool[Array, " people"], config: Config) -> Learned:
    """Every model of the known people."""
    count, rows, dim = people.differences.shape
    z, y = people.differences.reshape(-1, dim), people.label.reshape(-1)
    weight = jnp.where(known[:, None], people.weight, 0.0).reshape(-1)
    user = jnp.repeat(jnp.arange(count), rows)
    single = estimation.fit(z, y, ridge=config.ridge, weights=weight).theta
    found = mixture.fit(
        key, z, y, user, groups=config.groups, users=count, ridge=config.ridge, starts=2,
        steps=20, weights=weight,
    )  # fmt: skip
    hull = mixture.prototypes(
        z,
        y,
        user,
        start=found.theta,
        users=count,
        ridge=config.ridge,
        steps=2,
        weights=weight,
        most=rows,
    )
    # Every comparison is a context of two alternatives; groups' rewards are centred there.
    half = jnp.einsum("gd,nd->gn", found.theta, z) / 2
    rewards = jnp.stack([half, -half], -1)
    even = jnp.full((z.shape[0], 2), -jnp.log(2.0))
    share = weight / jnp.sum(weight)
    worst = saddle.simplex(rewards, even, kl_coef=1.0, context_prob=share).weight
    return Learned(single, found, hull, worst @ found.theta)


def predict(
    learned: Learned,
    people: People,
    known: Bool[Array, " people"],
    config: Config,
    labels: Scalar,
    *,
    reveals: bool,
) -> Float[Array, "methods people rows"]:
    """Probability of the label 1 of each person's rows, their first ``labels`` being known.

    Where nothing is revealed everybody's own models are one, and fitted once.
    """
    _, rows, dim = people.differences.shape
    crowd = people.differences.reshape(-1, dim), people.label.reshape(-1)
    crowd_weight = jnp.where(known[:, None], people.weight, 0.0).reshape(-1)
    crowd_weight = crowd_weight * (config.share / jnp.sum(crowd_weight))

    def told(z: Array, y: Array, heard: Array) -> tuple[Array, Array, posterior.Gaussian]:
        """Weights of the groups, place among the prototypes, own posterior."""
        margins = jnp.where(heard > 0, learned.groups.theta @ z.T, 0.0)
        log_weight = mixture.route(learned.groups.log_weight, margins, y)
        place = mixture.simplex(learned.prototypes.theta, z, y, weights=heard)
        both = jnp.concatenate([crowd[0], z]), jnp.concatenate([crowd[1], y])
        counted = jnp.concatenate([crowd_weight, heard])
        own = estimation.fit(*both, ridge=config.ridge, weights=counted, init=learned.single).theta
        hessian = estimation.hessian(own, both[0], ridge=config.ridge, weights=counted)
        return log_weight, place, posterior.laplace(own, hessian)

    nobody = None if reveals else told(people.differences[0], people.label[0], jnp.zeros(rows))

    def one(row: tuple[Array, Array, Array]) -> Array:
        z, y, weight = row
        heard = jnp.where(jnp.arange(rows) < labels, weight, 0.0)
        log_weight, place, own = told(z, y, heard) if nobody is None else nobody
        mean, variance = posterior.margin(own, z)
        return jnp.stack(
            [
                jax.nn.sigmoid(z @ learned.single),
                jnp.exp(log_weight) @ jax.nn.sigmoid(learned.groups.theta @ z.T),
                jax.nn.sigmoid(z @ (place @ learned.prototypes.theta)),
                posterior.probability(mean, variance),
                jax.nn.sigmoid(mean),
                jax.nn.sigmoid(z @ learned.maxmin),
            ]
        )

    found = jax.lax.map(one, (people.differences, people.label, people.weight), batch_size=32)
    return jnp.moveaxis(found, 1, 0)


class Score(NamedTuple):
    """Of the new people; one number for each method."""

    log_likelihood: Float[Array, " methods"]
    worst_tenth: Float[Array, " methods"]
    calibration: Float[Array, " methods"]


def score(
    prob: Float[Array, "methods people rows"],
    people: People,
    new: Bool[Array, " people"],
    first: int,
) -> Score:
    """On the rows from ``first`` on, of new people who have such rows."""
    _, rows, _ = people.differences.shape
    later = jnp.arange(rows) >= first
    weight = jnp.where(later[None] & new[:, None], people.weight, 0.0)
    total = weight.sum(-1)
    label = people.label[None]
    each = label * jnp.log(prob) + (1 - label) * jnp.log1p(-prob)
    by_person = jnp.sum(each * weight[None], -1) / jnp.where(total > 0, total, 1)[None]
    # Who is not scored stands above all others, and the share counts them out.
    scored = jnp.sum(jnp.where(total > 0, 1.0, 0.0))
    aside = jnp.where((total > 0)[None], by_person, jnp.inf)
    order = jnp.sort(aside, -1)
    tenth = jnp.arange(order.shape[1], dtype=order.dtype) < jnp.round(0.1 * scored)
    worst = jnp.sum(jnp.where(tenth[None], order, 0), -1) / jnp.sum(jnp.where(tenth, 1.0, 0.0))
    mean = jnp.sum(jnp.where((total > 0)[None], by_person, 0), -1) / scored
    margin = jnp.log(prob) - jnp.log1p(-prob)
    off = jax.vmap(
        lambda m: measure.calibration(
            m.reshape(-1), people.label.reshape(-1), weight=weight.reshape(-1)
        )
    )(margin)
    return Score(mean, worst, off)


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run every split, draw the figure, print the tables; returns the path of ``results.json``."""
    here = study.begin("pluralism", config, console=console)
    config, console = here.config, here.console
    found: dict[str, dict[int, list[Score]]] = {}
    for name in config.datasets:
        people = open_people(name, config)
        # Cars have one choice a person: nothing can be revealed and something be left.
        labels = config.labels if name == "train_tickets" else (0,)
        first = max(labels)
        fitted = jax.jit(lambda key, people, known: learn(key, people, known, config))
        scored = jax.jit(
            lambda learned, people, known, m, first=first: score(
                predict(learned, people, known, config, m, reveals=first > 0),
                people,
                ~known,
                first,
            )
        )
        found[name] = {m: [] for m in labels}
        for split in range(config.splits):
            draw = np.random.default_rng([config.seed, split])
            known = jnp.asarray(draw.permutation(people.label.shape[0]) % 2 == 0)
            learned = fitted(jax.random.key(split), people, known)
            for m in labels:
                numbers = jax.tree.map(np.asarray, scored(learned, people, known, jnp.array(m)))
                found[name][m].append(numbers)
            console.print(f"{name}: split {split + 1} of {config.splits}")
    metrics = _numbers(found)
    _print(found, metrics, console)
    _figure(found, here.output / "pluralism.png")
    return here.end(metrics, beside="pluralism.png")


def _numbers(found: dict[str, dict[int, list[Score]]]) -> dict[str, results.Metric]:
    """Means over splits; splits share people, so they are a little dependent."""
    metrics = {}
    for name, by_count in found.items():
        for m, splits in by_count.items():
            for k, method in enumerate(METHODS):
                at = f"{name}, {m} labels/{method}"
                for field in Score._fields:
                    values = np.array([getattr(s, field)[k] for s in splits])
                    plain = np.array([getattr(s, field)[0] for s in splits])
                    label = field.replace("_", " ")
                    metrics[f"{at}/{label}"] = results.mean(values)
                    if k:
                        metrics[f"{at}/{label} over one reward"] = results.mean(values - plain)
    return metrics


def _print(found, metrics: dict[str, results.Metric], console: Console) -> None:
    for name, by_count in found.items():
        for m in by_count:
            rows = {}
            for method in METHODS:
                at = f"{name}, {m} labels/{method}"
                rows[method] = {
                    label: metrics[f"{at}/{label}"]
                    for label in ("log likelihood", "worst tenth", "calibration")
                }
                gain = f"{at}/log likelihood over one reward"
                rows[method]["gain"] = metrics.get(gain, "")
            results.print_table(
                f"{name}: new people, {m} of their choices revealed", rows, console=console,
                caption="nats per later choice, mean over people; gain over one reward, paired; "
                "± one standard error over splits",
            )  # fmt: skip


def _figure(found: dict[str, dict[int, list[Score]]], target: Path) -> None:
    figure, axes = plotting.grid(1, 2)
    name = next(iter(found))
    counts = list(found[name])
    for column, field in enumerate(("log_likelihood", "worst_tenth")):
        for k, method in enumerate(METHODS):
            values = np.array([[getattr(s, field)[k] for s in found[name][m]] for m in counts]).T
            plotting.band(axes[0, column], counts, values, label=method, positive=False)
        plotting.label(
            axes[0, column], x="choices of a new person revealed", y="log-likelihood per choice",
            title=f"{name}: " + ("all people" if column == 0 else "the worst-off tenth"),
        )  # fmt: skip
    plotting.legend(figure)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
