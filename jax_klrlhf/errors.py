"""The one error that a user of the programs is meant to see, and how a program reports it."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """Bad input: one line that names the path, line, column or shape, and what to do about it.

    Programs print the message and exit with status 2, without a traceback.
    """


def meant(name: str, known: Iterable[str]) -> str:
    """``"; did you mean x?"`` where one of ``known`` is close to ``name``, else nothing.

    >>> meant("sigmoit", ["hinge", "sigmoid"])
    '; did you mean sigmoid?'
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Around a program's ``main``: an :class:`InputError` becomes one line and exit status 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
