"""A process that `msrun` or a rank table started: what it knows of its job, and how its failure ends the job.

Imports nothing of MindSpore, so that thread limits can be set before it is loaded.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator

from mindvlm.core.errors import UserError

# `msrun` shows a rank's output by following its log file, and stops following as soon as the rank has ended.
SECONDS_TO_BE_SEEN = 1.5


def is_launched() -> bool:
    """Whether this process is one of several: started by `msrun`, or with a rank table on Ascend."""
    return "MS_ROLE" in os.environ or ("RANK_TABLE_FILE" in os.environ and "RANK_ID" in os.environ)


def world_size() -> int:
    """Number of processes in the job; 1 outside a launched job."""
    if not is_launched():
        return 1
    return int(os.environ.get("MS_WORKER_NUM") or os.environ.get("RANK_SIZE") or 1)


def is_scheduler() -> bool:
    """Whether this process is the scheduler, which `msrun` starts beside the ranks to connect them."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def rank_name() -> str:
    """The rank for messages, such as "rank 1"; "rank ?" before the processes have connected."""
    return f"rank {os.environ.get('RANK_ID', '?')}"


def limit_threads() -> None:
    """Divides the cores of this machine among the processes of the job, unless the user has set OMP_NUM_THREADS.

    Assumes that all processes run on this machine; on several machines set OMP_NUM_THREADS. Has an effect only before
    MindSpore is imported.
    """
    if is_launched():
        num_cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // world_size())))


def wait_for_slow_ranks() -> None:
    """Raises the time limit of a collective from 30 seconds to half an hour, unless the user has set one.

    Other ranks wait while one compiles, saves or evaluates. The limit does not delay the end of a failed job: `msrun`
    ends the other ranks.
    """
    os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "1800")
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", "1800")


@contextlib.contextmanager
def ends_all_ranks() -> Iterator[None]:
    """Ends the whole job when the code in its `with` block raises an error.

    MindSpore's own exit from a failing rank waits for the other ranks, which wait for it. This process instead prints
    the error (one line for a `UserError`), ends its children and exits at once, with status 2 for a UserError and 1 for
    any other error; `msrun --join=True` then ends the other ranks. Outside a launched job errors propagate.
    """
    try:
        yield
    except BaseException as error:
        if not is_launched() or (isinstance(error, SystemExit) and not error.code):
            raise
        leave(error)


def leave(error: BaseException) -> None:
    """Prints the error and ends this process and its children without waiting for other ranks."""
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
        message = f"left with exit status {error.code}"
    elif isinstance(error, UserError):
        status, message = 2, f"error: {error}"
    else:
        status, message = 1, "".join(traceback.format_exception(error)).rstrip()
    sys.stdout.flush()
    if is_scheduler():
        # it fails because a rank has, or as every rank does; msrun shows lines of its log that look like errors
        print("the scheduler ends", flush=True)
        os._exit(status)
    # a rank that shows no answers still shows its errors
    print(f"{rank_name()}: {message}", file=sys.__stderr__, flush=True)
    time.sleep(SECONDS_TO_BE_SEEN)
    if os.getpgrp() == os.getpid():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
    os._exit(status)
