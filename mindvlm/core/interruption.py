"""Handling of Ctrl-C, which MindSpore turns into SIGTERM once a graph has run."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt on Ctrl-C, even if MindSpore turns it into another signal or into its own error."""
    was_interrupted = False

    def interrupt(number, frame) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    # a shell starts background jobs with SIGINT ignored
    with handled_by(interrupt, [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]):
        try:
            yield
        except Exception as error:
            if was_interrupted:
                raise KeyboardInterrupt from error
            raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Defers the first Ctrl-C until the block ends; the second one takes effect at once.

    Inside MindSpore's compiler, Ctrl-C prints pages of errors and leaves a file in the current folder.
    """
    # signals handled by the system or by MindSpore stay unchanged
    wanted = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    waiting: list[int] = []

    def note(number, frame) -> None:
        if waiting:
            wanted[number](number, frame)
        waiting.append(number)

    with handled_by(note, wanted):
        yield
    if waiting:
        wanted[waiting[0]](waiting[0], None)


@contextlib.contextmanager
def handled_by(handler, numbers) -> Iterator[None]:
    """Handles these signals with `handler` inside the block.

    Python runs signal handlers in the main thread only; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, one in earlier.items():
            # None: the handler was not installed by Python, which cannot restore it
            signal.signal(number, signal.SIG_DFL if one is None else one)
