"""Locates the records of an annotation file in one pass, with only a window of the file in memory."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mindvlm.core.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 64 << 20
LINE_ENDINGS = (".jsonl", ".ndjson")

# a syntax error this far before the end of the window is not due to a record that the window cuts
_SURELY_WRONG = 64 << 10
_BLANK = re.compile(r"[ \t\r\n]*")
_UTF8_BOM = b"\xef\xbb\xbf"


class RecordPlace(NamedTuple):
    """The bytes of one record in its file, and the line (from 1) of its start."""

    start: int
    length: int
    line: int


def find_records(path: Path) -> Iterator[RecordPlace]:
    """Yields the records of a JSON list (each is parsed once) or of a file of JSON lines (only the first is parsed).

    A file is read as lines if its name ends in .jsonl or .ndjson, or it begins with an object; otherwise it must be a
    list.

    Raises:
        UserError: the file cannot be read, is neither, or has a syntax error; the message has the line.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
            if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}: is UTF-16; save the file as UTF-8")
            offset = len(_UTF8_BOM) if start.startswith(_UTF8_BOM) else 0
            file.seek(offset)
            if path.suffix.lower() in LINE_ENDINGS or start[offset:].lstrip().startswith(b"{"):
                yield from _lines(file, path, offset)
            else:
                yield from _ListScanner(file, path, offset).records()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _lines(file: BinaryIO, path: Path, offset: int) -> Iterator[RecordPlace]:
    is_first = True
    for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b""), start=1):
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(f"{path}, line {number}: longer than {MAX_RECORD_BYTES >> 20} MiB; give one record a line")
        if content := line.rstrip():
            if is_first:
                _check_first_line(content, path, number)
            is_first = False
            yield RecordPlace(offset, len(content), number)
        offset += len(line)


def _check_first_line(content: bytes, path: Path, number: int) -> None:
    try:
        json.loads(content)
    except ValueError:
        raise UserError(
            f"{path}, line {number}: not JSON by itself; write one record a line, or all of them as one list [...]"
        ) from None


class _ListScanner:
    """A window of decoded text that moves over the file; the next token is at or after `position`."""

    def __init__(self, file: BinaryIO, path: Path, offset: int):
        self.file, self.path, self.offset = file, path, offset
        self.decode_utf8 = codecs.getincrementaldecoder("utf-8")().decode
        self.parse = json.JSONDecoder().raw_decode
        self.text, self.position, self.line, self.at_end = "", 0, 1, False

    def records(self) -> Iterator[RecordPlace]:
        if self.next_character() != "[":
            raise self.error("expected a list of records [{...}, ...]")
        self.advance(self.position + 1)
        following = self.next_character()
        while following != "]":
            line, start = self.line, self.offset
            yield RecordPlace(start, self.advance(self.end_of_record()), line)
            following = self.next_character()
            if following == ",":
                self.advance(self.position + 1)
                self.next_character()
            elif following != "]":
                raise self.error("expected ',' or ']' after a record")
        self.advance(self.position + 1)
        if self.next_character():
            raise self.error("more text after the end of the list")

    def next_character(self) -> str:
        """Returns the next character that is not blank, "" at the end of the file."""
        while True:
            self.advance(_BLANK.match(self.text, self.position).end())
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self.read_more(CHUNK_BYTES)

    def end_of_record(self) -> int:
        while True:
            try:
                if self.text[self.position : self.position + 1] not in ("{", "["):
                    raise self.error("expected a record {...}")
                return self.parse(self.text, self.position)[1]
            except json.JSONDecodeError as error:
                window = len(self.text) - self.position
                is_cut = error.pos > len(self.text) - _SURELY_WRONG or error.msg.startswith("Unterminated string")
                if self.at_end or not is_cut or window > MAX_RECORD_BYTES:
                    line = self.line + self.text.count("\n", self.position, error.pos)
                    raise UserError(f"{self.path}, line {line}: not JSON ({error.msg}); correct the file") from None
                self.read_more(max(CHUNK_BYTES, window))
            except RecursionError:
                raise self.error("brackets nested too deeply") from None

    def advance(self, end: int) -> int:
        """Moves to `end` and returns the number of bytes passed."""
        passed = self.text[self.position : end]
        num_bytes = len(passed) if passed.isascii() else len(passed.encode())
        self.line += passed.count("\n")
        self.offset += num_bytes
        self.position = end
        return num_bytes

    def read_more(self, num_bytes: int) -> None:
        self.text, self.position = self.text[self.position :], 0
        chunk = self.file.read(num_bytes)
        self.at_end = len(chunk) < num_bytes
        try:
            self.text += self.decode_utf8(chunk, self.at_end)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise UserError(f"{self.path}, line {line}: not UTF-8; save the file as UTF-8") from None

    def error(self, problem: str) -> UserError:
        found = self.text[self.position : self.position + 20]
        return UserError(f"{self.path}, line {self.line}: {problem}, found {found!r}; correct the file")
