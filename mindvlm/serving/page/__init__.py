"""The web page of the server: its three files, and the example pictures that it offers."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

FOLDER = Path(__file__).parent
# in the package for a wheel, in the root folder for a clone
PACKAGE = FOLDER.parents[1]
EXAMPLES = (PACKAGE if (PACKAGE / "examples").exists() else PACKAGE.parent) / "examples/images"

PAGE_FILES = {
    "/": (FOLDER / "index.html", "text/html; charset=utf-8"),
    "/page.css": (FOLDER / "page.css", "text/css; charset=utf-8"),
    "/page.js": (FOLDER / "page.js", "text/javascript; charset=utf-8"),
    "/examples/scene.png": (EXAMPLES / "scene.png", "image/png"),
    "/examples/page.png": (EXAMPLES / "page.png", "image/png"),
    "/examples/invoice.png": (EXAMPLES / "invoice.png", "image/png"),
    "/examples/scan.pdf": (EXAMPLES / "scan.pdf", "application/pdf"),
}
"""Path of a URL -> file and media type."""

HEADERS = {
    # a model's text cannot make the browser run or load anything, even if the page had a fault
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Adds the routes of `PAGE_FILES`."""
    for path in PAGE_FILES:
        app.get(path)(serve_file(*PAGE_FILES[path]))


def serve_file(file: Path, media_type: str):
    """Returns the function of a route that sends a file."""

    async def serve() -> Response:
        return Response(file.read_bytes(), media_type=media_type, headers=HEADERS)

    return serve
