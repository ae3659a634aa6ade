"""The pages that `mindvlm-predict` asks about, and the order of their questions."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.processing.images.documents import Document, PageRanges, check_dpi, open_document
from mindvlm.processing.images.loading import ImageSource
from mindvlm.processing.images.sources import short_name
from mindvlm.tools.answer_log import key_of
from mindvlm.tools.sources import Source


@dataclass(frozen=True)
class Page:
    """A page of a document; `number` is None for a picture, or for a document that cannot be opened."""

    source: Source
    number: int | None = None


@dataclass(frozen=True)
class Question:
    """The pages of one question: usually one, none for text alone.

    Attributes:
        is_joint: whether the question is about all pages together.
    """

    pages: tuple[Page, ...]
    is_joint: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """What a JSON line says about the pages."""
        numbers = [page.number for page in self.pages]
        image = self.of_pages([page.source.name for page in self.pages])
        return {"image": image, **({"page": self.of_pages(numbers)} if any(numbers) else {})}

    @property
    def key(self) -> str:
        """What identifies the pages, see `key_of`."""
        return key_of(self.places, self.record.get("page"))

    @property
    def places(self) -> str | list[str] | None:
        """The places of the documents, see `place_of`; None without pages."""
        return self.of_pages([page.source.place for page in self.pages])

    def of_pages(self, values: list) -> Any:
        """Returns the values of all pages, or that of the only page if the question is not joint."""
        return values if self.is_joint else next(iter(values), None)

    @property
    def name(self) -> str:
        """The pages for messages."""
        if self.is_joint or not self.pages:
            return str(self.record["image"])
        (page,) = self.pages
        return short_name(page.source.name) + (f", page {page.number}" if page.number else "")


def find_pages(sources: Sequence[Source], ranges: PageRanges | None, dpi: int) -> list[Page]:
    """Returns the selected pages of all documents. Raises UserError if `dpi` is invalid."""
    check_dpi(dpi)
    return [page for source in sources for page in pages_of(source, ranges, dpi)]


def pages_of(source: Source, ranges: PageRanges | None, dpi: int) -> list[Page]:
    # reading the page says the same again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_document(source.file, dpi=dpi) as document:
                numbers = document.selected(ranges)
                return [Page(source, None if number == 1 and not document.is_paged else number) for number in numbers]
        except UserError:
            return [Page(source)]


class PageReader:
    """Reads pages, with one document open at a time."""

    def __init__(self, dpi: int, max_pixels: int):
        self.dpi, self.max_pixels = dpi, max_pixels
        self.source: Source | None = None
        self.document: Document | None = None

    def read(self, question: Question) -> ImageSource | list[ImageSource] | None:
        """Returns the pictures of a question. Raises UserError if one cannot be read."""
        pictures = [self.page(page) for page in question.pages]
        return pictures if question.is_joint else next(iter(pictures), None)

    def page(self, page: Page) -> ImageSource:
        if page.source != self.source:
            self.close()
            self.document = open_document(page.source.file, dpi=self.dpi, max_pixels=self.max_pixels)
            self.source = page.source
        return self.document.page(page.number or 1)

    def close(self) -> None:
        if self.document:
            self.document.close()
        self.source = self.document = None
