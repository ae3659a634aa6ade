"""Runs recorded cases of an original program through this library and compares all recorded values.

    python tests/golden_case.py CASE_DIR [CASE_DIR ...] [--mode graph|pynative] [--kernels ...] [--json]

Prints one line per comparison with the relative Frobenius error or "identical", then the values that were not compared,
with the reason. Exit status 0: every comparison holds, and each case has at least one; 1: a comparison fails; 2: a
folder is missing or its kind is unknown.
"""

import argparse
import gc
import itertools
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    # as a script, sys.path starts with tests/, whose folders have the names of other packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mindvlm.core.errors import UserError
from tests.golden_readers.case import UnusableCase
from tests.golden_readers.kernels import check_choice
from tests.golden_readers.kinds import read_case
from tests.golden_readers.shared_graphs import shared_graphs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="CASE_DIR", help="folder of one recorded case")
    parser.add_argument("--mode", choices=("graph", "pynative"), default="graph", help="default: %(default)s")
    parser.add_argument(
        "--kernels",
        nargs="+",
        type=check_choice,
        default=["off"],
        metavar="off|FORMAT[:SET]",
        help="computes with the C++ kernels, once for each value: float32, or 16bit for the case's own 16-bit weights, "
        "with the instruction set after a colon, such as 16bit:avx2 (default: off)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per case, one per line")
    arguments = parser.parse_args(argv)
    failed = unusable = False
    with shared_graphs() if len(arguments.kernels) > 1 else nullcontext():
        for folder, kernels in itertools.product(arguments.folders, arguments.kernels):
            try:
                report = read_case(folder, arguments.mode, kernels)
            except (UnusableCase, UserError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                unusable = True
                continue
            print(report.json() if arguments.json else report.text(), flush=True)
            failed = failed or not report.holds
    return 1 if failed else 2 if unusable else 0


if __name__ == "__main__":
    # MindSpore collects garbage before each compilation: what is imported is none
    gc.freeze()
    sys.exit(main())
