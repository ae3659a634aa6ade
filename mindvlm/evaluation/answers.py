"""Files of a benchmark's answers: one JSON line each, appended as they come.

A line has the keys of the original programs, `question_id`, `model_id` and `metadata`, and those of the benchmark.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError, counted
from mindvlm.evaluation.benchmark import Answer, Questions

ANSWERS_FILE = "answers.jsonl"
# of share `i` of `k`, as the original programs name them
SHARE_FILES = "[0-9]*_[0-9]*.jsonl"


@dataclass
class AnswerFiles:
    """The answers to a benchmark in one or several files, which together hold one answer to a question.

    Args:
        benchmark: its name.
        model_id: of the model that answers; None accepts answers of any one model.
        questions: of the benchmark.
        lenient: of two answers the later one counts, and damaged lines and unknown questions are left out, as in the
            original programs.

    Attributes:
        answers: those that were read, by question id.
        notes: what was left out, one line each.
    """

    benchmark: str
    model_id: str | None
    questions: Questions
    lenient: bool = False
    answers: dict[str, Answer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.known, self.models, self.num_skipped = set(self.questions.ids), set(), 0

    def read(self, path: Path) -> None:
        """Adds the answers of a file. A line that a killed run left unfinished is left out, with a note.

        Raises:
            UserError: the file cannot be read, a line is damaged or answers a question again, or the answers are those
                of another benchmark, model, data or settings.
        """
        skipped = self.num_skipped
        for where, row in self._rows(path):
            try:
                question_id, answer = self.questions.parse(row)
                metadata = row.get("metadata") or {}
                is_known = question_id in self.known
                recorded = {"benchmark": metadata.get("benchmark"), **metadata.get("settings", {})}
            except (ValueError, KeyError, TypeError, AttributeError):
                self._refuse(f"{where} is no answer with a question_id; remove the line")
                continue
            if "model_id" in row:
                self.models.add(str(row["model_id"]))
            self._check(recorded, where)
            if not is_known:
                self._refuse(
                    f"{where} answers {question_id!r}, which is no question of --data; give the data and options of "
                    "these answers"
                )
            elif question_id in self.answers and not self._may_repeat(question_id, answer):
                raise UserError(f"{where} answers {question_id!r} again; remove one of the two lines")
            else:
                self.answers[question_id] = answer
        if self.num_skipped > skipped:
            lines = counted(self.num_skipped - skipped, "line")
            self.notes.append(f"{path}: {lines} are no answers to these questions and are left out")

    def _rows(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yields place and JSON value of each line, or of each entry of a list."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of answers") from None
        if rows := document_rows(content):
            if len(rows) == len(self.questions.ids) and all(row.keys() == {"answer", "annotation"} for row in rows):
                # SliME's answers to ChartQA: in the order of the questions
                rows = [{"question_id": key, **row} for key, row in zip(self.questions.ids, rows, strict=True)]
            yield from ((f"{path}: entry {number}", row) for number, row in enumerate(rows, 1))
            return
        *lines, rest = content.split(b"\n")
        if is_finished(rest):
            lines.append(rest)
        elif rest.strip():
            self.notes.append(f"{path}: the last line is not finished and is left out")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}: line {number}", json.loads(line)
            except (ValueError, RecursionError):
                self._refuse(f"{path}: line {number} is no answer with a question_id; remove the line")

    def _may_repeat(self, question_id: str, answer: Answer) -> bool:
        return self.lenient or (self.questions.answered_twice and same(self.answers[question_id], answer))

    def _refuse(self, message: str) -> None:
        if not self.lenient:
            raise UserError(message)
        self.num_skipped += 1

    def _check(self, recorded: dict[str, Any], where: str) -> None:
        """Raises UserError if an answer is not one to these questions by this model."""
        expected = {"benchmark": self.benchmark, **self.questions.settings}
        wrong = next((key for key in expected if recorded.get(key) not in (None, expected[key])), None)
        if wrong:
            raise UserError(
                f"{where} was made with {wrong} {recorded[wrong]!r}, not {expected[wrong]!r}; choose another --output, "
                "or the same options"
            )
        models = sorted(self.models)
        if self.model_id is None and len(models) > 1:
            raise UserError(f"{where}: answers of {' and '.join(models)}; give those of one model")
        other = next((model for model in models if model != self.model_id), None)
        if self.model_id is not None and other is not None:
            raise UserError(f"{where} is of the model {other!r}, not {self.model_id!r}; choose another --output")

    def append(self, path: Path, answers: Mapping[str, Answer]) -> None:
        """Adds answers to a file; they are on disk when this returns. Raises UserError if they cannot be written."""
        lines = "".join(self._line(key, answer) for key, answer in answers.items())
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); make room, and the same command resumes"
            ) from None

    def merge(self, folder: Path) -> None:
        """Writes all answers to one file, in the order of the questions, in place of the shares of a folder."""
        with atomic_file(folder / ANSWERS_FILE) as file:
            for key in self.questions.ids:
                if key in self.answers:
                    file.write(self._line(key, self.answers[key]).encode())
        for path in share_files(folder):
            path.unlink()

    def _line(self, question_id: str, answer: Answer) -> str:
        metadata = {"benchmark": self.benchmark, "settings": self.questions.settings}
        row = {"question_id": question_id, **answer, "model_id": self.model_id, "metadata": metadata}
        return json.dumps(row, ensure_ascii=False) + "\n"


def document_rows(content: bytes) -> list[dict[str, Any]]:
    """Returns the entries of a file that is one JSON list, or one mapping from ids to texts; none for other files."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return []
    if isinstance(value, dict) and len(value) and all(isinstance(text, str) for text in value.values()):
        is_line = value.keys() & {"question_id", "prompt", "text"}
        return [] if is_line else [{"question_id": key, "text": text} for key, text in value.items()]
    return value if isinstance(value, list) and all(isinstance(row, dict) for row in value) else []


def is_finished(line: bytes) -> bool:
    """Whether a line without a newline at its end is complete."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def same(first: Answer, second: Answer) -> bool:
    """Whether two answers differ only in their random ids."""
    return {**first, "answer_id": None} == {**second, "answer_id": None}


def share_files(folder: Path) -> list[Path]:
    """Returns the files of the shares in a folder, in the order of their names."""
    return sorted(folder.glob(SHARE_FILES))


def end_last_line(path: Path) -> None:
    """Ends the last line, so that answers can be appended; removes it if it is not finished."""
    with open(path, "r+b") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if is_finished(content[start:]):
            file.write(b"\n")
        elif content[start:]:
            file.truncate(start)


def share(ids: Sequence[str], number: int, num_shares: int) -> Sequence[str]:
    """Returns the ids of a share: contiguous, each of the rounded-up size as long as there are some."""
    size = -(-len(ids) // num_shares)
    return ids[number * size : (number + 1) * size]
