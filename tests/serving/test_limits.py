"""Limits and permissions: sizes, pictures, keys, origins, files and slow clients."""

import asyncio
import io
import json
import os
import socket
import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from PIL import Image, PngImagePlugin

from mindvlm.serving import gate, http_server
from mindvlm.serving import pictures as pictures_module
from mindvlm.serving.budget import ByteBudget, Share
from mindvlm.serving.messages import PictureUrl
from mindvlm.serving.settings import ServerSettings
from tests.serving.running import data_url, running, shown, wait_for
from tests.tiny_vary import picture

KEY = "secret-\N{LATIN SMALL LETTER E WITH ACUTE}"


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with a picture, and what must not be read."""
    folder = tmp_path_factory.mktemp("served")
    picture(3).save(folder / "a b.png")
    picture(3).save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "large.png").write_bytes(b"x" * 200_001)
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, media):
    limits = {"max_body_bytes": 300_000, "body_seconds": 1, "max_pictures": 2, "max_pixels": 10_000}
    limits["max_bodies_bytes"] = 350_000
    access = {"api_keys": ("other", KEY), "cors_origins": ("http://page.example",), "media_path": media}
    with running(tmp_path_factory.mktemp("model"), **limits, **access, max_picture_bytes=200_000) as started:
        started.headers = {"Authorization": f"Bearer {KEY}".encode()}
        yield started


def refusal(server, url: str) -> str:
    """Returns the message for a picture that is refused, after the name of its field."""
    parts = [{"type": "text", "text": "read"}, {"type": "image_url", "image_url": {"url": url}}]
    answer = server.chat(messages=[{"role": "user", "content": parts}])
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "messages[0].content[1].image_url"
    return error["message"].removeprefix(f"{error['param']}: ")


def png(image: Image.Image, **options) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x"])
def test_a_wrong_key(server, given):
    for path in ("/v1/models", "/metrics", "/v1/none"):
        answer = server.request("GET", path, headers={"Authorization": given.encode()})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server.root}/health").status_code == 200


def test_every_key_is_accepted(server):
    for key in ("other", KEY):
        headers = {"Authorization": f"bearer {key}".encode()}
        assert server.request("GET", "/v1/models", headers=headers).status_code == 200


def test_origins(server):
    asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{server.url}/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    refused = httpx.options(f"{server.url}/chat/completions", headers=asked | {"Origin": "http://other.example"})
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("size", [300_001, 1_000_000, 5_000_000])
def test_a_body_that_is_too_large(server, size):
    answer = server.post("chat/completions", content=b" " * size)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_a_body_that_grows_without_end(server):
    def pieces():
        while True:
            yield b" " * 65536

    try:
        assert server.post("chat/completions", content=pieces()).status_code == 413
    except httpx.WriteError:  # the server has closed the connection
        pass
    assert server.chat().status_code == 200


def test_a_body_that_comes_slowly(server):
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + b"{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_bodies_that_are_read_at_the_same_time(server):
    """A body for which there is no room waits until a slow client is dropped."""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other\r\nContent-Length: 290000\r\n\r\n"
    )
    with ExitStack() as stack:
        slow, second = (stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10)) for _ in range(2))
        slow.sendall(head.encode() + b" " * 250_000)
        time.sleep(0.5)
        start = time.monotonic()
        second.sendall(head.encode() + b" " * 290_000)
        assert server.chat().status_code == 200
        assert second.recv(1000).startswith(b"HTTP/1.1 400 ") and time.monotonic() - start > 0.3
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_body_for_which_there_is_never_room(server):
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other\r\nContent-Length: 290000\r\n\r\n"
    )
    with Share(server.service.bodies) as share, socket.create_connection(("127.0.0.1", server.port), 10) as client:
        server.service.bodies.used += 350_000
        client.sendall(head.encode() + b" " * 290_000)
        answer = client.recv(1000)
        server.service.bodies.used -= 350_000
    assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 2" in answer and not share.is_waiting


def test_pictures_that_are_too_large_together(server, media):
    for number in range(2):
        (media / f"zeros{number}.png").write_bytes(bytes(190_000))
    parts = [{"type": "image_url", "image_url": f"file://{media}/zeros{number}.png"} for number in range(2)]
    answer = server.chat(messages=[{"role": "user", "content": parts}])
    assert answer.status_code == 400 and "the pictures have more than 300000 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("url", ["http://slow.example/a.png", " HTTP://slow.example/a.png"])
def test_hosts_that_do_not_answer_hold_up_nobody_else(server, monkeypatch, url):
    answered = threading.Event()
    monkeypatch.setattr(pictures_module, "fetched", lambda url, settings: answered.wait(20) and b"")
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "read"}]
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(server.chat, messages=[{"role": "user", "content": parts}]) for _ in range(20)]
        try:
            time.sleep(0.5)
            assert server.chat(messages=shown(1)).status_code == 200
        finally:
            answered.set()
    assert {one.result().status_code for one in asked} == {400}


def test_large_pictures_hold_up_no_small_ones(server, monkeypatch):
    released, decode = threading.Event(), server.service.model.processor.picture

    def decode_slowly(content: bytes):
        with Image.open(io.BytesIO(content)) as image:
            is_large = image.width == 64
        if is_large:
            released.wait(20)
        return decode(content)

    monkeypatch.setattr(pictures_module, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(server.service.model.processor, "picture", decode_slowly)
    large = [[{"type": "image_url", "image_url": data_url(number, (64, 40))}] for number in range(70, 74)]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.chat, messages=[{"role": "user", "content": parts}]) for parts in large]
        try:
            wait_for(server.service.pictures.large.locked, 5)
            start = time.monotonic()
            assert server.chat(messages=shown(75)).status_code == 200 and time.monotonic() - start < 10
        finally:
            released.set()
        assert {one.result().status_code for one in asked} == {200}


def leave(server, body: dict) -> None:
    """Asks and disconnects."""
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(0.3)


def test_a_client_that_leaves_while_a_picture_is_fetched(server, monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(pictures_module, "fetched", lambda url, settings: answered.wait(20) and b"")
    parts = [{"type": "image_url", "image_url": "http://slow.example/a.png"}]
    try:
        leave(server, {"messages": [{"role": "user", "content": parts}]})
        wait_for(lambda: not server.service.bodies.shares, 3)
    finally:
        answered.set()


def test_a_client_that_leaves_before_the_first_event(server, monkeypatch):
    monkeypatch.setattr(server.scheduler, "submit", lambda jobs: None)
    canceled = []
    monkeypatch.setattr(server.scheduler, "cancel", canceled.append)
    leave(server, {"messages": [{"role": "user", "content": "read"}], "stream": True})
    wait_for(lambda: canceled, 3)


def test_too_many_requests_at_the_same_time(server, monkeypatch):
    monkeypatch.setattr(gate, "MAX_REQUESTS", 0)
    answer = server.chat()
    assert (
        answer.status_code == 503 and answer.json()["error"]["code"] == "busy" and answer.headers["retry-after"] == "2"
    )
    assert httpx.get(f"{server.root}/health").status_code == 200


def test_too_many_connections(server, monkeypatch):
    """The one that has sent nothing for the longest time is closed, and there is room for a new one."""
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 3)
    with ExitStack() as stack:
        idle = []
        for _ in range(3):
            idle.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10)))
            time.sleep(0.05)
        assert httpx.get(f"{server.root}/health").status_code == 200
        assert idle[0].recv(1) == b""
        idle[2].sendall(HEAD + b"\r\n")
        assert idle[2].recv(100).startswith(b"HTTP/1.1 200 ")


HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"


WITH_BODY = HEAD + b"Content-Length: 3\r\n\r\n"


@pytest.mark.parametrize(
    "pieces", [[], [HEAD], [HEAD + b"\r\n", b"G"], [WITH_BODY, b"a", b"b"], [WITH_BODY, b"abc"], [WITH_BODY, b"abcG"]]
)
def test_a_request_that_does_not_come(server, monkeypatch, pieces):
    monkeypatch.setattr(http_server, "HEADER_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=4) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.1)
        start = time.monotonic()
        while connection.recv(1000):
            pass
    assert time.monotonic() - start < 3.5


def test_a_connection_is_used_again(server, monkeypatch):
    monkeypatch.setattr(http_server, "HEADER_SECONDS", 0.3)
    with httpx.Client(headers=server.headers) as client:
        for _ in range(3):
            assert client.get(f"{server.url}/models").status_code == 200
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("url", "is_in_loop"),
    [
        ("data:image/png;base64,", True),
        (" DATA:;BASE64,", True),
        ("data:image/png;base64," + "A" * 65_536, False),
        ("data:image/png,", False),
        ("data:,;base64", False),
    ],
)
def test_only_short_base64_is_decoded_in_the_event_loop(url, is_in_loop, monkeypatch):
    threads = []

    def read(*_):
        threads.append(threading.current_thread())
        return b""

    monkeypatch.setattr(pictures_module, "read_picture_file", read)
    share = Share(ByteBudget(100))
    asyncio.run(pictures_module.read_files([PictureUrl(url, "url")], ServerSettings(), None, share))
    assert [thread is threading.current_thread() for thread in threads] == [is_in_loop]


def test_pictures_that_cannot_be_used(server):
    assert "400000000 pixels, the limit is 10000; make" in refusal(server, png(Image.new("1", (20_000, 20_000))))
    assert "101 x 100 = 10100 pixels, the limit is 10000" in refusal(server, png(Image.new("1", (101, 100))))
    assert "base64" in refusal(server, "data:image/png;base64,\ud800")
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "0" * 80_000_000, zip=True)
    assert refusal(server, png(Image.new("L", (9, 9)), pnginfo=text))
    assert "damaged" in refusal(server, data_url(3)[:-120])
    assert "empty" in refusal(server, "data:image/png;base64,")
    assert "base64" in refusal(server, "data:image/png;base64,A%")
    pdf = "a PDF, not a picture; POST /v1/documents/pages turns its pages into pictures"
    assert pdf in refusal(server, "data:," + "%25PDF-1.7")
    assert "not an image" in refusal(server, "data:," + "%25!PS-Adobe-3.0 EPSF-3.0%0A%25%25BoundingBox: 0 0 9 9%0A")
    assert "no URL of a picture" in refusal(server, "iVBORw0KGgo")
    assert r"'/etc/pass\nwd' is no URL of a picture" in refusal(server, "/etc/pass\nwd")
    assert "fetches no pictures" in refusal(server, "http://127.0.0.1/a.png")
    assert r"http://127.0.0.1:80\r\nX:y: this server" in refusal(server, "http://127.0.0.1:80\r\nX:y")
    assert server.chat(messages=shown(1) * 2).status_code == 200
    too_many = server.chat(messages=shown(1) * 3)
    assert too_many.status_code == 400 and "3 pictures; the limit" in too_many.json()["error"]["message"]


def test_files_below_the_folder(server, media):
    parts = [{"type": "image_url", "image_url": f"file://{media}/a%20b.png"}, {"type": "text", "text": "read"}]
    assert server.text(messages=[{"role": "user", "content": parts}]) == server.text(messages=shown(3))
    urls = [
        *(f"file://{media}/{name}" for name in ("link.png", "../secret.png", "%2e%2e/secret.png", "none.png", "sub")),
        *(f"file://{media}/{name}" for name in ("pipe.png", "a%00.png", "%ff.png", "sub/../../secret.png", "")),
        *(
            f"file://{media}x/a.png",
            "file:///etc/passwd",
            "file:///",
            "file://",
            f"file://evil.example{media}/a%20b.png",
        ),
        *("file:secret.png", f"FILE://{media}/../secret.png", "file:////etc/passwd"),
    ]
    messages = {refusal(server, url).partition(": ")[2] for url in urls}
    # nothing tells whether a file exists
    assert messages == {"no readable file below the folder that this server may read"}
    assert "200001 bytes" in refusal(server, f"file://{media}/large.png")
