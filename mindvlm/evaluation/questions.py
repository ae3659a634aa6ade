"""Benchmarks of questions that a model answers with text, each declared by one `QuestionBenchmark`."""

import argparse
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError, counted
from mindvlm.evaluation.benchmark import OWN_KEYS, Answer, Answered, Benchmark, Scores, missing_note
from mindvlm.evaluation.bootstrap import Rows, Weighted, confidence_intervals
from mindvlm.evaluation.data_folder import DataFolder
from mindvlm.evaluation.judge import Stage, add_judge_options, judged

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

# of an answer that is missing, as in the original program of ScienceQA
UNKNOWN_PROMPT = "Unknown"
NO_REPLY = "a judge has given no usable reply; to ask again, remove its lines from judge_replies.jsonl"
# keys of ids and texts in the files of the original programs
ID_KEYS = ("question_id", "id", "questionId", "pid", "sample_index")
TEXT_KEYS = ("text", "response", "prediction", "model_answer", "answer")


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        id: unique in the benchmark.
        prompt: the text in the file of answers; the model sees it with the suffix of the benchmark.
        images: paths or data URLs of its pictures.
        truth: what the scorer compares an answer with.
        group: of the tables.
        written: further keys of the line of answers; `question_id` replaces the id there.
    """

    id: str
    prompt: str
    images: tuple[Path | str, ...] = ()
    truth: Any = None
    group: str = ""
    written: dict[str, Any] = field(default_factory=dict)


Submit = Callable[[DataFolder, Path, Sequence[Question], Mapping[str, Answer]], list[Path]]


def id_of(row: Mapping[str, Any]) -> str:
    """Returns the id of a line of answers. Raises KeyError if there is none."""
    value = next((row[key] for key in ID_KEYS if key in row), None)
    if not isinstance(value, str | int):
        raise KeyError(ID_KEYS[0])
    return str(value)


def answered(questions: Sequence[Question], answers: Mapping[str, Answer]) -> Iterator[tuple[Question, str]]:
    """Yields each question that has an answer, with the text of it."""
    return ((one, answers[one.id]["text"]) for one in questions if one.id in answers)


@dataclass(frozen=True)
class QuestionBenchmark:
    """The declaration of a benchmark.

    Attributes:
        summary: what it measures, in one line.
        needs: path below `--data` of each annotation file -> where it comes from; `{split}` stands for the split.
        read: returns the questions; called with (files, options).
        pictures: folders of pictures -> where they come from, as in `needs`; answers are scored without them.
        suffix: of every prompt.
        max_new_tokens: of an answer.
        post: changes the text of a model before it is written.
        splits: choices of `--split`, the default first.
        key: returns the id of the question that a line of answers belongs to.
        answered_twice: whether the original program writes every answer twice.
        missing: the text in place of an answer that is missing; None leaves the question out of the figures.
        verdict: scores the answer to a question; None as its result leaves the question out, with a note.
        compat: returns the replacement of `verdict` with `--compat`, which repeats an error of the original program.
        unscored: returns why a verdict is None, in a few words.
        remark: returns a line about a figure that cannot be computed on this machine; empty without one.
        served: splits without public answers, which only a server scores.
        compat_note: what `--compat` repeats, in one line.
        tabulate: computes the rows of figures of scored questions.
        unit: what is drawn at random for confidence intervals.
        kind: what the figures depend on besides the verdict, see `confidence_intervals`.
        headline: row and metric that papers report.
        submit: writes files for a server or an original program; called with (files, folder, questions, answers by
            id). Returns their paths.
        judge: stages of requests to a judge, whose replies `verdict` finds in the answer's `replies`.
        add_options: adds further options of the benchmark.
        settings: names of those options on which answers depend.
    """

    summary: str
    needs: Mapping[str, str]
    read: Callable[[DataFolder, argparse.Namespace], list[Question]]
    pictures: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ""
    max_new_tokens: int = 128
    post: Callable[[str], str] = str
    splits: tuple[str, ...] = ()
    key: Callable[[Mapping[str, Any]], str] = id_of
    answered_twice: bool = False
    missing: str | None = None
    verdict: Callable[[Question, Answer], Any] | None = None
    compat: Callable[[], Callable[[Question, Answer], Any]] | None = None
    unscored: Callable[[], str] = lambda: NO_REPLY
    remark: Callable[[], str] = str
    served: tuple[str, ...] = ()
    compat_note: str = ""
    tabulate: Callable[[Sequence[Weighted]], Rows] | None = None
    unit: Callable[[Question], Hashable] = lambda question: question.id
    kind: Callable[[Question], Hashable] = lambda question: question.id
    headline: tuple[str, str] = ("", "")
    submit: Submit | None = None
    judge: tuple[Stage, ...] = ()
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    settings: tuple[str, ...] = ()

    def benchmark(self, name: str) -> Benchmark:
        """Returns the entry of the list of benchmarks."""
        origins: dict[str, list[str]] = {}
        for path, origin in {**self.needs, **self.pictures}.items():
            origins.setdefault(origin, []).append(path)
        files = "; ".join(f"{', '.join(paths)} from {origin}" for origin, paths in origins.items())
        return Benchmark(
            self.summary, files, "text", partial(TextQuestions, name, self), self.add_all_options, self.headline
        )

    def add_all_options(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options of the command line."""
        if self.splits:
            parser.add_argument("--split", choices=self.splits, default=self.splits[0], help="(default %(default)s)")
        parser.add_argument(
            "--max_new_tokens", type=int, default=self.max_new_tokens, help="of an answer (default %(default)s)"
        )
        note = self.compat_note.replace("%", "%%") or "nothing else in this benchmark"
        parser.add_argument(
            "--compat",
            action="store_true",
            help="repeat errors of the original programs: a later answer replaces an earlier one, damaged lines and "
            f"unknown questions are left out; {note}",
        )
        if self.judge:
            add_judge_options(parser)
        if self.add_options:
            self.add_options(parser)


class TextQuestions:
    """The questions of a declared benchmark.

    Raises:
        UserError: files are missing or of another version, there are no questions, or two have one id.
    """

    def __init__(self, name: str, entry: QuestionBenchmark, data: Path, options: argparse.Namespace):
        self.name, self.entry, self.options = name, entry, options
        if options.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens is {options.max_new_tokens}; expected at least 1")
        split = options.split if entry.splits else ""
        needs = entry.needs if options.score else {**entry.needs, **entry.pictures}
        self.files = files = DataFolder(data, {path.format(split=split): origin for path, origin in needs.items()})
        with files.reading():
            questions = entry.read(files, options)
        if not questions:
            raise UserError(f"{data}: {files.last_read} holds no questions of {name}; get it again")
        self.questions = {question.id: question for question in questions}
        if len(self.questions) < len(questions):
            ids = [question.id for question in questions]
            double = next(key for number, key in enumerate(ids) if key in ids[:number])
            raise UserError(f"{data}: {files.last_read} holds the question {double!r} twice; get the file again")
        self.ids, self.answered_twice = list(self.questions), entry.answered_twice
        self.settings = {"split": split} if split else {}
        # answers made elsewhere may have any length
        names = entry.settings if options.score else ("max_new_tokens", *entry.settings)
        self.settings |= {key: getattr(options, key) for key in names}
        self.is_served = split in entry.served

    def answers(self, model: Any, ids: Sequence[str], folder: Path) -> Iterator[Answered]:
        """Yields one answer at a time, in the order in which they end. See `Questions.answers`."""
        questions = [self.questions[key] for key in ids]
        asked = ((question.prompt + self.entry.suffix, question.images) for question in questions)
        # greedy, so that a resumed run gives the same answers
        options = {"do_sample": False, "max_new_tokens": self.options.max_new_tokens}
        for number, result in model.generate_each(asked, len(questions), **options):
            question = questions[number]
            if isinstance(result, UserError):
                yield Answered(errors={question.id: str(result)})
            else:
                text = self.entry.post(str(result))
                row = {"question_id": question.id, **question.written, "prompt": question.prompt, "text": text}
                yield Answered({question.id: {**row, "answer_id": uuid.uuid4().hex[:22]}})

    def parse(self, row: dict[str, Any]) -> tuple[str, Answer]:
        """See `Questions.parse`."""
        text = next((row[key] for key in TEXT_KEYS if key in row), None)
        if not isinstance(text, str):
            raise TypeError(f"the text is {text!r}")
        return self.entry.key(row), {**{key: row[key] for key in row if key not in OWN_KEYS[1:]}, "text": text}

    def score(self, answers: Mapping[str, Answer], folder: Path, output: Path) -> Scores:
        """See `Questions.score`."""
        entry, scores = self.entry, Scores({})
        questions, given = list(self.questions.values()), dict(answers)
        fates = ("is left out", "are left out") if entry.missing is None else ("counts as wrong", "count as wrong")
        if note := missing_note(answers, self.ids, *fates):
            scores.notes.append(note)
        if entry.missing is not None:
            given |= {key: {"text": entry.missing, "prompt": UNKNOWN_PROMPT} for key in self.ids if key not in answers}
        answered = [question for question in questions if question.id in given]
        others = [
            one.id for one in answered if given[one.id].get("prompt", one.prompt) not in (one.prompt, UNKNOWN_PROMPT)
        ]
        if others:
            scores.notes.append(
                f"{counted(len(others), 'answer')} of {len(answered)} were given to other prompts than those of "
                f"{self.name}, first {others[0]!r}; check that they are answers to this benchmark"
            )
        if entry.judge:
            given, judge_notes = judged(entry.judge, [(one, given[one.id]) for one in answered], output, self.options)
            scores.notes += judge_notes
        if entry.submit:
            with self.files.reading():
                scores.files += entry.submit(self.files, output, questions, given)
        if entry.verdict and entry.tabulate and not self.is_served:
            verdict = entry.compat() if self.options.compat and entry.compat else entry.verdict
            scored = [(question, verdict(question, given[question.id]), 1) for question in answered]
            usable = [item for item in scored if item[1] is not None]
            if len(usable) < len(scored):
                unscored = counted(len(scored) - len(usable), "answer")
                verb = "has" if len(scored) - len(usable) == 1 else "have"
                is_waiting = any(len(given[one.id]["replies"]) < len(entry.judge) for one in answered if entry.judge)
                reason = "a judge has not replied to every request" if is_waiting else entry.unscored()
                scores.notes.append(f"{unscored} of {len(scored)} {verb} no score: {reason}")
            if usable:
                scores.tables = {self.name: entry.tabulate(usable)}
                found = confidence_intervals(entry.tabulate, usable, entry.unit, entry.kind)
                scores.intervals = {self.name: found}
                scores.remarks += [line for line in [entry.remark()] if line]
        elif scores.files:
            names = ", ".join(path.name for path in scores.files)
            scores.remarks.append(
                f"{self.name} has no public answers here; submit {names} to its server for the figures"
            )
        return scores


def mean_rows(metric: str, scored: Sequence[Weighted], groups: Callable[[Question], Sequence[str]]) -> Rows:
    """Returns the mean verdict in percent of all questions, in the row "all", and of each group."""
    sums: dict[str, list[float]] = {}
    for question, verdict, count in scored:
        for group in ("all", *groups(question)):
            entry = sums.setdefault(group, [0, 0.0])
            entry[0] += count
            entry[1] += count * verdict
    return {group: {"questions": count, metric: 100 * total / count} for group, (count, total) in sums.items()}


def mean_of(metric: str, *, groups: bool = False) -> Callable[[Sequence[Weighted]], Rows]:
    """Returns a `tabulate` of the mean verdict in percent over all questions and, with `groups`, over each group."""
    return lambda scored: mean_rows(metric, scored, lambda question: [question.group] if groups else [])
