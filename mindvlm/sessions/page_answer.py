"""Answers about the pages of a document."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mindvlm.core.errors import UserError
from mindvlm.generation.answer import Answer
from mindvlm.processing.images.documents import Document


@dataclass(frozen=True)
class PageAnswer:
    """The answer about one page.

    Attributes:
        number: number of the page, from 1.
        text: the `Answer`, or an empty text if there is an error.
        stop_reason: that of the answer, or 'error'.
        error: the reason why the page could not be read or answered; None otherwise.
    """

    number: int
    text: Answer | str
    stop_reason: str
    error: UserError | None = None

    @classmethod
    def of(cls, number: int, result: Answer | UserError) -> "PageAnswer":
        """Returns the answer with a result of `generate_each`."""
        if isinstance(result, UserError):
            return cls(number, "", "error", result)
        return cls(number, result, result.stop_reason)


def in_order(
    numbers: Sequence[int], results: Iterable[tuple[int, Answer | UserError]], document: Document
) -> Iterator[PageAnswer]:
    """Yields results, which carry their index in `numbers`, in the order of `numbers`; closes the document."""
    waiting, index = {}, 0
    with document:
        for found, result in results:
            waiting[found] = result
            while index in waiting:
                yield PageAnswer.of(numbers[index], waiting.pop(index))
                index += 1
