"""The answers to one request in the event loop: waiting for them, streaming them, and freeing their slots."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import Response

from mindvlm.serving.errors import ApiError
from mindvlm.serving.jobs import Event, Job
from mindvlm.serving.replies import ChatReply
from mindvlm.serving.responses import LAST_LINE, data_line, unless_disconnected
from mindvlm.serving.scheduler import Scheduler

Receiver = Callable[[Event], None]

PING_SECONDS = 10
"""A stream without news sends a comment after this time, and begins before its first token."""


class Answers:
    """The jobs of one request.

    Args:
        scheduler: generates them.
        make_jobs: returns the jobs; called with a function that makes the receiver of the events of a job's number.

    Raises:
        ApiError: the queue is full.
    """

    def __init__(self, scheduler: Scheduler, make_jobs: Callable[[Callable[[int], Receiver]], list[Job]]):
        self.scheduler = scheduler
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs = make_jobs(lambda index: lambda event: self.events.put_nowait((index, event)))
        scheduler.submit(self.jobs)

    def close(self) -> None:
        """Frees the slots of unfinished jobs."""
        for job in self.jobs:
            self.scheduler.cancel(job)

    async def whole(self) -> list[Event]:
        """Returns the final event of each job. Raises ApiError if one fails."""
        found: dict[int, Event] = {}
        while len(found) < len(self.jobs):
            index, event = await self.events.get()
            if event.error:
                raise event.error
            if event.finish:
                found[index] = event
        return [found[index] for index in range(len(self.jobs))]

    async def next(self) -> tuple[int, Event] | None:
        """Returns the next event; None if there is none for some seconds."""
        try:
            return await asyncio.wait_for(self.events.get(), PING_SECONDS)
        except asyncio.TimeoutError:
            return None


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
        async for line in self.lines():
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def lines(self) -> AsyncIterator[bytes]:
        """Yields the events of the stream."""
        try:
            async for chunk in self.chunks():
                yield b": waiting\n\n" if chunk is None else data_line(chunk)
        except ApiError as error:
            yield data_line(error.body)
        yield LAST_LINE

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """Yields the chunks, and None for a ping. Raises ApiError if a job fails."""
        finishes: dict[int, Event] = {}
        news = self.first
        while True:
            if news is None:
                yield None
            else:
                index, event = news
                if event.error:
                    raise event.error
                for chunk in self.chunks_of(index, event):
                    yield chunk | {"usage": None} if self.include_usage else chunk
                if event.finish:
                    finishes[index] = event
            if len(finishes) == len(self.answers.jobs):
                break
            news = await self.answers.next()
        if self.include_usage:
            yield self.reply.usage_chunk([finishes[index].finish for index in sorted(finishes)])

    def chunks_of(self, index: int, event: Event) -> Sequence[dict[str, Any]]:
        """Returns the chunks that report an event."""
        if not event.text and not event.tokens and not event.finish:
            chunk = self.reply.first_chunk(index)
            return [] if chunk is None else [chunk]
        chunks = [self.reply.text_chunk(index, event)] if event.text or event.tokens else []
        return [*chunks, self.reply.last_chunk(index, event)] if event.finish else chunks
