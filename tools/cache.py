"""Lists or removes what is kept between two starts: `mindvlm-cache list`."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

from mindvlm.core.caches import KINDS, CacheEntry, cache_folder, find_entries
from mindvlm.core.errors import Parser, UserError, counted
from mindvlm.tools import cli

DESCRIPTION = """List or remove what is kept between two starts, in $MINDVLM_CACHE, else
$XDG_CACHE_HOME/mindvlm, else ~/.cache/mindvlm. All of it is made again when it is needed.

  weights  converted weights of checkpoints with foreign names, at most 64 GiB
  kernels  C++ kernels, if they were compiled at first use, at most 16 MiB
  graphs   compiled graphs, at most 1 GiB

Beyond these sizes, what was not used for the longest time is removed first.

MINDVLM_COMPILE_CACHE=off keeps no graphs; --no_cache of mindvlm-predict neither reads nor
writes weights and graphs."""
EXAMPLES = """examples:
  mindvlm-cache list
  mindvlm-cache list --all --kind weights
  mindvlm-cache clear
  mindvlm-cache clear --kind graphs kernels"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mindvlm-cache",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["list", "clear"], help="print a line for each name, or remove the entries")
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS), help="(default: all)")
    parser.add_argument("--all", action="store_true", help="list a line for each entry, with its file name")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `mindvlm-cache`; returns the exit status."""
    return cli.run(manage, argv)


def manage(argv: list[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.all and arguments.action == "clear":
        raise UserError("--all has no effect with clear, which removes all entries of its kinds; leave it out")
    entries = find_entries(dict.fromkeys(arguments.kind))
    size = shown_size(sum(entry.num_bytes for entry in entries))
    summary = f"{cache_folder()}: {counted(len(entries), 'item')}, {size}"
    if arguments.action == "list":
        if arguments.all:
            for entry in entries:
                print(f"{line_of([entry])}  {entry.path.name}")
        else:
            for (_, name), group in sorted(grouped(entries).items()):
                print(f"{line_of(group)}  {len(group):6} x {name}")
        print(summary)
        return 0
    for entry in entries:
        entry.remove()
    print(f"removed from {summary}")
    return 0


def grouped(entries: Sequence[CacheEntry]) -> dict[tuple[str, str], list[CacheEntry]]:
    """Returns (kind, name) -> the entries of that name."""
    groups: dict[tuple[str, str], list[CacheEntry]] = defaultdict(list)
    for entry in entries:
        groups[entry.kind, entry.name].append(entry)
    return groups


def line_of(entries: Sequence[CacheEntry]) -> str:
    """Returns the kind, the size and the last use of entries of a kind."""
    used = datetime.fromtimestamp(max(entry.used for entry in entries)).strftime("%Y-%m-%d %H:%M")
    size = shown_size(sum(entry.num_bytes for entry in entries))
    return f"{entries[0].kind:8}{size:>10}  used {used}"


def shown_size(num_bytes: int) -> str:
    """Returns a size in the largest unit of which it has at least one."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, _ = size / 1024, units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


if __name__ == "__main__":
    sys.exit(main())
