"""Many clients at once: the same answers as alone, a bounded queue, freed slots, and failures of the engine."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest

from mindvlm.processing.images.picture import Picture
from mindvlm.serving.picture_reader import PictureCache
from mindvlm.serving.warming import exact_batch_sizes
from mindvlm.tools.load_test import main as load_test
from tests.serving.running import LONG, choices, mixed_request, running, shown, wait_for
from tests.tiny_vary import picture


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("model"), num_slots=4, max_waiting=32) as started:
        yield started


@contextmanager
def held(server):
    """Running answers get no token inside the block, and waiting ones take free slots."""
    step = server.engine.step
    server.engine.step = lambda: time.sleep(0.02) or []
    try:
        yield
    finally:
        server.engine.step = step


def test_answers_under_load_have_the_bits_of_answers_alone(server):
    requests = [mixed_request(number) for number in range(32)]
    alone = [choices(server.chat(**request)) for request in requests]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda request: choices(server.chat(**request)), reversed(requests)))
    assert together[::-1] == alone


def test_prompts_with_the_same_beginning_reuse_the_cache(server):
    if not server.engine.is_exact:
        pytest.skip("there are no kernels")
    server.wait_until_idle()
    first = server.chat(messages=shown(9, LONG + "one")).json()
    talk = [*shown(9, LONG + "one"), {"role": "assistant", "content": "yes"}, {"role": "user", "content": "two"}]
    second = server.chat(messages=talk).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] // 64 * 64 > 0
    assert second["timings"]["cache_n"] + second["timings"]["prompt_n"] == second["usage"]["prompt_tokens"]
    other = server.chat(messages=shown(8, LONG + "one")).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    server.engine.clear()
    server.scheduler.finished.clear()
    assert server.text(messages=talk) == second["choices"][0]["message"]["content"]


def test_prompts_are_computed_whole_on_demand(server, monkeypatch):
    server.wait_until_idle()
    server.scheduler.finished.clear()
    server.engine.clear()
    monkeypatch.setattr(server.scheduler, "settings", replace(server.scheduler.settings, reuses_prompts=False))
    for _ in range(2):
        answer = server.chat(LONG, max_tokens=1).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert server.engine.slots == [None] * 4


def test_an_engine_that_rounds_by_the_number_of_rows_reuses_nothing(server, monkeypatch):
    server.wait_until_idle()
    monkeypatch.setattr(server.engine, "is_exact", False)
    for _ in range(2):
        answer = server.chat(LONG, max_tokens=1).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    server.wait_until_idle()
    assert server.engine.slots.count(None) + len(server.scheduler.finished.kept) == 4


def test_the_queue_is_bounded(server, monkeypatch):
    server.wait_until_idle()
    monkeypatch.setattr(server.scheduler, "settings", replace(server.scheduler.settings, max_waiting=3))
    with ThreadPoolExecutor(7) as pool:
        with held(server):
            asked = [pool.submit(server.chat, f"question {number}") for number in range(7)]
            wait_for(lambda: len(server.scheduler.waiting) == 3 and len(server.scheduler.running) == 4)
            refused = server.chat()
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "limit is 3" in refused.json()["error"]["message"]
        never = server.post("completions", {"prompt": ["a"] * 8, "n": 16})
        assert never.status_code == 400 and "128 answers" in never.json()["error"]["message"]
        assert [one.result().status_code for one in asked] == [200] * 7


def test_the_pictures_that_wait_are_bounded(server, monkeypatch):
    server.wait_until_idle()
    with ThreadPoolExecutor(6) as pool:
        with held(server):
            asked = [pool.submit(server.chat, messages=shown(number)) for number in range(5)]
            wait_for(lambda: len(server.scheduler.waiting) == 1 and len(server.scheduler.running) == 4)
            few = replace(server.scheduler.settings, max_waiting_bytes=100)
            monkeypatch.setattr(server.scheduler, "settings", few)
            refused = server.chat(messages=shown(5))
            text = pool.submit(server.chat)
            wait_for(lambda: len(server.scheduler.waiting) == 2)
        assert refused.status_code == 429 and "bytes" in refused.json()["error"]["message"]
        assert [one.result().status_code for one in (*asked, text)] == [200] * 6


def test_waiting_requests_are_prefilled_together(server, monkeypatch):
    server.wait_until_idle()
    alone = [choices(server.chat(**mixed_request(number))) for number in range(4)]
    server.scheduler.finished.clear()
    server.engine.clear()
    sizes, add_all = [], server.engine.add_all
    monkeypatch.setattr(server.engine, "add_all", lambda additions: sizes.append(len(additions)) or add_all(additions))
    with ThreadPoolExecutor(5) as pool:
        with held(server):
            work, server.scheduler.work = server.scheduler.work, lambda: time.sleep(0.01)
            asked = [pool.submit(server.chat, **mixed_request(number)) for number in range(4)]
            wait_for(lambda: len(server.scheduler.waiting) == 4)
            server.scheduler.work = work
        assert [choices(one.result()) for one in asked] == alone
    assert sizes[0] == 4


def test_a_closed_stream_frees_its_slot(server):
    server.wait_until_idle()
    body = {"messages": shown(1), "stream": True, "max_tokens": 250}
    with httpx.stream("POST", f"{server.url}/chat/completions", json=body) as answer:
        next(answer.iter_lines())
        assert len(server.scheduler.running) == 1
    wait_for(lambda: not server.scheduler.running)


def test_a_client_that_leaves_frees_its_slot_and_its_place(server):
    server.wait_until_idle()
    body = json.dumps({"messages": shown(1)}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with held(server):
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(6)]
        for client in clients:
            client.sendall(request)
        wait_for(lambda: len(server.scheduler.waiting) == 2 and len(server.scheduler.running) == 4)
        for client in clients:
            client.close()
        wait_for(lambda: not server.scheduler.waiting)
    wait_for(lambda: not server.scheduler.running)
    assert server.chat().status_code == 200


def test_an_answer_that_takes_too_long(server):
    server.wait_until_idle()
    with ThreadPoolExecutor(6) as pool:
        with held(server):
            asked = [pool.submit(server.chat) for _ in range(6)]
            wait_for(lambda: len(server.scheduler.running) == 4 and len(server.scheduler.waiting) == 2)
            for job in (*server.scheduler.waiting, *server.scheduler.running.values()):
                job.expires = 0
            answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [504] * 6
    late = answers[0]
    assert late.json()["error"]["code"] == "timeout" and late.headers["x-should-retry"] == "false"


def failing_after(server, monkeypatch, num_steps: int) -> None:
    """The engine fails once after some steps."""
    step, left = server.engine.step, [num_steps]

    def failing_step():
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("the device is gone")
        return step()

    monkeypatch.setattr(server.engine, "step", failing_step)


def test_a_failure_in_the_middle_of_a_stream(server, monkeypatch):
    server.wait_until_idle()
    expected = server.text(messages=shown(2), max_tokens=6)
    failing_after(server, monkeypatch, 4)
    with openai.OpenAI(base_url=server.url, api_key="none") as client:
        stream = client.chat.completions.create(model="tiny", messages=shown(2), max_tokens=6, stream=True)
        with pytest.raises(openai.APIError, match="the engine failed") as raised:
            for _ in stream:
                pass
    assert raised.value.body["code"] == "engine_failed"
    assert server.text(messages=shown(2), max_tokens=6) == expected
    failing_after(server, monkeypatch, 4)
    whole = server.chat(messages=shown(2), max_tokens=6)
    assert whole.status_code == 500 and whole.json()["error"]["code"] == "engine_failed"
    assert server.text(messages=shown(2), max_tokens=6) == expected


def test_a_failure_of_the_picture_encoder(server, monkeypatch):
    server.wait_until_idle()
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "encode_images", lambda *pixels: 1 / 0)
        assert server.chat(messages=shown(77)).status_code == 500
    assert server.chat(messages=shown(77)).status_code == 200


def test_values_that_are_not_finite_end_one_answer_only(server, monkeypatch):
    server.wait_until_idle()
    encode = server.engine.encode_images
    expected = server.text("question", max_tokens=6)
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(server.engine, "encode_images", lambda *pixels: encode(*pixels) * float("nan"))
        with held(server):
            good, bad = pool.submit(server.text, "question", max_tokens=6), pool.submit(server.chat, messages=shown(78))
            wait_for(lambda: len(server.scheduler.running) == 2)
        assert good.result() == expected
        assert bad.result().status_code == 500 and "NaN" in bad.result().json()["error"]["message"]
    server.scheduler.model.encoder.cache.clear()


@pytest.mark.parametrize("method", ["reason_after", "take"])
def test_a_text_that_cannot_be_made_ends_one_answer_only(server, monkeypatch, method):
    server.wait_until_idle()
    made, expected = server.scheduler.model.new_text, server.text("question", max_tokens=6)

    def new_text(options):
        text = made(options)
        if options.max_new_tokens == 5:
            setattr(text, method, lambda *arguments: 1 / 0)
        return text

    monkeypatch.setattr(server.scheduler.model, "new_text", new_text)
    with ThreadPoolExecutor(2) as pool:
        with held(server):
            good, bad = pool.submit(server.text, "question", max_tokens=6), pool.submit(server.chat, max_tokens=5)
            wait_for(lambda: len(server.scheduler.running) == 2)
        assert good.result() == expected
        assert bad.result().status_code == 500 and bad.result().json()["error"]["code"] == "text_failed"
    server.wait_until_idle()
    assert server.engine.slots.count(None) + len(server.scheduler.finished.kept) == 4


def test_health_under_load(server):
    with ThreadPoolExecutor(1) as pool:
        with held(server):
            asked = pool.submit(server.chat)
            wait_for(lambda: len(server.scheduler.running) == 1)
            assert httpx.get(f"{server.root}/health", timeout=5).status_code == 200
        assert asked.result().status_code == 200


def test_the_load_test_asks_and_measures(server, capsys):
    server.wait_until_idle()
    arguments = ["--url", server.url, "--images", "--max_tokens", "2", "--requests", "3", "--clients", "1", "2"]
    assert load_test(arguments) == 0
    alone, together = capsys.readouterr().out.splitlines()
    assert alone.startswith("1 clients: 3 answers, ") and alone.endswith(", 1.00x")
    assert together.startswith("2 clients: 3 answers, ")
    assert load_test([*arguments, "--soak", "0.5", "--pid", str(os.getpid())]) == 0
    assert "MiB/min" in capsys.readouterr().out
    assert load_test([*arguments[2:], "--url", "http://example.com/v1"]) == 2
    assert "servers of this machine only" in capsys.readouterr().err


def test_pictures_are_encoded_together_where_the_bits_stay(server, monkeypatch):
    server.wait_until_idle()
    model, encode, sizes = server.scheduler.model, server.engine.encode_images, []
    monkeypatch.setattr(server.engine, "encode_images", lambda *pixels: sizes.append(len(pixels[0])) or encode(*pixels))
    pictures = model.pictures([picture(seed) for seed in range(4)])
    alone = [model.encoder.encode_views([one])[0].asnumpy() for one in pictures]
    for size in exact_batch_sizes(model):
        model.encoder.cache.clear()
        monkeypatch.setattr(model.encoder, "batch_sizes", (size, 1) if size > 1 else (1,))
        for expected, features in zip(alone, model.encoder.encode_views(pictures), strict=True):
            np.testing.assert_array_equal(features.asnumpy(), expected)
    model.encoder.cache.clear()
    sizes.clear()
    monkeypatch.setattr(model.encoder, "batch_sizes", (2, 1))
    together = model.encoder.encode_views([*pictures[:3], pictures[1]])
    assert sizes == [2, 1]
    for number, features in zip((0, 1, 2, 1), together, strict=True):
        np.testing.assert_allclose(features.asnumpy(), alone[number], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(server.engine, "encode_images", lambda *pixels: encode(*pixels) * (1 + 1e-6 * len(pixels[0])))
    assert exact_batch_sizes(model) == (1,)


def test_pictures_are_kept_up_to_a_size():
    def read(**features):
        return Picture((SimpleNamespace(image=np.zeros(25, np.float32)),), np.zeros(1, np.int32), **features)

    cache = PictureCache(max_bytes=250)
    first, encoded = read(), read(features=np.zeros((1, 2, 12), np.float32))
    assert cache.get(b"a") is None
    cache.keep(b"a", first)
    cache.keep(b"b", encoded)
    assert cache.get(b"a") is first and cache.get(b"b") is encoded and cache.num_bytes == 196
    cache.get(b"a")
    cache.keep(b"c", read())
    # the one that was not asked for
    assert (list(cache.pictures), cache.num_bytes) == ([b"a", b"c"], 200)
    cache.keep(b"c", read())
    assert cache.num_bytes == 200


def test_a_picture_is_hashed_once_per_array():
    def digest(*arrays):
        return Picture((SimpleNamespace(**dict(zip("ab", arrays, strict=True))),), np.zeros(1, np.int32)).digests[0]

    one, other = np.arange(6, dtype=np.float32), np.arange(1, 7, dtype=np.float32)
    assert digest(one, other) == digest(one.copy(), other.copy())
    assert len({digest(one, other), digest(other, one), digest(one, one), digest(other, other)}) == 4
