"""The texts of `mindvlm-predict --output_dir`: a file for each document, written after its last page."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.core.errors import UserError
from mindvlm.tools import cli
from mindvlm.tools.answer_log import GO_ON, Record, places_of
from mindvlm.tools.pages import Page
from mindvlm.tools.sources import Source

FORM_FEED = "\f"
# a time in 2242, in seconds; file systems hold it
LATEST = 2**33


class TextFiles:
    """The files below a folder, each named after its document: `scan.pdf` becomes `scan.txt`.

    Documents that differ only in their endings keep them: `scan.pdf.txt` and `scan.png.txt`. A text holds all answered
    pages of its document, also those of earlier runs, in the order of their numbers. A document without an answered
    page gets no file. A file's time of change is set to that of its last answer. A file with another time was corrected
    by hand, and stays as it is until a page is answered. The clock of the file system does not matter.

    Args:
        text_format: "txt", with form feeds between pages, or "md", with comments before them.
        pages: those that are asked about, of all documents.

    Raises:
        UserError: two files would have one name, or the folder cannot be created.
    """

    def __init__(self, folder: Path, text_format: str, pages: Sequence[Page]):
        self.text_format = text_format
        self.waiting: dict[Source, set[Page]] = {}
        for page in pages:
            self.waiting.setdefault(page.source, set()).add(page)
        self.texts: dict[Source, dict[int | None, str]] = {source: {} for source in self.waiting}
        self.answered: set[Source] = set()
        self.newly_answered: set[Source] = set()
        self.times: dict[Source, set[int]] = {source: set() for source in self.waiting}
        without_ending = Counter(source.text_name.with_suffix("") for source in self.texts)
        self.paths: dict[Source, Path] = {}
        for source in self.texts:
            name = source.text_name
            stem = name if without_ending[name.with_suffix("")] > 1 else name.with_suffix("")
            self.paths[source] = folder / stem.with_name(f"{stem.name}.{text_format}")
        twice = next((path for path, count in Counter(self.paths.values()).items() if count > 1), None)
        if twice:
            raise UserError(f"two documents would be written to {twice}; read them one after the other")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {folder}: cannot be created ({error.strerror}); choose another") from None
        check_writable(folder / "x")

    def start(self, records: Iterable[Record]) -> None:
        """Takes the answers of earlier runs about these documents; writes those that are complete and not on disk.

        Raises:
            UserError: a file cannot be written.
        """
        sources: dict[str, list[Source]] = {}
        for source in self.waiting:
            sources.setdefault(source.place, []).append(source)
        for record in filter(is_about_one_page, records):
            for source in sources.get(places_of(record), ()):
                page = Page(source, record.get("page"))
                self.texts[source][page.number] = record["text"]
                self.answered.add(source)
                self.times[source] |= times_of(record)
                self.waiting[source].discard(page)
        for source, pages in self.waiting.items():
            if not pages:
                self.end(source)

    def add(self, page: Page, record: Record) -> None:
        """Takes the record of a page, an answer or an error; writes the document after its last page.

        Raises:
            UserError: the file cannot be written.
        """
        waiting = self.waiting[page.source]
        if page not in waiting:  # the document was given twice
            return
        waiting.remove(page)
        if "text" in record:
            self.texts[page.source][page.number] = record["text"]
            self.answered.add(page.source)
            self.newly_answered.add(page.source)
            self.times[page.source] |= times_of(record)
        else:
            self.texts[page.source][page.number] = f"[{record['error']}]"
        if not waiting:
            self.end(page.source)

    def end(self, source: Source) -> None:
        """Writes a document of which no page waits, unless its file holds all answers or was corrected."""
        path = self.paths[source]
        if source not in self.answered:
            cli.say(f"{path}: not written, because no page of {source.name} was answered")
        elif source in self.newly_answered or not path.exists() or self.is_behind(source):
            self.write(path, self.content(self.texts[source]).encode(errors="replace"))
            if self.times[source]:
                # a file with another time counts as corrected
                with suppress(OSError):
                    os.utime(path, ns=(max(self.times[source]),) * 2)

    def is_behind(self, source: Source) -> bool:
        """Whether the file is as it was written and lacks answers, which a run that was killed has left."""
        times = self.times[source]
        return self.paths[source].stat().st_mtime_ns in times - {max(times, default=0)}

    def write(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); {GO_ON}") from None
        with atomic_file(path, GO_ON) as file:
            file.write(content)

    def content(self, texts: dict[int | None, str]) -> str:
        pages = sorted(texts.items(), key=lambda page: page[0] or 0)
        if self.text_format == "txt":
            return FORM_FEED.join(f"{text}\n" for _, text in pages)
        marked = ((f"<!-- page {number} -->\n\n" if number else "", text) for number, text in pages)
        return "\n".join(f"{mark}{text}\n" for mark, text in marked)


def is_about_one_page(record: Record) -> bool:
    """Whether a record is about a page of a document; one about several pages together is not."""
    return isinstance(record["image"], str) and isinstance(record.get("page"), int | None)


def times_of(record: Record) -> set[int]:
    """Returns the `time` of a record in nanoseconds, in a set; an empty set if it is missing or no time."""
    time = record.get("time")
    return {round(time * 1000) * 10**6} if isinstance(time, int | float) and 0 < time < LATEST else set()
