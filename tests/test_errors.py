import pytest

from jax_klrlhf import errors


def test_bad_input_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stopped, errors.reported():
        raise errors.InputError("data.jsonl:3: no column 'chosen'; add it.")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: data.jsonl:3: no column 'chosen'; add it.\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"), errors.reported():
        raise ValueError("a bug")
