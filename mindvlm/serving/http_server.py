"""The HTTP server: its signals, and the time limits of connections."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mindvlm.serving.settings import MEBIBYTE

HEADER_SECONDS = 20
"""Time in which a client must send the head of a request, and what is left of the body of one that was answered."""

READ_SECONDS = 60
"""Time in which a client must read `MIN_READ` bytes of what waits for it, or all."""

MIN_READ = MEBIBYTE

MAX_CONNECTIONS = 512
"""Beyond them, the connection that has waited longest for a request is closed."""

MAX_ACCEPTED = 128
"""Connections that are accepted before any is closed."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with limits of connections.

    A connection is closed if its request does not arrive in `HEADER_SECONDS`, in which no answer is under way; between
    requests, uvicorn closes one that sends nothing. It is aborted if its client does not read.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.read_timer: asyncio.TimerHandle | None = None
        # so that writing is paused whenever something waits, also before a close, which waits for the client
        transport.set_write_buffer_limits(high=0)
        self.head_timer = self.loop.call_later(HEADER_SECONDS, self.close_without_head)
        if len(self.connections) > MAX_CONNECTIONS:
            idle = (one for one in self.connections if one.head_timer)
            min(idle, key=lambda one: one.head_timer.when()).close_without_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:
            self.stop_timer()
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(HEADER_SECONDS, self.close_without_head)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.expect_reading()

    def resume_writing(self) -> None:
        self.read_timer.cancel()
        super().resume_writing()

    def expect_reading(self) -> None:
        size = self.transport.get_write_buffer_size()
        self.read_timer = self.loop.call_later(READ_SECONDS, self.check_reading, size)

    def check_reading(self, earlier: int) -> None:
        if self.transport.get_write_buffer_size() > earlier - MIN_READ:
            self.transport.abort()
        else:
            self.expect_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_timer()
        if self.read_timer:
            self.read_timer.cancel()
        super().connection_lost(exc)

    def stop_timer(self) -> None:
        if self.head_timer:
            self.head_timer.cancel()
            self.head_timer = None

    def close_without_head(self) -> None:
        self.stop_timer()
        self.transport.close()


class Server(uvicorn.Server):
    """A server that ends with status 0 on SIGTERM and Ctrl-C, after the answers that are under way.

    MindSpore turns Ctrl-C into SIGTERM once a graph has run.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        earlier = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def new_server(app: FastAPI, close_seconds: float) -> Server:
    """Returns a server of the application, which waits so long for answers under way at its end."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=MAX_ACCEPTED,
        timeout_graceful_shutdown=close_seconds,
    )
    return Server(config)
