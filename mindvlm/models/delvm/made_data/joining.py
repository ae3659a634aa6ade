"""`delvm-join`: joins consecutive lines of files of codes to longer sentences."""

import argparse
import os
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.making import Progress, check_range
from mindvlm.models.delvm.token_files import TokenFile, join_lines, write_token_file
from mindvlm.processing.samples.made_data import MadeData

ANY_CODE = 2**31


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=os.path.expanduser, nargs="+", required=True, metavar="FILE.bin", help="in this order"
    )
    parser.add_argument("--lines", type=int, default=4, metavar="N", help="to join to one (default 4)")


def join(arguments: argparse.Namespace, progress: Progress) -> list[str]:
    """Joins the lines. Returns the line that says what was made.

    Raises:
        UserError: an option is out of range, or a file cannot be read or written.
    """
    check_range(arguments, "lines", 1, 10**6)
    output = Path(arguments.output)
    if os.path.realpath(output) in map(os.path.realpath, arguments.input):
        raise UserError(f"--output {output}: is one of the files to join; choose another name")
    files = [TokenFile(path, ANY_CODE) for path in arguments.input]
    total = sum(map(len, files))
    numbered = enumerate((line.tolist() for file in files for line in file), 1)

    def lines():
        for number, line in numbered:
            progress(number, total)
            yield line

    output.parent.mkdir(parents=True, exist_ok=True)
    num_lines = write_token_file(output, join_lines(lines(), arguments.lines))
    return [f"joined {total} lines to {num_lines} in {output}"]


JOIN = MadeData(
    "joins lines of files of codes to longer sentences",
    "Joins every N consecutive lines of files of codes. The last sentence may be shorter.",
    add_options,
    join,
    output="file to write, NAME.bin",
    is_seeded=False,
)
