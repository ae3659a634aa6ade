"""The server of several models and replicas at one address."""

import asyncio
import contextlib
import socket

from mindvlm.serving.fleet import Fleet
from mindvlm.serving.http_server import new_server
from mindvlm.serving.router import make_router
from mindvlm.serving.settings import ServerSettings


class RouterServer:
    """Runs the processes of a fleet and passes requests to them.

    Args:
        fleet: the processes.
        settings: limits and permissions.
        listening: the socket, see `bind`.
        close_seconds: time for answers that are under way at the end.
    """

    def __init__(self, fleet: Fleet, settings: ServerSettings, listening: socket.socket, *, close_seconds: float = 30):
        self.fleet, self.listening = fleet, listening
        self.server = new_server(make_router(fleet, settings), close_seconds)

    def run(self) -> None:
        """Serves until SIGTERM, Ctrl-C or `stop`. Raises UserError as `Fleet.run` does."""
        asyncio.run(self.run_in_loop())

    async def run_in_loop(self) -> None:
        supervision = asyncio.create_task(self.fleet.run())
        supervision.add_done_callback(lambda task: self.stop())
        try:
            await self.server.serve([self.listening])
        finally:
            supervision.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await supervision

    def stop(self) -> None:
        """Ends the server after the answers that are under way; may be called from any thread."""
        self.server.should_exit = True
