"""Gold rewards: the judge that a simulated annotator has in mind and that no learner ever sees."""

from jax_klrlhf.programs.gold import WordReward, fit_sentiment

__all__ = ["WordReward", "fit_sentiment"]
