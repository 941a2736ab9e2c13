"""The law of every pair rule and of every agent, in NumPy, from its definition and not its code.

A *set* is what may be chosen in one context: `ids`, `mass`, `reward`, `phi`, all per choice, copies
merged. A law is ``P[i, j]``, the probability that the pair is (i, j), over the ids of the world;
what is left of 1 is the probability that there is no pair.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats


@dataclass
class Set:
    ids: np.ndarray
    mass: np.ndarray
    reward: np.ndarray
    phi: np.ndarray
    inverse: np.ndarray
    """Sigma^-1."""
    ref: np.ndarray
    """log pi0."""


def width(given, v):
    return float(v @ given.inverse @ v)


def curvature(margin):
    return 1 / (2 + np.exp(margin) + np.exp(-margin))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normal(weight):
    return weight / weight.sum() if weight.sum() > 0 else weight


def top(score, allowed):
    """Uniform over the largest allowed scores."""
    if not allowed.any():
        return np.zeros(len(score))
    best = max(score[allowed])
    return normal((allowed & np.isclose(score, best, rtol=1e-9, atol=1e-12)).astype(float))


def two_step(first, second_given):
    """``first [n]`` and ``second_given(i) [n]`` to ``[n, n]``."""
    n = len(first)
    return np.stack([first[i] * second_given(i) if first[i] else np.zeros(n) for i in range(n)])


def others(n, i):
    return np.arange(n) != i


def drop_ties(law, reward):
    return np.where(reward[:, None] == reward[None, :], 0.0, law)


def best_worst(s):
    n, every = len(s.ids), np.ones(len(s.ids), bool)
    law = two_step(top(s.reward, every), lambda i: top(-s.reward, others(n, i)))
    return drop_ties(law, s.reward)


def best_second(s):
    n, every = len(s.ids), np.ones(len(s.ids), bool)
    law = two_step(top(s.reward, every), lambda i: top(s.reward, others(n, i)))
    return drop_ties(law, s.reward)


def best_random(s):
    n, every = len(s.ids), np.ones(len(s.ids), bool)
    law = two_step(top(s.reward, every), lambda i: normal(s.mass * others(n, i)))
    return drop_ties(law, s.reward)


def sampled(s):
    return two_step(s.mass, lambda i: normal(s.mass * others(len(s.ids), i)))


def widest_pair(s, weight, inverse):
    n = len(s.ids)
    gain = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        z = s.phi[i] - s.phi[j]
        gain[i, j] = weight(s.reward[i] - s.reward[j]) * (z @ inverse @ z)
    if not gain.max(initial=0) > 0:
        return np.zeros((n, n))
    hit = np.isclose(gain, gain.max(), rtol=1e-9) / 1.0
    return (hit + hit.T) / (2 * hit.sum())


def most_uncertain(s):
    return widest_pair(s, curvature, s.inverse)


def widest(s):
    return widest_pair(s, lambda margin: 1.0, s.inverse)


def information(margin, variance):
    """Mutual information of a label and its margin, normal with these moments; by quadrature."""
    nodes, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()
    chance = sigmoid(margin + np.sqrt(variance) * nodes)

    def entropy(p):
        return -(p * np.log(p) + (1 - p) * np.log1p(-p))

    return entropy(weight @ chance) - weight @ entropy(chance)


def most_informative(s):
    """As the widest pair, by the information that its label has of theta."""
    n = len(s.ids)
    gain = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        spread = width(s, s.phi[i] - s.phi[j])
        gain[i, j] = information(s.reward[i] - s.reward[j], spread) if spread > 0 else 0
    if not gain.max(initial=0) > 0:
        return np.zeros((n, n))
    hit = np.isclose(gain, gain.max(), rtol=1e-7) / 1.0
    return (hit + hit.T) / (2 * hit.sum())


def without_sigma(s):
    """The mutant: the pair farthest apart in plain features."""
    return widest_pair(s, curvature, np.eye(s.phi.shape[1]))


def against(s, opponent):
    """``opponent [n]`` and the main agent's draw among the others."""
    n = len(s.ids)
    return two_step(opponent, lambda j: normal(s.mass * others(n, j))).T


def farthest(s):
    centre = s.mass @ s.phi
    far = np.array([width(s, phi - centre) for phi in s.phi])
    return against(s, top(far, s.mass > 0))


def reference(s):
    return against(s, normal(np.exp(s.ref) * (s.mass > 0)))


def reweighted(s, log_prob):
    """pi0 on draws, by importance: mass pi0 / pi."""
    return against(s, normal(s.mass * np.exp(s.ref - log_prob)))


def bracket(s, *, rounds, shuffled=True):
    """A random order, matches of neighbours by Bradley-Terry, one of all matches at random."""
    n = len(s.ids)
    law = np.zeros((n, n))
    orders = list(itertools.permutations(range(n))) if shuffled else [tuple(range(n))]

    def play(alive, matches, p, left):
        if len(alive) < 2 or left == 0:
            for i, j in matches:
                law[i, j] += p / (len(matches) * len(orders))
            return
        meet = [(alive[k], alive[k + 1]) for k in range(0, len(alive) - 1, 2)]
        bye = [alive[-1]] if len(alive) % 2 else []
        for wins in itertools.product([True, False], repeat=len(meet)):
            q, winners, now = p, [], []
            for (i, j), won in zip(meet, wins, strict=True):
                chance = sigmoid(s.reward[i] - s.reward[j])
                q *= chance if won else 1 - chance
                winners.append(i if won else j)
                now.append((i, j) if won else (j, i))
            play(winners + bye, matches + now, q, left - 1)

    for order in orders:
        play(list(order), [], 1.0, rounds)
    return law


def first_round(s):
    return bracket(s, rounds=1)


def tournament(s):
    return bracket(s, rounds=-1)


def unshuffled(s):
    """The mutant of a bracket: neighbours in the order they came."""
    return bracket(s, rounds=1, shuffled=False)


def tilt(sets, weight, *, kl_coef, radius):
    """Option I by brute force: 181 directions of the plane, the strongest tilt by bisection.

    `sets` are contexts of weights `weight`; returns the opponent's law in each. Dimension 2.
    """
    inverse, wide = sets[0].inverse, max(len(s.ids) for s in sets)
    mass, phi = np.zeros((len(sets), wide)), np.zeros((len(sets), wide, 2))
    for x, s in enumerate(sets):
        mass[x, : len(s.ids)], phi[x, : len(s.ids)] = s.mass, s.phi
    log_mass = np.log(np.where(mass > 0, mass, 1))

    def at(v, strength):
        score = np.where(mass > 0, phi @ v * strength, -np.inf)
        law = mass * np.exp(score - score.max(1, keepdims=True))
        law /= law.sum(1, keepdims=True)
        g = np.asarray(weight) @ np.einsum("xa,xad->xd", law - mass, phi)
        ratio = np.log(np.where(law > 0, law, 1)) - log_mass
        cost = kl_coef * (np.asarray(weight) @ (law * ratio * (law > 0)).sum(1))
        return law, float(np.sqrt(g @ inverse @ g)), cost

    def strongest(angle):
        v = np.array([np.cos(angle), np.sin(angle)])
        low, high = 0.0, 200.0
        for _ in range(40):
            middle = (low + high) / 2
            _, norm, cost = at(v, middle)
            low, high = (middle, high) if cost <= radius * norm else (low, middle)
        return at(v, low)

    angles = np.linspace(0, 2 * np.pi, 181)
    start = angles[np.argmax([strongest(a)[1] for a in angles])]
    best = optimize.minimize_scalar(
        lambda a: -strongest(a)[1], bounds=(start - 0.04, start + 0.04), method="bounded",
        options={"xatol": 1e-7},
    )  # fmt: skip
    law, norm, cost = strongest(best.x)
    return [row[: len(s.ids)] for row, s in zip(law, sets, strict=True)], norm, cost


def merged(sequence, world):
    """The set that a sequence of draws is: copies merged, in the order of their first."""
    ids = list(dict.fromkeys(sequence))
    mass = np.array([sequence.count(i) for i in ids]) / len(sequence)
    at = np.array(ids)
    return Set(at, mass, world.reward[at], world.phi[at], world.inverse, world.ref[at])


def over_draws(rule, world, samples):
    """The law of a rule on `samples` draws of a listed set, over all sequences of draws."""
    n = len(world.ids)
    law = np.zeros((n, n))
    for sequence in itertools.product(range(n), repeat=samples):
        p = np.prod(world.mass[list(sequence)])
        given = merged(sequence, world)
        if p > 0 and len(given.ids) > 1:
            law[np.ix_(given.ids, given.ids)] += p * rule(given)
    return law


def statistic(first, second, valid, law):
    """Chi-squared of pairs against a law, cells of less than 5 expected pooled; and its freedom."""
    n, total = len(law), len(first)
    count = np.zeros((n, n))
    np.add.at(count, (first[valid], second[valid]), 1)
    seen = np.append(count.ravel(), total - valid.sum())
    want = total * np.append(law.ravel(), max(0.0, 1 - law.sum()))
    small = want < 5
    seen = np.append(seen[~small], seen[small].sum())
    want = np.append(want[~small], want[small].sum())
    if want[-1] < 1e-6 * total:  # what cannot be: not once
        assert seen[-1] <= 5, f"{seen[-1]:.0f} pairs that the law excludes"
        seen, want = seen[:-1], want[:-1]
    return float(((seen - want) ** 2 / want).sum()), len(want) - 1


def rejected(first, second, valid, law, *, alarm=1e-6):
    """Whether pairs contradict a law, at a false-alarm rate of `alarm`; an exact law: any pair."""
    n = len(law)
    where = np.asarray(valid) & (law[np.asarray(first) % n, np.asarray(second) % n] <= 1e-12)
    if where.sum() > 5:
        return True
    found, freedom = statistic(np.asarray(first), np.asarray(second), np.asarray(valid), law)
    return freedom > 0 and found > stats.chi2.ppf(1 - alarm, freedom)
