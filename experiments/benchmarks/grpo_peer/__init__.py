"""TRL's side of `experiments.benchmarks.grpo`, for the interpreter of an environment with TRL."""
