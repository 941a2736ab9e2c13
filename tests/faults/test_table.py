"""The documentation's table of faults names tests that there are, and every file of them."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "howto" / "faults.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_of_the_table_is_there(file, name):
    assert re.search(rf"^def {name}\(", (HERE / file).read_text(), re.MULTILINE)


def test_every_row_has_its_test_and_every_slow_test_its_row():
    assert len(NAMED) == len(ROWS) > 15
    slow = set()
    for path in HERE.glob("test_*.py"):
        slow |= set(
            re.findall(r"^@slow\n(?:[#@].*\n)*def (test_\w+)", path.read_text(), re.MULTILINE)
        )
    assert slow
    assert slow <= {name for _, name in NAMED}
