"""Errors that a user can cause, and how the commands report them. Imports only the standard library."""

import argparse
import sys
from typing import NoReturn


class UserError(ValueError):
    """An error the caller can fix: bad input, a wrong file, an invalid setting.

    The message is one line with the thing, the value, the expected value and the remedy. The commands print it and exit
    with status 2.
    """


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as commands report a UserError: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def counted(number: int, noun: str) -> str:
    """Returns a count with its noun, such as "1 image" or "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
