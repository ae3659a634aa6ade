"""Sources of pictures: paths, URLs of local data, bytes and open files."""

import base64
import binascii
import os
import re
import string
from pathlib import Path
from typing import BinaryIO
from urllib.request import url2pathname

import numpy as np

from mindvlm.core.errors import UserError

EncodedSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO

IMAGE_ENDINGS = {
    *(".bmp", ".dib", ".gif", ".ico", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".apng", ".psd", ".tga"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp", ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    *(".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl"),  # an error for each that Pillow does not read
}
"""Endings of the names of pictures in a folder."""

_LOCAL_URL = re.compile(r"file:(?://(?:localhost)?)?(/(?!/)[^?#]*)", re.IGNORECASE)
_REMOTE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://?[^/]")
_HEX_VALUES = np.array([int(chr(code), 16) if chr(code) in string.hexdigits else 0 for code in range(256)], np.uint8)
_IS_HEX = np.isin(np.arange(256), list(string.hexdigits.encode()))
_MAX_SHOWN = 1024
_TO_PNG = "convert it to PNG or JPEG"
_HEIF = rb".{4}ftyp(hei|hev|mif1|msf1)"
_NO_PICTURES = (
    (_HEIF, f"a HEIC picture that cannot be read; run: pip install pillow-heif, or {_TO_PNG}"),
    (rb".{4}ftypavi[fs]", f"an AVIF picture; install Pillow 11.3 or newer, or {_TO_PNG}"),
    (rb".{4}JXL |\xff\x0a", f"a JPEG XL picture, which Pillow does not read; {_TO_PNG}"),
    (rb".{4}(ftyp|moov|mdat)", "a video; give single frames as PNG or JPEG"),
    (rb"%PDF", "a PDF; render its pages to PNG, or read it with read_document"),
    (rb"\s*(<\?xml.*)?<svg", "an SVG drawing; render it to PNG"),
    (rb"\s*<(!doctype html|html)", "an HTML page, such as a failed download leaves; download the picture again"),
    (rb"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` in its repository"),
    (rb"PK\x03\x04|\x1f\x8b|Rar!", "an archive; unpack it"),
)
"""Beginning of a file that Pillow does not read -> what it is, and the remedy."""


def encoded_picture(source: EncodedSource, folder: str = "") -> tuple[str, bytes | Path]:
    """Returns the name of a source for messages, and the file: its path or its content.

    Args:
        source: a path, a `file://` or data URL, the bytes of a file, or a file open for reading bytes.
        folder: folder of relative paths.

    Raises:
        UserError: the source is a URL of another machine, an invalid data URL, a text stream, or no picture.
    """
    if callable(getattr(source, "read", None)):
        path = getattr(source, "name", None)
        return f"image {short_name(path)}" if isinstance(path, str) else "the image", _content(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return "the image", bytes(source)
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise UserError(
            f"the image: a value of type {kind} is not a picture; give a path, bytes, a PIL image or an array"
        )
    text = os.fsdecode(source)
    path = local_path(text, folder)
    if path is None:
        return f"image {short_name(text)}", data_of_url(text)
    return f"image {short_name(path)}", Path(path)


def local_path(source: str, folder: str = "") -> str | None:
    """Returns the path that a text names, None for a data URL.

    `file://` URLs and `~` become paths, unless a file has this name.

    Raises:
        UserError: the text is a URL of another machine.
    """
    path = os.path.join(folder, source)
    scheme = source.partition(":")[0].lower()
    if os.path.lexists(path):
        return path
    if scheme == "data" and "," in source:
        return None
    location = _LOCAL_URL.match(source)
    if location:
        return url2pathname(location[1])
    if _REMOTE_URL.match(source):
        raise UserError(f"image {short_name(source)}: a URL; download the picture first and give the file")
    return os.path.join(folder, os.path.expanduser(source))


def short_name(source: str) -> str:
    """Returns a path or URL for messages, in one line, cut if it contains the picture."""
    is_short = len(source) <= _MAX_SHOWN and not source.lower().startswith("data:")
    return printable(source if is_short else f"{source[:40]}...")


def printable(text: str) -> str:
    """Returns a text with escapes for the characters that cannot be printed, such as ends of lines."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def what_it_is(file: bytes | Path) -> str:
    """Returns what a file that Pillow cannot identify is, with the remedy; the file must exist."""
    head = head_of(file)
    for pattern, description in _NO_PICTURES:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return description
    return f"not an image, or in a format that Pillow cannot read; {_TO_PNG}"


def is_heif(file: bytes | Path) -> bool:
    """Whether a file is a HEIC picture, by its first bytes."""
    return bool(re.match(_HEIF, head_of(file), re.DOTALL))


def head_of(file: bytes | Path) -> bytes:
    """Returns the first 1024 bytes of a file."""
    if isinstance(file, bytes):
        return file[:1024]
    with open(file, "rb") as stream:
        return stream.read(1024)


def _content(stream: BinaryIO) -> bytes:
    try:
        if stream.seekable():
            stream.seek(0)
        content = stream.read()
    except (OSError, ValueError, AttributeError) as error:  # closed, or open for writing
        raise UserError(f"the image: the file cannot be read ({error}); open it again in mode 'rb'") from None
    if not isinstance(content, bytes):
        raise UserError("the image: a file opened as text; open it in mode 'rb'")
    return content


def data_of_url(url: str) -> bytes:
    """Returns the content of a data URL. Raises UserError if its base64 is damaged."""
    header, _, data = url.partition(",")
    content = without_escapes(data.encode(errors="replace"))
    if not header.lower().endswith(";base64"):
        return content
    compact = content.translate(bytes.maketrans(b"-_", b"+/"), string.whitespace.encode()).rstrip(b"=")
    try:
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise UserError(f"image {short_name(url)}: its base64 is damaged ({error}); encode the picture again") from None


def without_escapes(text: bytes) -> bytes:
    """Returns a text with the bytes that its escapes, such as %41, stand for.

    `urllib.parse.unquote_to_bytes` does the same with an object for each escape, 100 times the memory.
    """
    if b"%" not in text:
        return text
    codes = np.frombuffer(text + b"  ", np.uint8)
    is_escape = (codes[:-2] == ord("%")) & _IS_HEX[codes[1:-1]] & _IS_HEX[codes[2:]]
    decoded = np.where(is_escape, 16 * _HEX_VALUES[codes[1:-1]] + _HEX_VALUES[codes[2:]], codes[:-2])
    is_digit = np.zeros(len(text) + 2, bool)
    is_digit[1:-1] |= is_escape
    is_digit[2:] |= is_escape
    return decoded[~is_digit[:-2]].tobytes()
