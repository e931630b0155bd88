"""How a job meets its terminal."""

import io
import sys

import pytest

from raychat import cli

TEXT = "größer als 東京 🦊"


def writes(args):
    """A job that does nothing else."""
    sys.stdout.write(TEXT + "\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_letters_that_a_terminal_has_not_end_no_job(monkeypatch, errors):
    """As under PYTHONIOENCODING=ascii, and under LC_ALL=C without UTF-8 mode."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors=errors))
    with pytest.raises(SystemExit) as end:
        cli.run_job(writes)
    assert end.value.code == 0
    assert written.getvalue().decode("ascii") == TEXT.encode("ascii", "backslashreplace").decode() + "\n"


def test_a_stream_that_encodes_nothing_is_left_as_it_is(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    with pytest.raises(SystemExit):
        cli.run_job(writes)
    assert written.getvalue() == TEXT + "\n"
