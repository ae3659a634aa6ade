"""The file of a benchmark's answers: one JSON line each, appended as they come.

A line has the keys of the original programs, `question_id`, `model_id` and `metadata`, and those of the benchmark.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError, counted
from mindvlm.evaluation.benchmark import Answer, Questions

OWN_KEYS = ("question_id", "model_id", "metadata")


@dataclass(frozen=True)
class AnswersFile:
    """The answers to a benchmark.

    Attributes:
        path: of the file.
        benchmark: its name.
        model_id: of the model that answers; None accepts answers of any one model.
        questions: of the benchmark.
    """

    path: Path
    benchmark: str
    model_id: str | None
    questions: Questions

    def read(self) -> tuple[dict[str, Answer], str]:
        """Returns the complete answers by question id, and a note about a line that a killed run left unfinished.

        Raises:
            UserError: the file cannot be read, a line is damaged or repeats a question, or the answers are those of
                another benchmark, model, data or settings.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); give a file of answers") from None
        *lines, rest = content.split(b"\n")
        known, answers, models = set(self.questions.ids), {}, set()
        for number, line in enumerate(lines, 1):
            where = f"{self.path}: line {number}"
            try:
                answer = json.loads(line)
                question_id, metadata = answer["question_id"], answer.get("metadata", {})
                is_known = question_id in known
                models.add(str(answer.get("model_id", "")))
                recorded = {"benchmark": metadata.get("benchmark"), **metadata.get("settings", {})}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{where} is no answer with a question_id; remove the line") from None
            self._check(recorded, models, where)
            if not is_known:
                raise UserError(
                    f"{where} answers {question_id!r}, which is no question of --data; give the data and options of "
                    "these answers"
                )
            if question_id in answers:
                raise UserError(f"{where} answers {question_id!r} again; remove one of the two lines")
            answers[question_id] = {key: value for key, value in answer.items() if key not in OWN_KEYS}
        note = f"{self.path}: the last line is not finished and is left out" if rest.strip() else ""
        return answers, note

    def _check(self, recorded: dict[str, Any], models: set[str], where: str) -> None:
        """Raises UserError if an answer is not one to these questions by this model."""
        expected = {"benchmark": self.benchmark, **self.questions.settings}
        wrong = next((key for key in expected if recorded.get(key) not in (None, expected[key])), None)
        if wrong:
            raise UserError(
                f"{where} was made with {wrong} {recorded[wrong]!r}, not {expected[wrong]!r}; choose another --output, "
                "or the same options"
            )
        if self.model_id is None and len(models) > 1:
            raise UserError(f"{where}: answers of {' and '.join(sorted(models))}; give those of one model")
        if self.model_id is not None and models != {self.model_id}:
            raise UserError(f"{where} is of the model {models.pop()!r}, not {self.model_id!r}; choose another --output")

    def cut_unfinished_line(self) -> None:
        """Removes the last line if it has no end, so that answers can be appended."""
        with open(self.path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def append(self, answers: dict[str, Answer]) -> None:
        """Adds answers, which are on disk when this returns. Raises UserError if they cannot be written."""
        metadata = {"benchmark": self.benchmark, "settings": self.questions.settings}
        lines = [
            json.dumps({"question_id": key, "model_id": self.model_id, **answer, "metadata": metadata}) + "\n"
            for key, answer in answers.items()
        ]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room, and the same command resumes"
            ) from None


def missing_note(answers: dict[str, Answer], ids: list[str]) -> str:
    """Returns a line about questions without an answer; empty if there are none."""
    missing = [question_id for question_id in ids if question_id not in answers]
    if not missing:
        return ""
    return f"{counted(len(missing), 'question')} of {len(ids)} have no answer and are not scored, first {missing[0]!r}"
