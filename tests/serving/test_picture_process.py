"""The process that encodes pictures: the same answers as without it, its failures, and its end."""

import asyncio
import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.native.library import open_library
from mindvlm.processing.images.sources import data_of_url
from mindvlm.serving import picture_process as process_module
from mindvlm.serving import pictures as pictures_module
from mindvlm.serving.picture_process import FILE, PictureProcess, PictureWorker, start_picture_process
from mindvlm.serving.pictures import LargePictureError
from tests.serving.running import (
    Client,
    children_of,
    choices,
    data_url,
    has_ended,
    mixed_request,
    running,
    shown,
    started,
    wait_for,
)
from tests.tiny_vary import write_tiny_vary

pytestmark = pytest.mark.skipif(open_library() is None, reason="there are no kernels")
needs_cpus = pytest.mark.skipif(os.cpu_count() < 2, reason="there is one CPU")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the command with compiled graphs of earlier starts."""
    path = write_tiny_vary(tmp_path_factory.mktemp("model"), mode="graph")
    cache = str(path.parent / "cache")

    @contextlib.contextmanager
    def start(*options: str, num_threads: int = 2):
        threads = {"OMP_NUM_THREADS": str(num_threads), "MINDVLM_CACHE": cache}
        with started(path, *options, all_cpus=True, **threads) as (process, log, url):
            wait_for(lambda: "is ready" in log.read_text(), 60)
            yield process, log, Client(urlsplit(url).port)

    return start


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A server without the process."""
    with running(tmp_path_factory.mktemp("without"), num_slots=4, changes={"mode": "graph"}) as server:
        yield server


@pytest.fixture(scope="module")
def command(start):
    """A server with the process: the command, its log and requests for it."""
    with start("--slots", "4", "--max_pixels", "5000000") as running:
        yield running


def refusal(client: Client, url: str) -> str:
    parts = [{"type": "text", "text": "read"}, {"type": "image_url", "image_url": {"url": url}}]
    answer = client.chat(messages=[{"role": "user", "content": parts}])
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages[0].content[1].image_url"
    return answer.json()["error"]["message"]


@needs_cpus
def test_answers_have_the_bits_of_a_server_without_the_process(without, command):
    process, log, client = command
    assert len(children_of(process)) == 1
    requests = [mixed_request(number) for number in range(24)]
    requests += [{"messages": shown(5) + shown(6), "n": 2, "seed": 3}, {"messages": shown(5) + shown(5)}]
    alone = [choices(without.chat(**request)) for request in requests]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda request: choices(client.chat(**request)), requests)) == alone


@needs_cpus
def test_pictures_that_cannot_be_read_are_refused_and_large_ones_are_read(without, command):
    _, _, client = command
    assert "damaged" in refusal(client, data_url(3)[:-120])
    assert "not an image" in refusal(client, "data:," + "%25!PS-Adobe-3.0")
    blank = io.BytesIO()
    Image.new("1", (1, 5_000_001)).save(blank, "PNG")
    url = "data:image/png;base64," + base64.b64encode(blank.getvalue()).decode()
    assert "5000001 pixels, the limit is 5000000" in refusal(client, url)
    parts = [{"type": "image_url", "image_url": {"url": data_url(1, (2500, 1700))}}]
    large = [{"role": "user", "content": parts}]
    assert client.text(messages=large) == without.text(messages=large)


@needs_cpus
def test_the_server_encodes_pictures_when_the_process_ends(without, start):
    with start() as (process, log, client):
        for seed, ends_before in ((11, False), (12, True), (13, False)):
            if ends_before:
                (child,) = children_of(process)
                os.kill(child, signal.SIGKILL)
            assert client.text(messages=shown(seed)) == without.text(messages=shown(seed))
        assert log.read_text().count("the picture process has ended") == 1 and has_ended(child)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@needs_cpus
@pytest.mark.parametrize("asks", [True, False])
def test_the_process_ends_with_the_server(start, asks):
    with start() as (process, _, client):
        if asks:
            client.text(messages=shown(1))
        (child,) = children_of(process)
        # as a terminal does for Ctrl-C, and a supervisor at the end
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child, number)
        assert not has_ended(child)
        process.kill()
        wait_for(lambda: has_ended(child), 10)


@pytest.mark.parametrize(("options", "num_threads"), [(["--no_picture_process"], 2), ([], 1)])
def test_there_is_no_process_on_demand_or_with_one_thread(start, options, num_threads):
    with start(*options, num_threads=num_threads) as (process, _, client):
        assert children_of(process) == []
        assert client.chat(messages=shown(1)).status_code == 200


@pytest.fixture
def errors(monkeypatch):
    """The errors that are logged; other tests change what happens to them."""
    found: list[str] = []
    monkeypatch.setattr(process_module.logger, "error", lambda text, *values: found.append(text % values))
    return found


@pytest.fixture
def pair(without):
    """A worker in this process, and the server's end of its connection."""
    ours, theirs = socket.socketpair()
    without.wait_until_idle()
    with ours, theirs:
        yield PictureWorker(without.scheduler.model, theirs), ours


def send(connection: socket.socket, number: int, url: str, *, takes_large: bool = False) -> None:
    content = data_of_url(url)
    connection.sendall(FILE.pack(number, len(content), takes_large, False) + content)


def test_a_result_for_each_file(pair, monkeypatch):
    worker, connection = pair
    monkeypatch.setattr(pictures_module, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(process_module, "TOGETHER_SECONDS", 10)
    send(connection, 7, data_url(1))
    send(connection, 3, data_url(1)[:-120])
    send(connection, 5, data_url(2, (64, 40)))
    send(connection, 9, data_url(3))
    found = dict(worker.next_results())
    assert isinstance(found[3], UserError) and isinstance(found[5], LargePictureError)
    for number, seed in ((7, 1), (9, 3)):
        (expected,) = worker.model.encoder.encode_views([worker.model.processor.picture(data_of_url(data_url(seed)))])
        np.testing.assert_array_equal(found[number].features, expected.asnumpy())
        assert found[number].views == () and found[number].layout.size
    # decoded by a thread, then taken again
    send(connection, 5, data_url(2, (64, 40)), takes_large=True)
    results = []
    while not results:
        results = worker.next_results()
    assert results[0][0] == 5 and results[0][1].features is not None


def test_a_file_that_comes_in_pieces(pair):
    worker, connection = pair
    content = data_of_url(data_url(6))
    whole = FILE.pack(1, len(content), False, False) + content
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(worker.next_results)
        for at in range(0, len(whole), 700):
            connection.sendall(whole[at : at + 700])
            time.sleep(0.01)
        ((number, result),) = found.result(20)
    assert number == 1 and result.features is not None


def test_pictures_that_cannot_be_encoded_are_left_to_the_server(pair, monkeypatch):
    worker, connection = pair

    def fail(pictures):
        raise RuntimeError("no memory")

    monkeypatch.setattr(worker.model.encoder, "encode_views", fail)
    send(connection, 1, data_url(1))
    assert worker.next_results() == [(1, None)]


def test_features_do_not_depend_on_the_number_of_threads(pair):
    worker, _ = pair
    model, url = worker.model, data_url(4)
    found = []
    try:
        for count in (1, 2, 3):
            worker.use_threads(count)
            model.encoder.cache.clear()
            found.append(model.encoder.encode_views([model.processor.picture(data_of_url(url))])[0].asnumpy())
    finally:
        worker.use_threads(1)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_no_process_is_started_where_it_has_no_use_or_is_not_possible(without, monkeypatch, errors):
    model = without.scheduler.model
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    monkeypatch.setattr(process_module, "num_threads", lambda: 2)
    # this process has run graphs
    assert start_picture_process(model) is None and "started its threads too early" in errors[0]
    monkeypatch.setattr(model.engine, "is_exact", False)
    assert start_picture_process(model) is None


def test_a_number_that_may_belong_to_another_process_gets_no_signal(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])
    process = PictureProcess(child.pid, socket.socket())
    process.end()
    killed = []
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    process.end()
    assert process.has_ended and not killed


def test_a_process_that_cannot_be_started_is_left_out(without, monkeypatch, errors):
    def fail():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fail)
    monkeypatch.setattr(process_module, "num_threads", lambda: 2)
    monkeypatch.setattr(process_module, "has_mindspore_threads", lambda: False)
    assert start_picture_process(without.scheduler.model) is None
    assert "no picture process can be started" in errors[0]


def test_a_silent_process_is_ended(monkeypatch, errors):
    """Also if it does not read: the file is larger than the buffers of a connection."""
    monkeypatch.setattr(process_module, "SILENT_SECONDS", 0.2)
    child = subprocess.Popen(["sleep", "60"])
    ours, theirs = socket.socketpair()

    async def ask():
        process = PictureProcess(child.pid, ours)
        asked = (process.picture(bytes(2**size), takes_large=False, is_busy=False) for size in (22, 4))
        assert await asyncio.wait_for(asyncio.gather(*asked), 10) == [None, None]
        assert process.has_ended and has_ended(child.pid)
        assert await process.picture(b"", takes_large=False, is_busy=False) is None

    with ours, theirs:
        asyncio.run(ask())
    assert errors[0].startswith("the picture process is silent")
