"""Errors that a user can cause, and how the commands report them. Imports only the standard library."""

import argparse
import difflib
import sys
from typing import NoReturn


class UserError(ValueError):
    """An error the caller can fix: bad input, a wrong file, an invalid setting.

    The message is one line with the thing, the value, the expected value and the remedy. The commands print it and exit
    with status 2.
    """


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as commands report a UserError: one line, exit status 2.

    Options are not abbreviated, so that a new one does not change the meaning of a command.

    Args:
        hint: remedy for a value that belongs to no option.
    """

    def __init__(self, *, hint: str = "leave it out", **options):
        super().__init__(allow_abbrev=False, **options)
        self.hint = hint

    def parse_args(self, args=None, namespace=None):
        arguments, others = self.parse_known_args(args, namespace)
        if others:
            parser = self.chosen_parser(arguments)
            # never the value of an option, which may be a secret
            parser.error(parser.what_is_unknown(others[0].partition("=")[0]))
        return arguments

    def chosen_parser(self, arguments: argparse.Namespace) -> "Parser":
        """Returns the parser of the subcommand in parsed arguments; this one if it has no subcommands."""
        subcommands = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return next((action.choices[getattr(arguments, action.dest)] for action in subcommands), self)

    def what_is_unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unknown argument {argument}; {self.hint}"
        names = [option.lstrip("-") for option in self._option_string_actions]
        near = difflib.get_close_matches(argument.lstrip("-"), names, n=1)
        return f"unknown option {argument}" + (f"; did you mean --{near[0]}?" if near else "")

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def counted(number: int, noun: str) -> str:
    """Returns a count with its noun, such as "1 image" or "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
