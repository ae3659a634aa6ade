"""Progress lines, which the library logs to the logger `mindvlm` at level INFO."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("mindvlm")


@contextmanager
def progress_to(receive: Callable[[str], None] | None) -> Iterator[None]:
    """Calls `receive` with each progress line logged inside the `with` block; None changes nothing."""
    if receive is None:
        yield
        return
    handler, level = _Receiver(receive), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


def silence_progress() -> None:
    """Drops progress lines in this process from now on, such as those of every rank but the first."""
    LOGGER.setLevel(logging.WARNING)


def is_progress_shown() -> bool:
    """Whether progress lines are received; progress bars are hidden otherwise."""
    return LOGGER.isEnabledFor(logging.INFO)


class _Receiver(logging.Handler):
    def __init__(self, receive: Callable[[str], None]):
        super().__init__(logging.INFO)
        self.receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        self.receive(self.format(record))
