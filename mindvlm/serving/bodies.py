"""Reading of the bodies of requests within the limits of the server."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from mindvlm.serving.budget import Share, busy
from mindvlm.serving.errors import ApiError
from mindvlm.serving.fields import parse_json
from mindvlm.serving.settings import MEBIBYTE, ServerSettings

T = TypeVar("T")

# the server would read the rest of a body for as long as it comes
CLOSE = {"Connection": "close"}

MAX_DISCARDED = 8
"""Of a body up to this many times too large the rest is read, because many clients look at no response before they
have sent all."""


async def read_json(request: Request, settings: ServerSettings, share: Share) -> Any:
    """Returns the JSON value of a request. Raises ApiError as `read_body` does, and if it is no JSON."""
    return await parsed(await read_body(request, settings, share), parse_json)


async def parsed(content: bytes, parse: Callable[[bytes], T]) -> T:
    """Returns what `parse` makes of a body. A large body does not delay other requests."""
    return await asyncio.to_thread(parse, content) if len(content) > MEBIBYTE else parse(content)


async def read_body(request: Request, settings: ServerSettings, share: Share) -> bytes:
    """Returns the body of a request.

    Args:
        share: holds the bytes of the body.

    Raises:
        ApiError: the body is too large or comes too slowly, or there is no room for it.
    """
    limit = settings.max_body_bytes
    try:
        content, size = await asyncio.wait_for(received(request, limit, share), settings.body_seconds)
    except asyncio.TimeoutError:
        if share.is_waiting:
            raise busy("the server is reading too many large requests") from None
        message = f"the body did not arrive in {settings.body_seconds:g} s"
        raise ApiError(408, message, code="slow_body", headers=CLOSE) from None
    except ClientDisconnect:
        raise ApiError(400, "the client disconnected") from None
    if size > limit:
        remedy = "send smaller pictures or documents, or raise --max_body_mib of the server"
        message = f"the body is larger than {limit / MEBIBYTE:g} MiB; {remedy}"
        raise ApiError(413, message, code="body_too_large", headers=CLOSE)
    return content


async def received(request: Request, limit: int, share: Share) -> tuple[bytes, int]:
    """Returns the body and its size; of a body that is too large only the size, so far as it was read."""
    if (declared := declared_length(request)) > MAX_DISCARDED * limit:
        return b"", declared
    content, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= limit:
            await share.take(len(piece))
            content += piece
        else:
            content.clear()
        if size > MAX_DISCARDED * limit:
            break
    return bytes(content), size


def declared_length(request: Request) -> int:
    """Returns the length of the body that the client declares; 0 without."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdecimal() else 0
