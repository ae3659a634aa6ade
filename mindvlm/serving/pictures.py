"""The files of pictures that a request names, within the limits and permissions of the server, and their decoding."""

import asyncio
import io
import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor
from urllib.parse import unquote, urlsplit

from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.chat_processor import ChatProcessor
from mindvlm.processing.images.downloads import download
from mindvlm.processing.images.loading import add_heif_opener
from mindvlm.processing.images.picture import Picture
from mindvlm.processing.images.sources import data_of_url, head_of, short_name, what_it_is
from mindvlm.serving.budget import Share
from mindvlm.serving.errors import bad_field
from mindvlm.serving.messages import PictureUrl
from mindvlm.serving.settings import ServerSettings

# Pillow hands other formats, such as EPS, to programs outside.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF", "HEIF")

A_PDF = "a PDF, not a picture; POST /v1/documents/pages turns its pages into pictures"

LARGE_PIXELS = 4_000_000
"""A picture with more pixels takes some tenths of a second to decode and resize."""

MAX_SMALL_URL = 2**16
"""Characters of base64 that are decoded in 0.1 ms, about the time in which a thread takes a task."""


class LargePictureError(Exception):
    """A picture has more than `LARGE_PIXELS`."""


async def read_files(
    urls: Sequence[PictureUrl], settings: ServerSettings, fetchers: Executor, share: Share
) -> list[bytes]:
    """Returns the content of each picture.

    Args:
        fetchers: threads for pictures of other machines, which may be slow.
        share: holds the bytes of the pictures.

    Raises:
        ApiError: there are too many pictures, they are too large, or one is not allowed or cannot be read.
    """
    if len(urls) > settings.max_pictures:
        raise bad_field("messages", f"{len(urls)} pictures; the limit of this server is {settings.max_pictures}")
    loop, contents = asyncio.get_running_loop(), []
    for url in urls:
        if is_small(url):
            contents.append(read_picture_file(url, settings))
        else:
            pool = fetchers if scheme_of(url) in ("http", "https") else None
            contents.append(await loop.run_in_executor(pool, read_picture_file, url, settings))
        await share.take(len(contents[-1]))
        if sum(map(len, contents)) > settings.max_body_bytes:
            raise bad_field(
                url.param, f"the pictures have more than {settings.max_body_bytes} bytes; give smaller ones"
            )
    return contents


def is_small(picture: PictureUrl) -> bool:
    """Whether a picture is decoded in about the time in which a thread takes a task: a short data URL in base64."""
    if len(picture.url) > MAX_SMALL_URL:
        return False
    header = picture.url.partition(",")[0].strip().lower()
    return header.startswith("data:") and header.endswith(";base64")


def scheme_of(picture: PictureUrl) -> str:
    return picture.url.partition(":")[0].strip().lower()


def read_picture_file(picture: PictureUrl, settings: ServerSettings) -> bytes:
    """Returns the content of a data, `file://` or http(s) URL. Raises ApiError."""
    scheme = scheme_of(picture)
    try:
        if scheme == "data":
            return data_of_url(picture.url.strip())
        if scheme == "file":
            return read_media(picture.url, settings)
        if scheme in ("http", "https"):
            return fetched(picture.url, settings)
    except UserError as error:
        raise bad_field(picture.param, str(error)) from None
    name = short_name(picture.url)
    raise bad_field(picture.param, f"'{name}' is no URL of a picture; give a data URL, data:image/png;base64,...")


def fetched(url: str, settings: ServerSettings) -> bytes:
    """Returns the content of a URL of another machine. Raises UserError, see `download`."""
    if not settings.picture_hosts:
        raise UserError(f"{short_name(url)}: this server fetches no pictures; give a data URL")
    file, max_bytes = io.BytesIO(), settings.max_picture_bytes
    download(url, file, hosts=settings.picture_hosts, max_bytes=max_bytes, seconds=settings.fetch_seconds)
    return file.getvalue()


def read_media(url: str, settings: ServerSettings) -> bytes:
    """Returns the content of a file below `media_path`.

    Raises:
        UserError: there is no such folder, the file lies elsewhere (links are resolved), or it cannot be read.
    """
    if settings.media_path is None:
        raise UserError(f"{short_name(url)}: this server reads no files; give a data URL")
    parts = urlsplit(url)
    root = os.path.realpath(settings.media_path)
    refused = UserError(f"{short_name(url)}: no readable file below the folder that this server may read")
    try:
        path = os.path.realpath(unquote(parts.path, errors="strict"))
        if parts.netloc not in ("", "localhost") or os.path.commonpath((root, path)) != root:
            raise refused
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise refused
            content = file.read(settings.max_picture_bytes) if status.st_size <= settings.max_picture_bytes else None
    except (OSError, ValueError):
        raise refused from None
    if content is None:
        raise UserError(f"{short_name(url)}: {status.st_size} bytes; the limit is {settings.max_picture_bytes}")
    return content


def open_at_once(path: str, flags: int) -> int:
    """Opens a file that is no link, without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def check_format(content: bytes) -> int:
    """Returns the number of pixels of a picture. Raises UserError if the file is damaged or in a format that the server
    does not open."""
    Image.init()
    add_heif_opener(content)
    formats = [name for name in FORMATS if name in Image.OPEN]
    if not content:
        raise UserError("the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=formats) as image:
                return image.width * image.height
    except Image.UnidentifiedImageError:
        is_pdf = b"%PDF-" in head_of(content)
        raise UserError(A_PDF if is_pdf else what_it_is(content)) from None
    except Image.DecompressionBombError:
        # it has more, which `load_image` reports
        return 2 * Image.MAX_IMAGE_PIXELS
    except Exception as error:  # Pillow may raise any exception for damaged files
        raise UserError(f"cannot be read ({' '.join(str(error).split())})") from None


def decode_picture(processor: ChatProcessor, content: bytes, *, takes_large: bool) -> Picture:
    """Decodes the content of a file and cuts it into views.

    Args:
        takes_large: whether pictures of more than `LARGE_PIXELS` are decoded.

    Raises:
        UserError: the picture cannot be read or has too many pixels.
        LargePictureError: it is large, and `takes_large` is False.
    """
    if check_format(content) > LARGE_PIXELS and not takes_large:
        raise LargePictureError
    return processor.picture(content)
