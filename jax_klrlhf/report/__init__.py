"""Pages about runs and answers, each one HTML file that needs no network.

- :func:`side_by_side`: the same prompts answered by several policies;
- :func:`run.write`: a run, finished or going on (``klrlhf report``).
"""

from jax_klrlhf.report.answers import pieces, side_by_side

__all__ = ["pieces", "side_by_side"]
