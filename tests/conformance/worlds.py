"""One small world three times: a bandit, its draws, and a language model of few responses.

One theta and one Sigma, fixed; four actions, or the three responses of a toy model. Rewards tie in
one context, so that what a rule does with ties shows.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_klrlhf import bandit
from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core import ellipsoid
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import enumerate as enumerated
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.parts import ragged
from tests.conformance.laws import Set
from tests.models import toy

ETA, DRAWS = 2.0, 20_000
THETA = np.array([1.5, -0.5])
SIGMA = np.array([[9.0, 4.0], [4.0, 2.5]])
PHI = np.array(
    [
        [[0.9, 0.1], [-0.3, 0.8], [0.1, -0.7], [-0.6, -0.5]],
        [[0.5, 0.5], [0.5, 0.5], [-0.2, 0.9], [0.0, -0.9]],
    ]
)
SAID = np.array([[[0.6, -0.5], [0.5, -0.6], [-0.2, -0.1]], [[0.5, 0.5], [0.5, 0.5], [-0.2, 0.9]]])
"""Features of the responses."""
PI0 = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.3, 0.2]])
CONTEXT = jnp.arange(DRAWS, dtype=jnp.int32) % 2


def problem():
    return bandit.from_arrays(
        jnp.array(PHI, "float32"),
        jnp.array(THETA, "float32"),
        kl_coef=ETA,
        ref_log_prob=jnp.log(jnp.array(PI0, "float32")),
    )


def ball():
    return ellipsoid.Ellipsoid(jnp.array(SIGMA, "float32"), jnp.ones(()))


def estimate(theta=THETA):
    """What a learner of the bandit knows: theta_hat, Sigma, and no data."""
    empty = bandit.greedy().init(problem().setting, capacity=4)
    return empty._replace(theta=jnp.array(theta, "float32"), ellipsoid=ball())


def gibbs(reward, log_pi0=None):
    weight = (np.log(PI0) if log_pi0 is None else log_pi0) + reward / ETA
    prob = np.exp(weight - weight.max(-1, keepdims=True))
    return prob / prob.sum(-1, keepdims=True)


def bandit_sets():
    """The two contexts as listed sets, under the Gibbs policy of theta."""
    mass = gibbs(PHI @ THETA)
    return [
        Set(np.arange(4), mass[x], PHI[x] @ THETA, PHI[x], np.linalg.inv(SIGMA), np.log(PI0[x]))
        for x in range(2)
    ]


class Language:
    """A toy model with three responses to each of two prompts, and features of its own."""

    model = toy.language_model(vocab=2)
    every = enumerated.responses(vocab_size=2, max_new_tokens=2, stop=(0,))
    prompts = Ragged(jnp.array([[1, 1], [0, 1]]), jnp.array([2, 1]))

    def __init__(self):
        self.params = self.model.init(jax.random.key(5))
        self.base = jax.tree.map(lambda x: 0.5 * x, self.params)
        self.phi = SAID
        self.listed = enumerated.choices(
            self.model,
            self.params,
            self.prompts,
            self.every,
            reference=self.base,
            reward=jnp.array(self.phi @ THETA, "float32"),
            features=jnp.array(self.phi, "float32"),
            ellipsoid=ball(),
        )
        log_prob, ref = self.listed.require("log_prob", "ref_log_prob", by="the sets")
        self.sets = [
            Set(
                np.arange(3),
                np.exp(np.asarray(log_prob[x], np.float64)),
                self.phi[x] @ THETA,
                self.phi[x],
                np.linalg.inv(SIGMA),
                np.asarray(ref[x], np.float64),
            )
            for x in range(2)
        ]

    def drawn(self, samples):
        """Responses of the real sampler to both prompts in turn, scored; and their numbers."""
        wide = ragged(
            np.asarray(self.prompts.ids)[np.asarray(CONTEXT)],
            np.asarray(self.prompts.lengths)[np.asarray(CONTEXT)],
        )
        draw = rounds.Draw(
            model=self.model, samples=samples, max_new_tokens=2, stop=(0,), rows=DRAWS
        )
        responses = draw(jax.random.key(6), self.params, wide)
        ids = np.asarray(responses.ids)
        same = (ids[:, :, None] == np.asarray(self.every.ids)[None, None]).all(-1)
        number = same.argmax(-1)
        row = np.asarray(CONTEXT)[:, None]
        white = self.phi @ np.linalg.inv(np.linalg.cholesky(SIGMA)).T
        scored = rounds.Scored(
            (self.phi @ THETA)[row, number].astype(np.float32),
            np.ones(number.shape, np.float32),
            white[row, number].astype(np.float32),
        )
        drawn = rounds.Drawn(wide, responses, np.zeros(number.shape, np.int32))
        return drawn, scored, number


def ask(learner: bandit.Learner, key) -> bandit.Proposal:
    """What a learner with theta and Sigma asks in both contexts in turn."""
    setting, state = problem().setting, estimate()
    return jax.jit(lambda k: learner.propose(k, setting, state, CONTEXT))(key)


def rows_of(every: choice_sets.Choices) -> choice_sets.Choices:
    """Both contexts of a listed set in turn, as many as there are draws."""
    return bandit.at_contexts(every, CONTEXT)
