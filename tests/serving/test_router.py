"""Two models with two replicas each, in processes of their own: answers, streams, ends of clients and of processes."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.serving.running import choices, data_url, mixed_request, routing, shown, wait_for
from tests.tiny_vary import picture, tiny_config, tiny_model, tiny_weights, write_tiny_vary

KEY = "secret"


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    paths = [write_tiny_vary(first), write_tiny_vary(second, name="other", weights=tiny_weights(tiny_config(), seed=5))]
    limits = {"num_slots": 4, "max_body_bytes": 300_000, "body_seconds": 1, "api_keys": (KEY,)}
    with routing(paths, num_replicas=2, cors_origins=("http://page.example",), **limits) as started:
        started.headers = {"Authorization": f"Bearer {KEY}"}
        yield started


@pytest.fixture
def client(router):
    with openai.OpenAI(base_url=router.url, api_key=KEY, max_retries=0) as made:
        yield made


def long_stream(client, **fields):
    """A stream of a long answer after its first event."""
    stream = client.chat.completions.create(
        **{"model": "tiny", "messages": shown(1), "max_tokens": 250, "stream": True, **fields}
    )
    next(stream)
    return stream


def busy(router):
    return [replica for replica in router.fleet.replicas if replica.num_running]


def test_each_model_answers(router, client):
    expected = str(tiny_model().chat("read", picture(3), max_new_tokens=4))
    assert router.text(messages=shown(3)) == expected
    other = router.text(messages=shown(3), model="other")
    assert other != expected
    assert (
        choices(router.post("chat/completions", {"messages": shown(3), "max_tokens": 4}))[0]["message"]["content"]
        == expected
    )
    assert [model.id for model in client.models.list().data] == ["tiny", "other"]
    assert client.models.retrieve("other").context_length == 320
    assert client.models.retrieve("other").scope["page_question"] == "Provide the ocr results of this image."
    unknown = router.chat(model="third")
    assert unknown.status_code == 404 and "this server has 'tiny', 'other'" in unknown.json()["error"]["message"]
    assert choices(router.post("completions", {"model": "other", "prompt": "a", "max_tokens": 2}))[0]["text"]
    wrong = router.chat(temperature="warm")
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "temperature"


def test_the_page_and_pages_of_documents(router):
    assert "<title>mindvlm</title>" in httpx.get(f"{router.root}/").text
    answer = router.post("documents/pages", {"url": data_url(3)})
    assert answer.status_code == 200 and [page["width"] for page in answer.json()["data"]] == [40]
    assert httpx.post(f"{router.url}/documents/pages", json={}).status_code == 401


def test_parallel_requests_have_the_bits_of_single_ones(router):
    requests = [mixed_request(number) for number in range(32)]
    alone = [choices(router.chat(**request)) for request in requests]
    before = [router.figure("mindvlm_answer_seconds_count", model="tiny", replica=number) for number in "01"]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda request: choices(router.chat(**request)), reversed(requests)))
    assert together[::-1] == alone
    after = [router.figure("mindvlm_answer_seconds_count", model="tiny", replica=number) for number in "01"]
    assert sum(after) - sum(before) == 32 and all(a - b > 5 for a, b in zip(after, before, strict=True))


def test_a_stream_comes_through_piece_by_piece(router):
    body = {"model": "tiny", "messages": shown(3), "max_tokens": 100, "temperature": 0}
    whole = choices(router.post("chat/completions", body))[0]["message"]["content"]
    with httpx.stream(
        "POST", f"{router.url}/chat/completions", json=body | {"stream": True}, headers=router.headers, timeout=60
    ) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        pieces = answer.iter_raw()
        first = next(pieces)
        # the answer is still under way
        assert b"[DONE]" not in first and len(busy(router)) == 1
        events = (first + b"".join(pieces)).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert len(events) > 4
    with openai.OpenAI(base_url=router.url, api_key=KEY) as client:
        chunks = list(client.chat.completions.create(**body, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_the_slot(router, streams):
    wait_for(lambda: not busy(router))
    finished = router.figure("mindvlm_finished_answers_total")
    body = httpx.Request(
        "POST", f"{router.url}/chat/completions", json={"messages": shown(1), "max_tokens": 250, "stream": streams}
    ).read()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", router.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: router.figure("mindvlm_running_answers") == 1)
    wait_for(lambda: not busy(router))
    wait_for(lambda: router.figure("mindvlm_running_answers") == 0, 3)
    assert router.figure("mindvlm_finished_answers_total") == finished


def test_a_process_is_killed_in_the_middle_of_a_stream(router, client):
    wait_for(lambda: not busy(router))
    stream = long_stream(client)
    (broken,) = busy(router)
    os.kill(broken.process.pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="has ended before its answer") as raised:
        for _ in stream:
            pass
    assert raised.value.body["code"] == "replica_failed"
    # the other one answers meanwhile
    assert router.health == 200
    expected = router.text(messages=shown(1), temperature=0)
    wait_for(lambda: broken.is_ready, 60)
    assert router.figure("mindvlm_replica_starts_total", model="tiny", replica=str(broken.number)) == 2
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(router.text, messages=shown(1), temperature=0) for _ in range(4)]
        assert {one.result() for one in asked} == {expected}


def test_limits_and_permissions_hold_at_the_router(router):
    for path in ("/v1/models", "/metrics", "/v1/none"):
        assert httpx.get(router.root + path).status_code == 401
    assert httpx.post(f"{router.url}/chat/completions", json={"messages": shown(1)}).status_code == 401
    assert httpx.get(f"{router.root}/health").status_code == 200
    assert router.request("GET", "/v1/none").json()["error"]["message"] == "GET /v1/none: no such path"
    large = router.post("chat/completions", content=b" " * 300_001)
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{router.url}/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n"
    with socket.create_connection(("127.0.0.1", router.port), timeout=10) as connection:
        connection.sendall(head.encode() + b"{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
