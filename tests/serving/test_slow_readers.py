"""Clients that do not read their responses are dropped, and slow ones that do are not. Needs no model."""

import contextlib
import socket
import threading
import time

import pytest

from mindvlm.serving import http_server
from mindvlm.serving.listening import bind
from tests.serving.running import wait_for

SIZE = 40_000_000


async def send_whole(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % SIZE)]})
    await send({"type": "http.response.body", "body": bytes(SIZE)})


async def send_pieces(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % SIZE)]})
    for _ in range(SIZE // 40_000):
        await send({"type": "http.response.body", "body": bytes(40_000), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def asked(app, *headers: str):
    """Yields the server of an application and a connection that has sent a request."""
    listening = bind("127.0.0.1", 0)
    server = http_server.new_server(app, 5)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        with socket.socket() as client:
            client.settimeout(10)
            client.connect(listening.getsockname())
            client.sendall("\r\n".join(("GET / HTTP/1.1", "Host: x", *headers, "", "")).encode())
            wait_for(lambda: server.server_state.connections)
            yield server, client
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("app", [send_whole, send_pieces])
@pytest.mark.parametrize("headers", [[], ["Connection: close"]])
def test_a_client_that_does_not_read(monkeypatch, app, headers):
    monkeypatch.setattr(http_server, "READ_SECONDS", 0.3)
    with asked(app, *headers) as (server, _):
        wait_for(lambda: not server.server_state.connections, 5)
        wait_for(lambda: not server.server_state.tasks, 5)


@pytest.mark.parametrize("app", [send_whole, send_pieces])
def test_a_client_that_reads_slowly(monkeypatch, app):
    monkeypatch.setattr(http_server, "READ_SECONDS", 0.6)
    num_bytes = 0
    with asked(app, "Connection: close") as (_, client):
        start = time.monotonic()
        while piece := client.recv(1_000_000, socket.MSG_WAITALL):
            num_bytes += len(piece)
            time.sleep(0.05)
    assert num_bytes > SIZE and time.monotonic() - start > 2 * http_server.READ_SECONDS
