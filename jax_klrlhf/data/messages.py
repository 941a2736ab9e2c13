"""What came from a file, cut to what a one-line message has room for."""

from typing import Any


def short(value: Any, length: int = 60) -> str:
    """A value as Python writes it, its middle left out where it is long."""
    try:
        text = repr(value[: 4 * length] if isinstance(value, str | bytes | list) else value)
    except ValueError:  # an integer of thousands of digits is not written out
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value"
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= length else text[: length - 13] + "..." + text[-10:]


def first_line(error: BaseException) -> str:
    """An error's own words, as far as they fit on a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
