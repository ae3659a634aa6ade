"""Requests whose pictures take long to read: what their clients see, and what others do meanwhile."""

import gc
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import httpx
import pytest

from mindvlm.serving import answers as answers_module
from mindvlm.serving import picture_reader
from mindvlm.serving.messages import PictureUrl
from mindvlm.serving.pictures import decode_picture
from tests.serving.running import data_url, running, shown, wait_for


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("model"), num_slots=2, max_waiting=2) as started:
        yield started


@pytest.fixture
def reading(monkeypatch, server):
    """Pictures are read only after the event is set."""
    released = threading.Event()

    def decode(processor, content, **options):
        released.wait(20)
        return decode_picture(processor, content, **options)

    monkeypatch.setattr(picture_reader, "decode_picture", decode)
    yield released
    released.set()
    wait_for(lambda: not server.service.num_reading and not server.service.bodies.shares)
    server.wait_until_idle()


@contextmanager
def streamed(server, seed: int):
    body = {"messages": shown(seed), "stream": True, "max_tokens": 3}
    with httpx.stream("POST", f"{server.url}/chat/completions", json=body, timeout=30) as answer:
        yield answer, answer.iter_lines()


def test_a_stream_waits_for_its_pictures(server, reading, monkeypatch):
    monkeypatch.setattr(answers_module, "PING_SECONDS", 0.2)
    with streamed(server, 1) as (answer, lines):
        assert answer.status_code == 200 and next(lines) == ": waiting"
        assert server.chat("a text needs no picture").status_code == 200
        reading.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_an_error_of_a_picture_is_an_event_of_a_stream_that_has_begun(server, reading, monkeypatch):
    monkeypatch.setattr(answers_module, "PING_SECONDS", 0.2)
    monkeypatch.setattr(server.scheduler.model.processor, "max_pixels", 10)
    with streamed(server, 2) as (_, lines):
        next(lines)
        reading.set()
        failed, end = [line for line in lines if line.startswith("data")]
    assert "the limit is 10" in json.loads(failed[6:])["error"]["message"] and end == "data: [DONE]"


def test_clients_that_leave_hold_what_cannot_be_stopped_and_give_back_the_rest(server, reading):
    """Two pictures are read by threads, and two wait."""
    body = json.dumps({"messages": shown(3)}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(request)
        wait_for(lambda: server.service.num_reading == len(server.service.bodies.shares) == 4)
    wait_for(lambda: server.service.num_reading == len(server.service.bodies.shares) == 2)
    assert server.service.pictures.decoding.locked()
    reading.set()
    wait_for(lambda: server.service.num_reading == len(server.service.bodies.shares) == 0)


def test_the_data_of_pictures_is_not_kept_while_answers_wait(server):
    url = data_url(5, (40, 41))
    step, server.engine.step = server.engine.step, lambda: time.sleep(0.02) or []
    try:
        with ThreadPoolExecutor(1) as pool:
            parts = [{"type": "image_url", "image_url": {"url": url}}]
            asked = pool.submit(server.chat, messages=[{"role": "user", "content": parts}])
            wait_for(lambda: server.scheduler.running)
            gc.collect()
            held = [one for one in gc.get_objects() if isinstance(one, PictureUrl) and one.url == url]
            assert held == []
            server.engine.step = step
            assert asked.result().status_code == 200
    finally:
        server.engine.step = step


def test_requests_that_wait_for_pictures_have_places_in_the_queue(server, reading):
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(server.chat, messages=shown(seed)) for seed in range(4, 8)]
        wait_for(lambda: server.service.num_reading == 4)
        refused = server.chat(messages=shown(8))
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert server.chat(messages=shown(8), n=5).status_code == 400
        reading.set()
        assert [one.result().status_code for one in asked] == [200] * 4


def test_pictures_that_take_too_long(server, reading, monkeypatch):
    monkeypatch.setattr(server.service, "settings", replace(server.service.settings, max_seconds=0.3))
    late = server.chat(messages=shown(9))
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"


def test_a_failure_while_pictures_are_read(server, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(picture_reader, "decode_picture", fail)
    failed = server.chat(messages=shown(10))
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
    assert server.service.num_reading == 0
