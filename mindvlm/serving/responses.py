"""Responses in JSON, the lines of event streams, and the end of work whose client has disconnected."""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.responses import Response

from mindvlm.serving.errors import ApiError

T = TypeVar("T")

LAST_LINE = b"data: [DONE]\n\n"
"""The end of every stream of events."""


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status_code=status, headers=headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)


def data_line(value: Any) -> bytes:
    """Returns an event of a stream."""
    return b"data: " + json_bytes(value) + b"\n\n"


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def unless_disconnected(receive, work) -> Any:
    """Returns the result of a coroutine, which is cancelled when the client disconnects; then the result is None."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()


async def uncancelled(work: Awaitable[T]) -> T:
    """Returns the result of work that cannot be stopped, such as that of a thread. A cancellation waits for its end."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        # nobody wants its error
        task.cancelled() or task.exception()
        raise


async def disconnected(receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
