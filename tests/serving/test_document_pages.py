"""The request `/v1/documents/pages`: pages as pictures, limits, and documents that cannot be read."""

import asyncio
import io
import threading
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from mindvlm.processing.images.documents import Document, open_document
from mindvlm.serving import documents
from mindvlm.serving.budget import ByteBudget, Share
from mindvlm.serving.page import EXAMPLES
from mindvlm.serving.settings import ServerSettings
from tests.serving.running import running, shown, wait_for
from tests.tiny_vary import picture

SCAN = EXAMPLES / "scan.pdf"


def url_of(content: bytes, kind: str = "application/pdf") -> str:
    return f"data:{kind};base64," + b64encode(content).decode()


def tiff(*pages: Image.Image) -> bytes:
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    return file.getvalue()


def pixels(page: dict) -> np.ndarray:
    image = Image.open(io.BytesIO(b64decode(page["url"].partition(",")[2])))
    assert image.size == (page["width"], page["height"])
    return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("model"), max_pictures=3, max_pixels=1_500_000) as started:
        yield started


def pages_of(server, content: bytes, **fields) -> dict:
    answer = server.post("documents/pages", {"url": url_of(content), **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_pages_are_those_that_the_library_reads(server):
    found = pages_of(server, SCAN.read_bytes())
    assert found["object"] == "list" and found["num_pages"] == 2
    with open_document(SCAN) as document:
        for number, page in enumerate(found["data"], 1):
            assert (page["object"], page["number"]) == ("page", number)
            assert (pixels(page) == np.asarray(document.page(number))).all()


def test_pages_and_resolution_are_chosen(server):
    (page,) = pages_of(server, SCAN.read_bytes(), pages="2", dpi=36)["data"]
    assert page["number"] == 2 and page["width"] == 149


def test_pages_of_a_tiff_and_a_picture(server):
    found = pages_of(server, tiff(*(picture(seed) for seed in range(5))), pages="2-")
    assert found["num_pages"] == 5
    # as many as the pictures of a request
    assert [page["number"] for page in found["data"]] == [2, 3, 4]
    assert (pixels(found["data"][0]) == np.asarray(picture(1))).all()
    file = io.BytesIO()
    picture(6).save(file, "PNG")
    (page,) = pages_of(server, file.getvalue())["data"]
    assert (pixels(page) == np.asarray(picture(6))).all()


def test_a_page_that_cannot_be_read_costs_only_itself(server):
    large = Image.new("RGB", (2000, 1000))
    first, second, third = pages_of(server, tiff(picture(0), large, picture(1)))["data"]
    assert "url" in first and "url" in third
    assert "2000 x 1000 = 2000000 pixels, the limit is 1500000" in second["error"] and "url" not in second
    (page,) = pages_of(server, b"P5 20000 20000 255\n")["data"]
    assert page["error"] == "the image: 400000000 pixels, the limit is 1500000; make it smaller"
    (page,) = pages_of(server, SCAN.read_bytes(), pages="9")["data"]
    assert page["error"] == "the document: has 2 pages, no page 9; correct the pages"


def test_a_page_above_the_limit_of_pixels_is_rendered_smaller(server):
    (page,) = pages_of(server, SCAN.read_bytes(), pages="1", dpi=1200)["data"]
    assert 1_400_000 < page["width"] * page["height"] <= 1_500_000


def test_pages_end_at_the_limit_of_bytes(tmp_path):
    with running(tmp_path, max_body_bytes=100_000) as server:
        noise = [Image.effect_noise((200, 200), 90).convert("RGB") for _ in range(4)]
        found = pages_of(server, tiff(*(picture(seed) for seed in range(4))))
        assert len(found["data"]) == 4
        large = tiff(*[one.resize((60, 60)) for one in noise])
        counts = []
        while sum(counts) < 4:
            counts.append(len(pages_of(server, large, pages=f"{sum(counts) + 1}-")["data"]))
        assert sum(counts) == 4


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "url", "missing; give the document as a data URL"),
        ({"url": 3}, "url", "3; expected text"),
        ({"url": url_of(b"%PDF-1.4 broken")}, "url", "damaged, PDFium cannot read it"),
        ({"url": url_of(b"text")}, "url", "not an image"),
        ({"url": url_of(b"")}, "url", "the file is empty"),
        ({"url": url_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}, "url", "not an image"),
        ({"url": "/etc/passwd"}, "url", "is no URL of a picture"),
        ({"url": "file:///etc/passwd"}, "url", "reads no files"),
        ({"url": "http://127.0.0.1/a.pdf"}, "url", "fetches no pictures"),
        ({"url": url_of(b"x"), "pages": "3-1"}, "pages", "ends before it begins"),
        ({"url": url_of(b"x"), "pages": "0"}, "pages", "pages: '0' is no page; expected numbers from 1"),
        ({"url": url_of(b"x"), "pages": 1}, "pages", "1; expected text"),
        ({"url": url_of(b"x"), "pages": "1," * 900}, "pages", "at most 1000 characters"),
        ({"url": url_of(b"x"), "dpi": 5000}, "dpi", "5000; expected a number from 10 to 1200"),
        ([], "the request", "expected an object"),
    ],
)
def test_what_is_refused(server, body, param, said):
    answer = server.post("documents/pages", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"]


def test_limits_and_keys_of_other_requests_apply(tmp_path):
    with running(tmp_path, api_keys=("secret",), max_body_bytes=20_000, wait=False) as server:
        assert server.post("documents/pages", {}).status_code == 401
        server.headers = {"Authorization": "Bearer secret"}
        assert server.post("documents/pages", {"url": url_of(bytes(30_000))}).status_code == 413
        assert httpx.get(f"{server.root}/").status_code == 200


def test_documents_hold_up_no_chats(server, monkeypatch):
    opening, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(
        documents,
        "open_document",
        lambda *args, **options: opening.set() or ended.wait(20) and Document(picture(1), ""),
    )
    with ThreadPoolExecutor(41) as pool:
        asked = [pool.submit(pages_of, server, SCAN.read_bytes()) for _ in range(40)]
        try:
            assert opening.wait(20)
            answer = pool.submit(server.chat, messages=shown(1))
            assert answer.result(10).status_code == 200
        finally:
            ended.set()
        assert all(len(one.result(20)["data"]) == 1 for one in asked)


@pytest.mark.parametrize("stage", ["open", "render"])
def test_a_document_is_closed_after_its_client_has_left(monkeypatch, stage):
    steps, ended = [], threading.Event()

    class Slow(Document):
        def read(self, number):
            return waited("render", picture(1))

        def close(self):
            steps.append("close")

    def waited(name, result):
        steps.append(name)
        if name == stage:
            ended.wait(20)
            steps.append("ended")
        return result

    async def leave(renderer):
        with Share(ByteBudget(10**9)) as share:
            body = {"url": url_of(SCAN.read_bytes())}
            asked = asyncio.create_task(documents.page_pictures(body, ServerSettings(), renderer, renderer, share))
            await asyncio.to_thread(wait_for, lambda: stage in steps)
            asked.cancel()
            await asyncio.wait([asked])
            ended.set()

    monkeypatch.setattr(documents, "open_document", lambda *args, **options: waited("open", Slow(None, "")))
    with ThreadPoolExecutor(1) as renderer:
        asyncio.run(leave(renderer))
    assert steps[-2:] == ["ended", "close"]
