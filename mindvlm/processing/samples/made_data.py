"""Data that a family makes itself, with a kind of its own in `mindvlm-make-data`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class MadeData:
    """A kind of made data.

    Attributes:
        help: what it is, in one line.
        description: text of its own help.
        add_options: adds its options, beside `--output` and `--seed`.
        make: makes what is missing; called with the parsed options and a function that receives the number of finished
            items and their total; returns the lines that say what was made.
        output: help of `--output`.
        is_seeded: whether it has `--seed`.
    """

    help: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    make: Callable[[argparse.Namespace, Callable[[int, int], None]], list[str]]
    output: str = "folder of the results"
    is_seeded: bool = True
