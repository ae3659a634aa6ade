"""Sources of pictures: paths, local URLs, bytes, open files. Errors name everything else."""

import base64
import io
import tracemalloc
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images.loading import load_image
from mindvlm.processing.images.sources import data_of_url, local_path

RED = np.full((2, 3, 3), (200, 30, 30), np.uint8)


def closed_file() -> io.BytesIO:
    stream = io.BytesIO(b"x")
    stream.close()
    return stream


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A picture in the home folder, whose name needs quotes in a URL."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(RED).save(tmp_path / "a page #1.png")
    return tmp_path / "a page #1.png"


def test_everything_local_is_read(path):
    raw = path.read_bytes()
    text = base64.b64encode(raw).decode()
    written = io.BytesIO()
    written.write(raw)
    sources = [
        *("~/a page #1.png", Path("~/a page #1.png")),
        *(path.as_uri(), path.as_uri().upper()[:5] + path.as_uri()[5:], f"file://localhost{quote(str(path))}"),
        f"data:image/png;base64,{text}",
        *(f"data:;base64,{text}", f"DATA:image/png;charset=x;BASE64,{text}"),
        f"data:image/png;base64,{text[:20]}\n {text[20:]}",
        f"data:image/png;base64,{quote(text)}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(raw).decode().rstrip('=')}",
        f"data:image/png,{quote(raw)}",
        *(raw, bytearray(raw), memoryview(raw), io.BytesIO(raw), written, open(path, "rb"), RED, Image.fromarray(RED)),
    ]
    for source in sources:
        assert (np.asarray(load_image(source)) == RED).all(), source


@pytest.mark.parametrize("text", ["", "a", "%", "%4", "%41", "%4%41%", "%%41", "%zz%e4%C3%A4ä%25%2541", "a+b %0a"])
def test_percent_escapes(text):
    assert data_of_url(f"data:,{text}") == unquote_to_bytes(text)


@pytest.mark.parametrize("header, text", [("data:,", "%41"), ("data:,", "%"), ("data:;base64,", "QUJD QUJD\n")])
def test_the_memory_of_a_data_url(header, text):
    size = 2**20
    url = header + text * (size // len(text))
    tracemalloc.start()
    try:
        data_of_url(url)
        assert tracemalloc.get_traced_memory()[1] < 12 * size
    finally:
        tracemalloc.stop()


def test_relative_names_belong_to_the_folder(path, tmp_path):
    assert (np.asarray(load_image(path.name, folder=str(tmp_path))) == RED).all()
    assert (np.asarray(load_image(str(path), folder="/nowhere")) == RED).all()
    with pytest.raises(UserError, match="image /nowhere/x.png: no such file"):
        load_image("x.png", folder="/nowhere")


def test_a_file_with_the_name_of_a_url_is_a_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data:x,y.png", "~x.png", "http:x.png"):
        path.with_name(name).write_bytes(path.read_bytes())
        assert local_path(name) == name and (np.asarray(load_image(name)) == RED).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/a.png", "image https://example.com/a.png: a URL; download the picture first"),
        (Path("https://example.com/a.png"), "a URL; download the picture first"),
        ("s3://bucket/a.png", "a URL; download the picture first"),
        ("FTP://host/a.png", "a URL; download the picture first"),
        ("file://other/a.png", "a URL; download the picture first"),
        ("file://[a.png", "a URL; download the picture first"),
        ("file:///absent.png", "image /absent.png: no such file"),
        ("http://host:80\r\nX:y", r"image http://host:80\r\nX:y: a URL; download the picture first"),
        ("/none/\x1b[1m\u2028ä.png", r"image /none/\x1b[1m\u2028ä.png: no such file"),
        ("data:image/png;base64,A", "image data:image/png;base64,A...: its base64 is damaged"),
        ("data:image/png;base64,!!!!", "its base64 is damaged"),
        ("data:image/png;base64,", "the file is empty"),
        ("data:text/plain,hello", "not an image"),
        ("iVBORw0KGgo" * 1000, "a picture as base64 is given as data:image/png;base64,"),
        (io.BytesIO(b""), "the file is empty"),
        (io.StringIO("text"), "opened as text; open it in mode 'rb'"),
        (closed_file(), "cannot be read (I/O operation on closed file.); open it again in mode 'rb'"),
        (7, "is not a picture"),
        ({"url": "x"}, "is not a picture"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_a_remedy(source, message):
    with pytest.raises(UserError) as caught:
        load_image(source)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC picture"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        (b"\0\0\0\x18ftypmp42", "a video"),
        (b"%PDF-1.7\n", "a PDF; render"),
        (b'<?xml version="1.0"?>\n<svg xmlns=', "an SVG"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PK\x03\x04", "an archive"),
        (b"hello", "not an image, or in a format that Pillow cannot read; convert"),
    ],
)
def test_a_file_that_is_no_picture_is_named_as_what_it_is(head, what, tmp_path):
    path = tmp_path / "page.jpg"
    path.write_bytes(head + bytes(100))
    for source in (path, path.read_bytes()):
        with pytest.raises(UserError, match=what):
            load_image(source)
