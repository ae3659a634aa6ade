"""What all command-line tools share."""

import argparse
import os
import sys
import warnings

import pytest

from mindvlm.errors import UserError
from mindvlm.tools import cli


def failing(error: BaseException):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("no such thing"), 2, "error: no such thing\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            PermissionError(13, "Permission denied", "x"),
            2,
            "error: [Errno 13] Permission denied: 'x'; check the path and its permissions\n",
        ),
    ],
)
def test_statuses(capsys, error, status, message):
    assert cli.run(failing(error)) == status
    assert capsys.readouterr() == ("", message)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(failing(ZeroDivisionError()))


def test_the_commands_own_status_and_arguments(capsys):
    assert cli.run(lambda argv: len(argv), ["a", "b"]) == 2
    assert capsys.readouterr() == ("", "")


def test_text_that_waits_in_the_buffer_of_a_closed_pipe(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.run(lambda argv: print("answer") or 0) == 1


def test_only_our_own_warnings_are_shown(capsys):
    def command(argv):
        warnings.warn_explicit("mind this", UserWarning, "/site/mindvlm/runtime.py", 1)
        warnings.warn_explicit("not that", UserWarning, "/site/other/module.py", 1)
        warnings.warn_explicit("not that either", UserWarning, "/mindvlm/.venv/site-packages/other/module.py", 1)
        warnings.warn_explicit("nor that", DeprecationWarning, "/site/mindvlm/runtime.py", 1)
        return 0

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.run(command) == 0
    assert capsys.readouterr().err == "warning: mind this\n"


def test_yes_and_no():
    assert [cli.yes_or_no(text) for text in ("yes", "True", "1", "no", "FALSE", "0")] == [True] * 3 + [False] * 3
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' is neither yes nor no"):
        cli.yes_or_no("maybe")
