"""The server of one model."""

import asyncio
import contextlib
import socket
from collections.abc import Callable

from mindvlm.serving.app import Service, make_app
from mindvlm.serving.http_server import new_server
from mindvlm.serving.metrics import Metrics
from mindvlm.serving.scheduler import Scheduler
from mindvlm.serving.settings import ServerSettings
from mindvlm.sessions.vision_language_model import VisionLanguageModel


class ModelServer:
    """Loads a model and serves it.

    Args:
        load: returns the model.
        settings: limits and permissions.
        listening: the socket, see `bind`.
        on_ready: called with the model when it answers, in the thread of the scheduler.
        close_seconds: time for answers that are under way at the end.
    """

    def __init__(
        self,
        load: Callable[[], VisionLanguageModel],
        settings: ServerSettings,
        listening: socket.socket,
        *,
        on_ready: Callable[[VisionLanguageModel], None] = lambda model: None,
        close_seconds: float = 30,
    ):
        self.listening, self.close_seconds = listening, close_seconds
        metrics = Metrics()
        self.scheduler = Scheduler(load, settings, metrics, post=self.post, on_ready=on_ready, on_end=self.stop)
        self.service = Service(self.scheduler, settings, metrics)
        self.server = new_server(make_app(self.service), close_seconds)

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
