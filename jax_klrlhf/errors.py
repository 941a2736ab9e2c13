"""The one error that a user of the programs is meant to see, and how a program reports it."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: one line that names the path, line, column or shape, and what to do about it.

    Programs print the message and exit with status 2, without a traceback.
    """


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Around a program's ``main``: an :class:`InputError` becomes one line and exit status 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
