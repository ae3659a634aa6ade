"""Worker processes that neither Ctrl-C nor a killed parent leaves behind."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from mindvlm.core.errors import UserError


class ProcessPool:
    """Spawned processes that are deaf to Ctrl-C (the parent closes them) and end when the parent does.

    Args:
        num_workers: processes.
        prepare: called with `arguments` in each process before its first task; both can be pickled.
        remedy: what a user may do if a process is killed.
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
        """Of the processes that have been started."""
        return list(self.executor._processes or ())

    def submit(self, task: Callable, *arguments: Any) -> Future:
        """Asks for `task(*arguments)`. Raises UserError if a process was killed."""
        # processes start here and inherit the mask: Ctrl-C reaches all of a terminal, also one that still imports
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self.executor.submit(task, *arguments)
        except BrokenProcessPool:
            raise self._lost() from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def result(self, future: Future) -> Any:
        """What the task returned. Raises what the task raised, and UserError if a process was killed."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise self._lost() from None

    def close(self) -> None:
        """Drops tasks that have not begun and ends the processes."""
        self.executor.shutdown(cancel_futures=True)

    def _lost(self) -> UserError:
        return UserError(f"a worker process ended unexpectedly, perhaps for lack of memory; {self.remedy}")


def _start(prepare: Callable[..., None], arguments: tuple) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
