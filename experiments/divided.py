"""Work divided over processes, each on its share of the cores.

A model of a few hundred thousand parameters does not fill a core: cores do more apart than
together. What a process makes it leaves on disk; whoever divided the work reads it there.
"""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_klrlhf.errors import InputError

Parts = Sequence[Any] | Callable[[], Sequence[Any]]


def over_processes(*stages: tuple[Callable[[Any], None], Parts], workers: int) -> None:
    """``work(part)`` for every part of a stage ``(work, parts)``, and then for those of the next,
    in at most ``workers`` processes, which stay: what they compiled serves all stages.

    Args:
        stages: ``work`` is a function of a module, a part can be pickled; a function of no
            argument gives a stage's parts once the stages before it are done.
        workers: as ``--workers``.

    Raises:
        InputError: on an accelerator, or what ``work`` raised in its process; the parts that have
            not begun are given up.
    """
    if jax.default_backend() != "cpu":
        raise InputError(
            f"--workers {workers}: processes cannot share the {jax.default_backend()}; "
            "leave it out, or set JAX_PLATFORMS=cpu."
        )
    known = [len(parts) for _, parts in stages if not callable(parts)]
    if len(known) == len(stages):
        workers = max(1, min(workers, max(known)))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    context = multiprocessing.get_context("spawn")  # A fork would inherit JAX's threads.
    places = context.Queue()
    for worker in range(workers):
        places.put(cores[worker::workers])
    before = dict(os.environ)
    # NumPy's BLAS counts the cores before it is pinned, and its threads would spin on those few.
    share = str(len(cores[::workers]) or 1)
    os.environ |= {"OPENBLAS_NUM_THREADS": share, "OMP_NUM_THREADS": share}
    try:
        with concurrent.futures.ProcessPoolExecutor(
            workers, context, initializer=_pin, initargs=(places,)
        ) as pool:
            try:
                for work, parts in stages:
                    there = parts() if callable(parts) else parts
                    begun = [pool.submit(work, part) for part in there]
                    for done in concurrent.futures.as_completed(begun):
                        done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        os.environ.clear()
        os.environ.update(before)


def _pin(places: Any) -> None:
    """Keep this process to its share of the cores; before JAX counts them."""
    if cores := places.get():
        os.sched_setaffinity(0, cores)
