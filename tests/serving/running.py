"""A server of a tiny model in a thread, for tests."""

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from mindvlm.api import load
from mindvlm.serving.listening import bind
from mindvlm.serving.server import ModelServer
from mindvlm.serving.settings import ServerSettings
from tests.tiny_vary import picture, write_tiny_vary


class RunningServer:
    """A started server with its address."""

    def __init__(self, server: ModelServer, port: int):
        self.server, self.scheduler, self.port = server, server.scheduler, port
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"
        self.headers: dict[str, str] = {}

    @property
    def service(self):
        return self.server.service

    @property
    def engine(self):
        return self.scheduler.model.engine

    def request(self, method: str, path: str, **options) -> httpx.Response:
        headers = self.headers | options.pop("headers", {})
        return httpx.request(method, self.root + path, timeout=60, headers=headers, **options)

    def post(self, path: str, body=None, **options) -> httpx.Response:
        # as ASCII, in which half a surrogate pair has a form
        content = {} if body is None else {"content": json.dumps(body)}
        return self.request("POST", f"/v1/{path}", **content, **options)

    def chat(self, text="read", **fields) -> httpx.Response:
        fields.setdefault("messages", [{"role": "user", "content": text}])
        return self.post("chat/completions", {"model": "tiny", "max_tokens": 4, **fields})

    def text(self, *arguments, **fields) -> str:
        answer = self.chat(*arguments, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def wait_until_idle(self) -> None:
        wait_for(lambda: not self.scheduler.running and not self.scheduler.waiting)


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def running(folder: Path, *, wait: bool = True, changes: dict | None = None, **settings) -> Iterator[RunningServer]:
    """Serves a tiny Vary with random weights."""
    path = write_tiny_vary(folder, **(changes or {}))
    listening = bind("127.0.0.1", 0)
    server = ModelServer(lambda: load(path, cache=False), ServerSettings(**settings), listening, close_seconds=5)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        started = RunningServer(server, listening.getsockname()[1])
        if wait:
            wait_for(lambda: httpx.get(f"{started.root}/health").status_code == 200, 60)
        yield started
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def data_url(seed: int = 0, size: tuple[int, int] = (40, 20), kind: str = "PNG") -> str:
    file = io.BytesIO()
    picture(seed, size).save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def shown(seed: int, text: str = "read") -> list[dict]:
    """The messages of a question about a picture."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(seed)}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]
