"""Ctrl-C, which MindSpore turns into SIGTERM once a graph has run."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Where Ctrl-C is a KeyboardInterrupt whatever MindSpore makes of it: another signal, or an error of its own."""
    was_interrupted = False

    def interrupt(number, frame) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    # a shell lets its background jobs ignore Ctrl-C
    with handled_by(interrupt, [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]):
        try:
            yield
        except Exception as error:
            if was_interrupted:
                raise KeyboardInterrupt from error
            raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets the first Ctrl-C wait until the block has ended; the second one does not wait.

    Inside MindSpore's compiler it would become pages of errors and a file in the current folder.
    """
    # whoever has left the signals to the system or to MindSpore keeps them
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
    """Inside, these signals call `handler`. Python has handlers in its main thread only; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, one in earlier.items():
            # None: it was not Python's, which cannot put it back
            signal.signal(number, signal.SIG_DFL if one is None else one)
