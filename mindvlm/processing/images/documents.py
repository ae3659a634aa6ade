"""Pages of documents: PDFs, TIFF files of several pages, and pictures, which have one page.

Pages are rendered one at a time. Memory does not grow with the number of pages.
"""

import io
import math
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from PIL import Image

from mindvlm.core.errors import UserError, counted
from mindvlm.processing.images.loading import DEFAULT_MAX_PIXELS, ImageSource, decode, open_picture
from mindvlm.processing.images.sources import EncodedSource, encoded_picture, head_of

DEFAULT_QUERY = "Provide the ocr results of this image."
DEFAULT_DPI = 200
MIN_DPI, MAX_DPI = 10, 1200
MAX_PAGE_PIXELS = 40_000_000
"""A page of a PDF that would have more pixels is rendered smaller. A4 has fewer up to 640 dpi."""
MAX_PAGE_EDGE = 16_384

POINTS_PER_INCH = 72
# PDFium keeps every object that it has read until the document is closed
NUM_PAGES_UNTIL_REOPENED = 32
MAX_SHOWN = 20
"""Characters of a wrong page in a message."""
REDUCED_COPY, SUBFILE_TYPE = 1, 254
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# in a JPEG or HEIC, further pictures are previews or depth
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")

_PDFIUM = threading.RLock()  # PDFium supports one thread

PageRanges = list[tuple[int, int | None]]
"""First and last number of each range of pages, from 1; None for the last page of the document."""


class Document:
    """A picture as a document of one page. Base of the documents with several pages.

    Attributes:
        name: for messages.
        num_pages: number of pages.
        is_paged: whether the format has pages, so that one is named by its number.
    """

    is_paged = False

    def __init__(self, source: ImageSource, name: str, num_pages: int = 1):
        self.source, self.name, self.num_pages = source, name, num_pages

    def page(self, number: int) -> ImageSource:
        """Returns a page, counted from 1, as a picture. Raises UserError if it does not exist or is damaged."""
        if not 1 <= number <= self.num_pages:
            raise UserError(f"{self.name}: has {counted(self.num_pages, 'page')}, no page {number}; correct the pages")
        return self.read(number)

    def read(self, number: int) -> ImageSource:
        return self.source

    def selected(self, ranges: PageRanges | None, limit: int | None = None) -> list[int]:
        """Returns the numbers of the pages of ranges, in their order, each once, and at most the first `limit` of them.

        A range ends with the document. If it begins after the last page, its first number is returned, which `page`
        refuses.
        """
        ends = ((first, min(last or self.num_pages, self.num_pages)) for first, last in ranges or [(1, None)])
        numbers: dict[int, None] = {}
        for number in chain.from_iterable(range(first, max(first, last) + 1) for first, last in dict.fromkeys(ends)):
            numbers[number] = None
            if len(numbers) == limit:
                break
        return list(numbers)

    def close(self) -> None:
        """Closes the file."""

    def __enter__(self) -> "Document":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class TiffDocument(Document):
    """A TIFF file of several pages; reduced copies of pages, such as previews, are left out."""

    is_paged = True

    def __init__(self, file: bytes | Path, name: str, max_pixels: int):
        self.image, self.max_pixels = open_picture(file, name, max_pixels), max_pixels
        self.frames = list(self.page_frames()) or list(range(self.image.n_frames))
        super().__init__(self.image, name, len(self.frames))

    def page_frames(self) -> Iterator[int]:
        for frame in range(self.image.n_frames):
            self.image.seek(frame)
            kind = self.image.tag_v2.get(SUBFILE_TYPE)
            if not (isinstance(kind, int) and kind & REDUCED_COPY):
                yield frame

    def read(self, number: int) -> Image.Image:
        name = f"{self.name}, page {number}"
        try:
            self.image.seek(self.frames[number - 1])
        except Exception as error:  # Pillow may raise any exception for damaged files
            raise UserError(f"{name}: damaged ({error}); save the file again") from error
        return decode(self.image, name, self.max_pixels)

    def close(self) -> None:
        self.image.close()


class PdfDocument(Document):
    """A PDF, whose pages are rendered with PDFium."""

    is_paged = True

    def __init__(self, file: bytes | Path, name: str, max_pixels: int, dpi: int):
        self.file, self.dpi = file, dpi
        self.max_pixels = min(max_pixels, MAX_PAGE_PIXELS)
        self.num_rendered, self.name = 0, name
        self.open()
        super().__init__(file, name, len(self.document))

    def open(self) -> None:
        try:
            import pypdfium2
        except ImportError:
            raise UserError(f"{self.name}: a PDF, which needs pypdfium2; run: pip install pypdfium2") from None
        with _PDFIUM:
            try:
                self.document = pypdfium2.PdfDocument(self.file)
                if self.document.get_formtype():
                    self.document.init_forms()
            except pypdfium2.PdfiumError as error:
                if lacks_pages(self.file):
                    raise UserError(f"{self.name}: a PDF without pages; give one that has pages") from None
                raise UserError(f"{self.name}: {what_is_wrong(str(error))}") from None

    def read(self, number: int) -> Image.Image:
        from pypdfium2 import PdfiumError

        with _PDFIUM:
            if self.num_rendered == NUM_PAGES_UNTIL_REOPENED:
                self.close()
                self.open()
                self.num_rendered = 0
            self.num_rendered += 1
            try:
                page = self.document[number - 1]
                try:
                    bitmap = page.render(scale=self.scale(number, *page.get_size()))
                    picture = bitmap.to_pil().convert("RGB")
                    bitmap.close()
                finally:
                    page.close()
            except PdfiumError as error:
                raise UserError(f"{self.name}, page {number}: {what_is_wrong(str(error))}") from None
        return picture

    def scale(self, number: int, width: float, height: float) -> float:
        """Returns the pixels per point of a page, with a warning if they are fewer than asked for."""
        wanted, width, height = self.dpi / POINTS_PER_INCH, max(width, 1.0), max(height, 1.0)
        # edges are rounded up to whole pixels: (width * scale + 1) * (height * scale + 1) = max_pixels
        area, edges = width * height, width + height
        most = (math.sqrt(edges**2 + 4 * area * (self.max_pixels - 1)) - edges) / (2 * area)
        scale = min(wanted, most, MAX_PAGE_EDGE / max(width, height))
        if scale < wanted:
            warnings.warn(
                f"{self.name}, page {number}: {width:.0f} x {height:.0f} points, rendered with "
                f"{scale * POINTS_PER_INCH:.3g} dpi instead of {self.dpi} to bound its memory",
                stacklevel=2,
            )
        return scale

    def close(self) -> None:
        with _PDFIUM:
            self.document.close()


def open_document(source: EncodedSource, *, dpi: int = DEFAULT_DPI, max_pixels: int = DEFAULT_MAX_PIXELS) -> Document:
    """Opens a PDF, a TIFF file or a picture. Of an animation the first frame is the page, which a warning says.

    Args:
        source: a path, a `file://` or data URL, bytes, or a file open for reading bytes.
        dpi: resolution of the pages of a PDF; a page above `MAX_PAGE_PIXELS` is rendered smaller.
        max_pixels: limit of width x height of a picture.

    Raises:
        UserError: the document cannot be opened, a PDF is encrypted, or `dpi` is outside 10..1200. A picture that
            cannot be read raises it when it is loaded.
    """
    check_dpi(dpi)
    name, file = encoded_picture(source)
    name = name.removeprefix("image ")
    try:
        head = b"" if isinstance(file, Path) and not file.is_file() else head_of(file)
    except OSError:  # `load_image` reports it
        head = b""
    if b"%PDF-" in head:
        return PdfDocument(file, name, max_pixels, dpi)
    if head.startswith(TIFF_HEADS) and num_frames(file) > 1:
        return TiffDocument(file, name, max_pixels)
    if (frames := num_frames(file, ANIMATED)) > 1:
        warnings.warn(f"{name}: an animation of {frames} frames, of which the first is read", stacklevel=2)
    return Document(file if callable(getattr(source, "read", None)) else source, name)


def check_dpi(dpi: int) -> None:
    """Raises UserError if a resolution is outside 10..1200."""
    if not MIN_DPI <= dpi <= MAX_DPI:
        raise UserError(f"dpi is {dpi}; expected {MIN_DPI} to {MAX_DPI}")


def page_ranges(text: str) -> PageRanges:
    """Parses pages such as "1-3,7" or "5-", where a range without an end reaches the last page.

    Raises:
        UserError: the text is no list of ranges, or a range ends before it begins.
    """
    ranges: PageRanges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*0*([1-9]\d{0,8})\s*(-\s*(?:0*([1-9]\d{0,8}))?\s*)?", part)
        if not match:
            shown = f"{part.strip()[:MAX_SHOWN]}..." if len(part.strip()) > MAX_SHOWN else part.strip()
            raise UserError(f"pages: {shown!r} is no page; expected numbers from 1, such as 1-3,7")
        first, last = int(match[1]), int(match[3] or 0) or (None if match[2] else int(match[1]))
        if last is not None and last < first:
            raise UserError(f"pages: {first}-{last} ends before it begins; give {last}-{first}")
        ranges.append((first, last))
    return ranges


def as_ranges(pages: str | Iterable[int] | None) -> PageRanges | None:
    """Returns the ranges of a text, as `page_ranges`, or of numbers; None for all pages."""
    if pages is None or isinstance(pages, str):
        return None if pages is None else page_ranges(pages)
    return list(chain.from_iterable(page_ranges(str(number)) for number in pages))


def lacks_pages(file: bytes | Path) -> bool:
    """Whether PDFium opens a document that pypdfium2 refuses, which it does if there are no pages.

    The text of its error is then that of the last error of any document.
    """
    from pypdfium2 import raw

    if isinstance(file, bytes):
        document = raw.FPDF_LoadMemDocument64(file, len(file), None)
    else:
        document = raw.FPDF_LoadDocument(os.fsencode(file), None)
    if document:
        raw.FPDF_CloseDocument(document)
    return bool(document)


def what_is_wrong(message: str) -> str:
    """Returns the cause and the remedy of an error of PDFium."""
    if "password" in message.lower() or "security" in message.lower():
        return "an encrypted PDF; remove its password first, for example with qpdf --decrypt"
    return f"damaged, PDFium cannot read it ({message.rstrip('.')}); save it again, or print it to a new PDF"


def num_frames(file: bytes | Path, formats: tuple[str, ...] = ("TIFF",)) -> int:
    """Returns the number of frames of a picture in one of the formats; 1 for all others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats) as image:
                return getattr(image, "n_frames", 1)
        except Exception:  # `load_image` reports damaged files
            return 1
