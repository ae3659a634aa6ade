"""The answers to one request in the event loop: waiting for them, streaming them, and freeing their slots."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response

from mindvlm.serving.errors import ApiError
from mindvlm.serving.jobs import Event, Finish, Job
from mindvlm.serving.replies import ChatReply
from mindvlm.serving.responses import LAST_LINE, data_line, unless_disconnected
from mindvlm.serving.scheduler import Scheduler

logger = logging.getLogger(__name__)

Receiver = Callable[[Event], None]

PING_SECONDS = 10
"""A stream without news sends a comment after this time, and begins before its first token."""


JobMaker = Callable[[Callable[[int], Receiver]], Awaitable[list[Job]]]
"""Returns the jobs of a request; called with a function that makes the receiver of the events of a job's number."""


class Answers:
    """The jobs of one request, which are made and submitted while their events are awaited.

    Args:
        scheduler: generates them.
        make_jobs: may take long, because it reads pictures. Its errors are events.
        after: called when the jobs are submitted, or will not be.

    Attributes:
        jobs: empty until they are submitted.
    """

    def __init__(self, scheduler: Scheduler, make_jobs: JobMaker, after: Callable[[], None]):
        self.scheduler, self.jobs = scheduler, []
        self.events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self.submitting = asyncio.create_task(self.submit(make_jobs))
        self.submitting.add_done_callback(lambda task: after())

    async def submit(self, make_jobs: JobMaker) -> None:
        try:
            jobs = await make_jobs(lambda index: lambda event: self.events.put_nowait((index, event)))
            self.scheduler.submit(jobs)
            self.jobs = jobs
        except ApiError as error:
            self.events.put_nowait((0, Event(error=error)))
        except Exception:
            logger.exception("a request cannot be answered")
            error = ApiError(500, "the server failed; see its log", code="internal_error")
            self.events.put_nowait((0, Event(error=error)))

    def close(self) -> None:
        """Frees the slots of unfinished jobs."""
        self.submitting.cancel()
        for job in self.jobs:
            self.scheduler.cancel(job)

    async def whole(self) -> list[Event]:
        """Returns the final event of each job. Raises ApiError if one fails."""
        found: dict[int, Event] = {}
        while not found or len(found) < len(self.jobs):
            index, event = await self.events.get()
            if event.error:
                raise event.error
            if event.finish:
                found[index] = event
        return [found[index] for index in range(len(self.jobs))]

    async def next(self) -> tuple[int, Event] | None:
        """Returns the next event; None if there is none for some seconds."""
        # not wait_for, which starts a task for each event
        ping = asyncio.get_running_loop().call_later(PING_SECONDS, self.events.put_nowait, None)
        try:
            return await self.events.get()
        finally:
            ping.cancel()


class EventStream(Response):
    """A response of server-sent events.

    Args:
        answers: the jobs, whose slots are free when the response ends for whatever reason.
        first: the first result of `answers.next`.
        reply: builds the chunks.
        include_usage: whether a chunk with the number of tokens comes at the end.
    """

    def __init__(self, answers: Answers, first: tuple[int, Event] | None, reply: ChatReply, *, include_usage: bool):
        super().__init__()
        self.answers, self.first, self.reply, self.include_usage = answers, first, reply, include_usage
        self.begun: set[int] = set()

    async def __call__(self, scope, receive, send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        # nginx would collect the pieces
        headers.append((b"x-accel-buffering", b"no"))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await unless_disconnected(receive, self.send_all(send))
        finally:
            self.answers.close()

    async def send_all(self, send) -> None:
        try:
            async for lines in self.lines():
                await send_lines(send, lines)
        except Exception:
            logger.exception("a stream ends with an error")
            error = ApiError(500, "the answer cannot be sent; see the log of the server", code="internal_error")
            await send_lines(send, data_line(error.body) + LAST_LINE)

    async def lines(self) -> AsyncIterator[bytes]:
        """Yields what is sent at once, because every message costs time: the lines of an event, the last ones with the
        end of the stream."""
        finishes: dict[int, Finish] = {}
        news = self.first
        while not (news and news[1].error):
            if news is None:
                yield b": waiting\n\n"
            else:
                index, event = news
                chunks = self.chunks_of(index, event)
                if self.include_usage:
                    chunks = [chunk | {"usage": None} for chunk in chunks]
                if event.finish:
                    finishes[index] = event.finish
                if len(finishes) == len(self.answers.jobs):
                    if self.include_usage:
                        chunks.append(self.reply.usage_chunk([finishes[index] for index in sorted(finishes)]))
                    yield b"".join(map(data_line, chunks)) + LAST_LINE
                    return
                yield b"".join(map(data_line, chunks))
            news = await self.answers.next()
        yield data_line(news[1].error.body) + LAST_LINE

    def chunks_of(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Returns the chunks that report an event."""
        chunks = [] if index in self.begun else self.reply.first_chunks(index)
        self.begun.add(index)
        if event.text or event.tokens:
            chunks.append(self.reply.text_chunk(index, event))
        if event.finish:
            chunks.append(self.reply.last_chunk(index, event))
        return chunks


async def send_lines(send, lines: bytes) -> None:
    await send({"type": "http.response.body", "body": lines, "more_body": not lines.endswith(LAST_LINE)})
