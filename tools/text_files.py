"""The texts of `mindvlm-predict --output_dir`: a file for each document, written after its last page."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.core.errors import UserError
from mindvlm.tools import cli
from mindvlm.tools.answer_log import GO_ON
from mindvlm.tools.pages import Page
from mindvlm.tools.sources import Source

FORMATS = ("txt", "md")
FORM_FEED = "\f"


class TextFiles:
    """The files below a folder, each named after its document: `scan.pdf` becomes `scan.txt`.

    Documents that differ only in their endings keep them: `scan.pdf.txt` and `scan.png.txt`. A document without an
    answered page gets no file.

    Args:
        text_format: "txt", with form feeds between pages, or "md", with comments before them.
        pages: of all documents, in their order.

    Raises:
        UserError: two files would have one name, or the folder cannot be created.
    """

    def __init__(self, folder: Path, text_format: str, pages: Sequence[Page]):
        self.text_format = text_format
        self.texts: dict[Source, dict[Page, str | None]] = {}
        self.answered: set[Source] = set()
        for page in pages:
            self.texts.setdefault(page.source, {})[page] = None
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

    def add(self, page: Page, text: str | None, error: str | None = None) -> None:
        """Takes the text of a page, or its error; writes the document after its last page.

        Raises:
            UserError: the file cannot be written.
        """
        texts = self.texts.get(page.source)
        if texts is None:  # written; the document was given twice
            return
        texts[page] = f"[{error}]" if text is None else text
        if text is not None:
            self.answered.add(page.source)
        if None in texts.values():
            return
        path, content = self.paths[page.source], self.content(texts).encode(errors="replace")
        del self.texts[page.source]
        if page.source not in self.answered:
            cli.say(f"{path}: not written, because no page of {page.source.name} was answered")
            return
        if path.is_file() and path.read_bytes() == content:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); {GO_ON}") from None
        with atomic_file(path, GO_ON) as file:
            file.write(content)

    def content(self, texts: dict[Page, str | None]) -> str:
        if self.text_format == "txt":
            return FORM_FEED.join(f"{text}\n" for text in texts.values())
        marked = ((f"<!-- page {page.number} -->\n\n" if page.number else "", text) for page, text in texts.items())
        return "\n".join(f"{mark}{text}\n" for mark, text in marked)
