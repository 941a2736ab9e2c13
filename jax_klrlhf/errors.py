"""The one error that a user of the programs is meant to see."""


class InputError(ValueError):
    """Bad input: one line that names the path, line, column or shape, and what to do about it.

    Programs print the message and exit with status 2, without a traceback.
    """
