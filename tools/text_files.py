"""The texts of `mindvlm-predict --output_dir`: a file for each document, written after its last page."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.core.errors import UserError
from mindvlm.tools import cli
from mindvlm.tools.answer_log import GO_ON, Record, places_of
from mindvlm.tools.pages import Page
from mindvlm.tools.sources import Source

FORM_FEED = "\f"


class TextFiles:
    """The files below a folder, each named after its document: `scan.pdf` becomes `scan.txt`.

    Documents that differ only in their endings keep them: `scan.pdf.txt` and `scan.png.txt`. A text holds all answered
    pages of its document, also those of earlier runs, in the order of their numbers. A document without an answered
    page gets no file, and a file that is newer than all answers about its document stays as it is.

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
        self.last_answers: dict[Source, float] = defaultdict(float)
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
        sources = defaultdict(list)
        for source in self.waiting:
            sources[source.place].append(source)
        for record in records:
            for source in sources.get(places_of(record), ()):
                page = Page(source, record.get("page"))
                self.texts[source][page.number] = record["text"]
                self.answered.add(source)
                # a run that was killed may have left answers that its file lacks
                self.last_answers[source] = max(self.last_answers[source], record.get("time", 0))
                self.waiting[source].discard(page)
        for source, pages in self.waiting.items():
            if not pages:
                self.end(source)

    def add(self, page: Page, text: str | None, error: str | None = None) -> None:
        """Takes the text of a page, or its error; writes the document after its last page.

        Raises:
            UserError: the file cannot be written.
        """
        waiting = self.waiting[page.source]
        if page not in waiting:  # the document was given twice
            return
        waiting.remove(page)
        self.texts[page.source][page.number] = f"[{error}]" if text is None else text
        if text is not None:
            self.answered.add(page.source)
            self.newly_answered.add(page.source)
        if not waiting:
            self.end(page.source)

    def end(self, source: Source) -> None:
        """Writes a document of which no page waits, unless its file holds all answers."""
        path = self.paths[source]
        if source not in self.answered:
            cli.say(f"{path}: not written, because no page of {source.name} was answered")
        elif source in self.newly_answered or not path.exists() or path.stat().st_mtime < self.last_answers[source]:
            self.write(path, self.content(self.texts[source]).encode(errors="replace"))

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
