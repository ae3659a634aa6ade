"""The request `/v1/documents/pages`: pages of a document as pictures, for clients that cannot draw them."""

import asyncio
import base64
import io
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from mindvlm.core.errors import UserError
from mindvlm.processing.images.documents import DEFAULT_DPI, MAX_DPI, MIN_DPI, Document, open_document, page_ranges
from mindvlm.processing.images.loading import load_image
from mindvlm.processing.images.sources import head_of
from mindvlm.serving.bodies import read_json
from mindvlm.serving.budget import ByteBudget, Share
from mindvlm.serving.errors import bad_field, shown
from mindvlm.serving.fields import Fields
from mindvlm.serving.messages import PictureUrl
from mindvlm.serving.pictures import check_format, read_files
from mindvlm.serving.responses import json_response, unless_disconnected
from mindvlm.serving.settings import ServerSettings

MAX_RANGES_LENGTH = 1000


def add_documents(app: FastAPI, settings: ServerSettings, bodies: ByteBudget) -> None:
    """Adds the route.

    Args:
        bodies: limits the bytes of requests that are under way.
    """
    # PDFium supports one thread, and chats need those of the event loop
    renderer, fetchers = ThreadPoolExecutor(1, "renderer"), ThreadPoolExecutor(1, "fetcher")

    @app.post("/v1/documents/pages")
    async def pages(request: Request) -> Response:
        with Share(bodies) as share:
            body = await read_json(request, settings, share)
            working = page_pictures(body, settings, fetchers, renderer, share)
            found = await unless_disconnected(request.receive, working)
        return Response(status_code=499) if found is None else json_response(found)


async def page_pictures(
    body: Any, settings: ServerSettings, fetchers: Executor, renderer: Executor, share: Share
) -> dict[str, Any]:
    """Returns the object with the pages.

    Ends early at the limits of pictures and bytes of a request, so that another request can show all of them.

    Args:
        body: the JSON value of the request: `url` of the document, `pages` such as "1-3,7", `dpi` of a PDF.
        fetchers: threads for documents of other machines.
        renderer: the thread that opens, renders and closes documents.
        share: holds the bytes of the document and of the pages.

    Raises:
        ApiError: a field is wrong, or the document is not allowed or cannot be opened.
    """
    fields = Fields(body)
    url, pages = fields.text("url"), fields.text("pages")
    dpi = fields.whole("dpi", MIN_DPI, MAX_DPI) or DEFAULT_DPI
    if not url:
        raise bad_field("url", "missing; give the document as a data URL, data:application/pdf;base64,...")
    if pages is not None and len(pages) > MAX_RANGES_LENGTH:
        raise bad_field("pages", f"{shown(pages)}; expected at most {MAX_RANGES_LENGTH} characters")
    try:
        ranges = None if pages is None else page_ranges(pages)
    except UserError as error:
        raise bad_field("pages", str(error).removeprefix("pages: ")) from None
    (content,) = await read_files([PictureUrl(url, "url")], settings, fetchers, share)
    opening = renderer.submit(opened, content, dpi, settings.max_pixels)
    try:
        document = await asyncio.wrap_future(opening)
        numbers = document.selected(ranges, settings.max_pictures)
        found = await rendered(document, numbers, settings, renderer, share)
    except UserError as error:
        raise bad_field("url", str(error).removeprefix("the image: ")) from None
    finally:
        # after what the thread still does for a client that has disconnected
        renderer.submit(close, opening)
    return {"object": "list", "num_pages": document.num_pages, "data": found}


def opened(content: bytes, dpi: int, max_pixels: int) -> Document:
    """Opens a document. Raises UserError if it cannot be opened or is in a format that the server does not open."""
    if b"%PDF-" not in head_of(content):
        check_format(content)
    document = open_document(content, dpi=dpi, max_pixels=max_pixels)
    # for messages; bytes have no name of their own
    document.name = "the document"
    return document


def close(opening: Future[Document]) -> None:
    """Closes a document if it was opened."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


async def rendered(
    document: Document, numbers: Sequence[int], settings: ServerSettings, renderer: Executor, share: Share
) -> list[dict[str, Any]]:
    """Returns the objects of pages, as many as the limit of bytes allows and at least one."""
    found: list[dict[str, Any]] = []
    size, loop = 0, asyncio.get_running_loop()
    for number in numbers:
        page = await loop.run_in_executor(renderer, page_object, document, number, settings.max_pixels)
        size += len(page.get("url", ""))
        if found and size > settings.max_body_bytes:
            break
        await share.take(len(page.get("url", "")))
        found.append(page)
    return found


def page_object(document: Document, number: int, max_pixels: int) -> dict[str, Any]:
    """Returns a page as a picture without loss, or the reason why there is none."""
    page = {"object": "page", "number": number}
    try:
        picture = load_image(document.page(number), max_pixels=max_pixels)
    except UserError as error:
        return page | {"error": str(error)}
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return page | {"width": picture.width, "height": picture.height, "url": url}
