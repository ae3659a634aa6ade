"""The process of the server: its socket, signals and time limits of connections."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mindvlm.serving.app import Service, make_app
from mindvlm.serving.metrics import Metrics
from mindvlm.serving.scheduler import Scheduler
from mindvlm.serving.settings import ServerSettings
from mindvlm.sessions.vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)

HEADER_SECONDS = 20
"""Time in which a client must send the head of a request."""

MAX_CONNECTIONS = 512
"""Beyond them, the connection that has waited longest for a request is closed."""

MAX_ACCEPTED = 128
"""Connections that are accepted before any is closed."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with limits of connections, which closes one whose request does not arrive in `HEADER_SECONDS`."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.head_timer = self.loop.call_later(HEADER_SECONDS, self.close_without_head)
        if len(self.connections) > MAX_CONNECTIONS:
            idle = (one for one in self.connections if one.head_timer)
            min(idle, key=lambda one: one.head_timer.when()).close_without_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_between = self.conn.their_state is h11.IDLE
        if is_between and self.head_timer is None and self.conn.trailing_data[0]:
            self.head_timer = self.loop.call_later(HEADER_SECONDS, self.close_without_head)
        elif not is_between:
            self.stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_timer()
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


class ModelServer:
    """Loads a model and serves it.

    Args:
        load: returns the model.
        settings: limits and permissions.
        listening: the socket, see `bind`.
        close_seconds: time for answers that are under way at the end.
    """

    def __init__(
        self,
        load: Callable[[], VisionLanguageModel],
        settings: ServerSettings,
        listening: socket.socket,
        *,
        close_seconds: float = 30,
    ):
        self.listening, self.close_seconds = listening, close_seconds
        metrics = Metrics()
        self.scheduler = Scheduler(load, settings, metrics, post=self.post, on_end=self.stop)
        self.service = Service(self.scheduler, settings, metrics)
        config = uvicorn.Config(
            make_app(self.service),
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=MAX_ACCEPTED,
            timeout_graceful_shutdown=close_seconds,
        )
        self.server = Server(config)

    def run(self) -> None:
        """Serves until SIGTERM, Ctrl-C or `stop`. Raises UserError if the model cannot be loaded."""
        asyncio.run(self.run_in_loop())

    async def run_in_loop(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.scheduler.thread.start()
        try:
            await self.server.serve([self.listening])
        finally:
            self.scheduler.close()
        if self.scheduler.failure:
            raise self.scheduler.failure
        is_loading = self.scheduler.model is None
        await asyncio.to_thread(self.scheduler.thread.join, 0 if is_loading else self.close_seconds)

    @property
    def is_busy(self) -> bool:
        """Whether a graph is still compiled or run after the end, which crashes an interpreter that ends."""
        return self.scheduler.thread.is_alive()

    def stop(self) -> None:
        """Ends the server after the answers that are under way; may be called from any thread."""
        self.server.should_exit = True

    def post(self, function: Callable, *arguments) -> None:
        """Calls a function in the event loop."""
        # the loop is closed if the end is forced
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)
