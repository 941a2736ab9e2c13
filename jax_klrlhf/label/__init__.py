"""``klrlhf label``: a local page on which people compare two answers, and what their labels teach.

- :mod:`.pool`: prompts with their answers, and features of the answers;
- :mod:`.teaching`: the linear reward that the labels fit, its confidence, the set that shrinks;
- :mod:`.session`: who is asked what next, which side is which, agreement;
- :mod:`.server`: the page, on the loopback address unless asked otherwise;
- :mod:`jax_klrlhf.labelling`: the folder in which labels are kept.

In a notebook::

    from jax_klrlhf import label

    served = label.serve(label.Session("labels", pool=label.Pool.of(prompts, answers)), token=True)
    print(served.url)                              # open it, and label
    pairs = label.labelling.read_labels("labels")  # what was said so far
"""

from jax_klrlhf import labelling
from jax_klrlhf.label.pool import Pool
from jax_klrlhf.label.server import serve
from jax_klrlhf.label.session import Session
from jax_klrlhf.label.teaching import Taught, taught
from jax_klrlhf.report.serving import Served

__all__ = ["Pool", "Served", "Session", "Taught", "labelling", "serve", "taught"]
