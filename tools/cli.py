"""Shared by all command-line tools: one-line errors, exit statuses, interruption, warnings, progress lines."""

import argparse
import contextlib
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.core.interruption import interruptible, uninterrupted
from mindvlm.core.progress import progress_to
from mindvlm.core.weight_formats import PARTS, WEIGHT_FORMATS
from mindvlm.parallel.launch import ends_all_ranks, is_launched, limit_threads

INTERRUPTED = 130
# in a clone, tools and convert lie beside the package, in a wheel inside
OWN_FOLDERS = (*map(Path, mindvlm.__path__), Path(__file__).parent, Path(__file__).parent.with_name("convert"))


def run(command: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Runs a tool's command and returns its exit status.

    A `UserError` or `OSError` becomes one line on standard error and status 2, Ctrl-C status 130. A closed output (a
    pipe into `head`) ends the tool silently. Progress lines of the library go to standard error. In a job of several
    processes an error of one ends all of them; call it before MindSpore is imported.
    """
    limit_threads()
    warnings.showwarning = show_warning
    # an unencodable character must not end the tool
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        # the ranks of a launched job must end at once
        with progress_to(say), contextlib.nullcontext() if is_launched() else interruptible(), ends_all_ranks():
            status = command(argv)
            sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # keeps the interpreter from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}; check the path and its permissions", file=sys.stderr)
        return 2


def import_library() -> None:
    """Imports MindSpore and everything that loading a model needs.

    Their objects live until the process ends, so the garbage collector skips them. MindSpore starts it before each
    compilation, and Python at the end.
    """
    if "mindvlm.api" in sys.modules:
        return
    gc.disable()
    try:
        # MindSpore ends the process with a traceback when its import is interrupted
        with uninterrupted():
            importlib.import_module("mindvlm.api")
    finally:
        gc.enable()
    gc.freeze()


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Prints our own warnings as one line; hides those of other packages, which are for developers."""
    if category is UserWarning and any(Path(filename).is_relative_to(folder) for folder in OWN_FOLDERS):
        print(f"warning: {message}", file=sys.stderr)


def say(message: str) -> None:
    """Prints a line on standard error."""
    print(message, file=sys.stderr, flush=True)


def add_weights_option(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Adds `--weights`, the key of the same name in the YAML of a model."""
    group.add_argument(
        "--weights",
        metavar="FORMAT",
        help=f"how a CPU stores weight matrices: {', '.join(WEIGHT_FORMATS)}, or PART=FORMAT for parts of "
        f"{', '.join(PARTS)}, such as int4,towers=int8",
    )


def yes_or_no(text: str) -> bool:
    """Parses the switch values that MindOCR's command line accepts."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
