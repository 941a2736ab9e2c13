"""One contender of the DPO benchmark each, run by its own interpreter: ``python -m ... job.json``.

The job names the model's folder, the pairs in token ids and what to measure; the answers are lines
of JSON. See :mod:`.serve`, which needs the standard library alone.
"""
