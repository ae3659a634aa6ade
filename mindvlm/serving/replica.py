"""A child process that serves one model on a Unix socket, and the process that replaces it when it ends."""

import asyncio
import contextlib
import json
import logging
import os
import pickle
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from mindvlm.core.errors import UserError
from mindvlm.serving.plan import ModelPlan

logger = logging.getLogger(__name__)

MAX_FAILURES = 5
"""Processes in a row that end within `SHORT_SECONDS` after they are ready, or before; then no other one is started."""

SHORT_SECONDS = 60
FIRST_DELAY_SECONDS = 1
"""Before a new process starts; it doubles with each failure in a row."""

END_SECONDS = 10
"""Time in which a process must end before it is killed."""

METRICS_SECONDS = 5


class Replica:
    """A process that serves a model, and its successors.

    Args:
        plan: what it serves.
        number: among the processes of its model, from 0.
        command: starts a process, with the number of its listening socket as one more argument. It gets the pickled
            plan through standard input, whose end means that this process has ended. If it cannot serve, it writes
            a line `{"problem": ...}` of JSON to standard output.
        environment: variables for the process besides those of this one.
        path: of the socket, in a folder that other users cannot enter.

    Attributes:
        name: of the model.
        card: entry of the model in `/v1/models`; None until the first process is ready.
        is_ready: whether the process answers requests.
        has_given_up: whether too many processes have ended.
        num_running: requests under way.
        process: the last one that was started.
    """

    def __init__(
        self,
        plan: ModelPlan,
        number: int,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        path: str,
    ):
        self.plan, self.number, self.command, self.environment = plan, number, command, environment
        self.path, self.name = path, plan.settings.model_name
        self.card: dict[str, Any] | None = None
        self.is_ready = self.has_given_up = False
        self.num_running = self.num_starts = 0
        self.was_ready = asyncio.Event()
        self.ready_at: float | None = None
        self.problem: str | None = None
        self.process: asyncio.subprocess.Process | None = None
        # a connection that is kept may close just when it is used again
        limits = httpx.Limits(max_keepalive_connections=0)
        timeout = httpx.Timeout(None, read=plan.settings.max_seconds + SHORT_SECONDS)
        transport = httpx.AsyncHTTPTransport(uds=path, limits=limits)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=timeout)

    @property
    def title(self) -> str:
        return f"{self.name}, replica {self.number}"

    async def supervise(self) -> None:
        """Keeps a process running until it is cancelled, or until `MAX_FAILURES` in a row have failed.

        Raises:
            UserError: the first process ended before it was ready.
        """
        num_failures = 0
        while True:
            await self.live()
            if not self.was_ready.is_set():
                raise UserError(self.problem)
            is_short = self.ready_at is None or time.monotonic() - self.ready_at < SHORT_SECONDS
            num_failures = num_failures + 1 if is_short else 1
            if num_failures == MAX_FAILURES:
                break
            delay = FIRST_DELAY_SECONDS * 2 ** (num_failures - 1)
            logger.warning("%s: %s; it starts again in %g s", self.title, self.problem, delay)
            await asyncio.sleep(delay)
        self.has_given_up = True
        logger.error(
            "%s: %s; after %d failures in a row it is not started again; remove the cause and restart the server",
            self.title,
            self.problem,
            num_failures,
        )

    async def live(self) -> None:
        """Starts a process and waits for its end; `problem` then says why it has ended."""
        self.ready_at, self.problem = None, None
        self.process = await self.start()
        readiness = asyncio.create_task(self.wait_until_ready())
        try:
            async for line in self.process.stdout:
                self.problem = json.loads(line)["problem"]
            status = await self.process.wait()
        finally:
            self.is_ready = False
            readiness.cancel()
            await end(self.process)
        if self.problem is None:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            when = "" if self.ready_at else " while its model was loading"
            self.problem = f"its process {how}{when}, perhaps for lack of memory; see its messages above"

    async def start(self) -> asyncio.subprocess.Process:
        """Returns a new process, which listens on the socket."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            try:
                listening.bind(self.path)
            except OSError as error:
                raise UserError(
                    f"cannot listen on {self.path}: {error}; set TMPDIR to a folder with a short path"
                ) from None
            listening.listen(1024)
            self.num_starts += 1
            process = await asyncio.create_subprocess_exec(
                *self.command,
                str(listening.fileno()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=[listening.fileno()],
                env=os.environ | self.environment,
                # Ctrl-C reaches all processes of a session; this one ends the others in order
                start_new_session=True,
            )
        process.stdin.write(pickle.dumps(self.plan))
        return process

    async def wait_until_ready(self) -> None:
        with contextlib.suppress(httpx.TransportError):  # the process has ended
            while (await self.client.get("/health")).status_code != 200:
                await asyncio.sleep(0.1)
            (self.card,) = (await self.client.get("/v1/models")).json()["data"]
            self.ready_at, self.is_ready = time.monotonic(), True
            self.was_ready.set()
            logger.info("%s is ready", self.title)

    async def metrics(self) -> str | None:
        """Returns the figures of the process in Prometheus's text format; None if it does not answer."""
        if not self.is_ready:
            return None
        with contextlib.suppress(httpx.TransportError):
            return (await self.client.get("/metrics", timeout=METRICS_SECONDS)).text
        return None


async def end(process: asyncio.subprocess.Process) -> None:
    """Ends a process after the answers under way, at the latest after `END_SECONDS`."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), END_SECONDS)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
