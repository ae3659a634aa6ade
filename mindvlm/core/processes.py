"""Worker processes that end with their parent, also on Ctrl-C or a kill."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from mindvlm.core.errors import UserError

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Lets the system kill this process when the thread that started it ends, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class ProcessPool:
    """Spawned processes that ignore Ctrl-C (the parent closes them) and end with the parent.

    Args:
        num_workers: processes.
        prepare: called with `arguments` in each process before its first task; both must be picklable.
        remedy: advice of the error message when a process is killed.
    """

    def __init__(self, num_workers: int, prepare: Callable[..., None], arguments: tuple, *, remedy: str):
        self.remedy = remedy
        self.executor = ProcessPoolExecutor(
            num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(prepare, arguments),
        )

    @property
    def process_ids(self) -> list[int]:
        """IDs of the processes started so far."""
        return list(self.executor._processes or ())

    def submit(self, task: Callable, *arguments: Any) -> Future:
        """Schedules `task(*arguments)`. Raises UserError if a process was killed."""
        # processes start here and inherit the mask: Ctrl-C reaches every process of a terminal, even during its imports
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self.executor.submit(task, *arguments)
        except BrokenProcessPool:
            raise self._lost() from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def result(self, future: Future) -> Any:
        """Returns the result of a task. Raises the error of the task, or UserError if a process was killed."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise self._lost() from None

    def close(self) -> None:
        """Cancels tasks that have not started and ends the processes."""
        self.executor.shutdown(cancel_futures=True)

    def _lost(self) -> UserError:
        return UserError(f"a worker process ended unexpectedly, perhaps for lack of memory; {self.remedy}")


def _start(prepare: Callable[..., None], arguments: tuple) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
