"""A browser for tests of the web page, and a server whose answers a test writes."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mindvlm.core.config import Scope
from mindvlm.processing.images.documents import Document, page_ranges
from mindvlm.serving.errors import ApiError
from mindvlm.serving.page import HEADERS, PAGE_FILES

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def opened_browser() -> Iterator:
    """Starts the Chromium of the system, else that of Playwright; skips the test if there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        found = next((path for name in BROWSERS if (path := shutil.which(name))), started.chromium.executable_path)
        if not os.path.exists(found):
            pytest.skip("no Chromium; install the package chromium, or run `playwright install chromium`")
        # containers have no user namespaces, which the sandbox needs
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
"""A picture of one pixel."""

ANSWERER = Scope(note="Answers about shapes.", questions=["Describe the image.", "What color is the circle?"])
READER = Scope(
    note="Reads short lines.", note_zh="识别短行。", questions=["Read it."], page_question="Read it.", one_picture=True
)
LOADING = ApiError(503, "a model of this server is loading; try again in a moment", code="loading")

Answer = Callable[["ScriptedHandler"], None]


class ScriptedServer(ThreadingHTTPServer):
    """Serves the page, and answers the requests of chats one after the other as a test says.

    Attributes:
        answers: for each request, a function that writes the response; the last one stays.
        asked: the bodies of the requests.
        keys: the Authorization headers of all requests to the API.
        models: the models that are loaded by their names, and what they are for.
        problem: what keeps the server from answering all its models, or any.
        num_pages: of each document.
        broken_pages: numbers of pages that cannot be rendered.
        max_pictures: of a request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.answers: list[Answer] = []
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.left = threading.Event()
        self.models = {"tiny": ANSWERER}
        self.problem: ApiError | None = None
        self.num_pages, self.broken_pages, self.max_pictures = 2, [], 16
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class ScriptedHandler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_GET(self) -> None:
        if self.path in PAGE_FILES:
            file, media_type = PAGE_FILES[self.path]
            self.reply(200, file.read_bytes(), {"Content-Type": media_type, **HEADERS})
        elif self.path == "/v1/models":
            self.server.keys.append(self.headers["Authorization"])
            limits = {"max_pictures": self.server.max_pictures}
            data = [{"id": name, "scope": asdict(scope), **limits} for name, scope in self.server.models.items()]
            self.reply_unless(None if data else self.server.problem, {"object": "list", "data": data})
        elif self.path == "/health":
            self.reply_unless(self.server.problem, {"status": "ok"})
        else:
            self.reply(404, b"{}")

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/documents/pages":
            self.reply(200, json.dumps(self.pages(body["pages"])).encode())
            return
        self.server.asked.append(body)
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def pages(self, ranges: str) -> dict:
        """Returns the pages "1-16" or "1,2" of a document, as blank pictures."""
        document = Document(b"", "document", self.server.num_pages)
        numbers = document.selected(page_ranges(ranges))
        broken = self.server.broken_pages
        data = [{"number": one, **({"error": "damaged"} if one in broken else {"url": BLANK})} for one in numbers]
        return {"num_pages": document.num_pages, "data": data}

    def reply_unless(self, problem: ApiError | None, value: dict) -> None:
        body = problem.body if problem else value
        self.reply(problem.status if problem else 200, json.dumps(body).encode())

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def send(self, value) -> None:
        line = value if isinstance(value, str) else json.dumps(value)
        try:
            self.wfile.write(f"data: {line}\n\n".encode())
        except OSError:
            self.server.left.set()

    def log_message(self, *arguments) -> None:
        """Prints nothing."""


def chunk(text: str = "", **fields) -> dict:
    """Returns a chunk of a stream."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None, **fields}]}


def says(*pieces: str, finish_reason: str = "stop", stop_reason: str = "stop_token") -> Answer:
    """Returns an answer that streams pieces."""

    def answer(handler: ScriptedHandler) -> None:
        handler.begin_stream()
        for piece in pieces:
            handler.send(chunk(piece))
        handler.send(chunk(finish_reason=finish_reason, stop_reason=stop_reason))
        figures = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        handler.send({"choices": [], "usage": figures, "timings": {"predicted_per_second": 1234.5}})
        handler.send("[DONE]")

    return answer


def refuses(status: int, message: str, **headers: str) -> Answer:
    """Returns an answer with an error object."""
    body = json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": None}}).encode()
    return lambda handler: handler.reply(status, body, headers)


def ask(page, question: str):
    """Asks a question and returns the finished answer."""
    count = page.locator(".answer").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    answer = page.locator(".answer").nth(count)
    answer.locator(".actions").wait_for()
    return answer
