"""The end of one rank ends all."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator

from mindvlm.core.errors import UserError
from mindvlm.parallel import environment

# `msrun` shows a rank's output by following its log file, and stops following as soon as the rank has ended.
SECONDS_TO_BE_SEEN = 1.5


@contextlib.contextmanager
def ends_all_ranks() -> Iterator[None]:
    """Around everything that a rank does: an error is shown on the console and ends the whole job.

    MindSpore's own way out of a failing rank waits for the others, which wait for it. Here the process prints what
    happened (one line for a `UserError`), ends its children and leaves at once, with status 2 for a UserError and 1
    for anything else; `msrun --join=True` then ends the other ranks. Outside a launched job errors pass through.
    """
    try:
        yield
    except BaseException as error:
        if not environment.is_launched() or (isinstance(error, SystemExit) and not error.code):
            raise
        leave(error)


def leave(error: BaseException) -> None:
    """Shows the error and ends this process and its children without waiting for anybody."""
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
        message = f"left with exit status {error.code}"
    elif isinstance(error, UserError):
        status, message = 2, f"error: {error}"
    else:
        status, message = 1, "".join(traceback.format_exception(error)).rstrip()
    sys.stdout.flush()
    if environment.is_scheduler():
        # it fails because a rank has, or as every rank does; msrun shows lines of its log that look like errors
        print("the scheduler ends", flush=True)
        os._exit(status)
    print(f"{environment.rank_name()}: {message}", file=sys.stderr, flush=True)
    time.sleep(SECONDS_TO_BE_SEEN)
    if os.getpgrp() == os.getpid():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
    os._exit(status)
