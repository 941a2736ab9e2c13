"""The one error a user of the programs is meant to see: what was wrong with the input, and the remedy."""


class InputError(ValueError):
    """Bad input: one line that names the path, line, column or shape, and what to do about it.

    Programs print the message and exit with status 2, without a traceback.
    """
