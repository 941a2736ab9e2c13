"""KL-regularized preference learning: pure functions on arrays, for bandits and language models."""
