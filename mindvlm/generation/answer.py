"""What generation gives back."""

from collections.abc import Callable, Iterator


class Answer(str):
    """The text of an answer without blanks around it, which also says how it came about.

    Attributes:
        generated: the text with them.
        ids: generated ids, the stop token included.
        num_prompt_tokens: length of the prompt, image placeholders included.
        stop_reason: 'stop_token', 'stop_string', 'max_new_tokens', 'context_full' or 'interrupted'.
        seconds: time per stage: 'compile', 'vision', 'prefill', 'decode'.
        history: the conversation including this turn, to pass as `history` of the next `chat`.
    """

    generated: str
    ids: list[int]
    num_prompt_tokens: int
    stop_reason: str
    seconds: dict[str, float]
    history: list[tuple[str, str]]

    @classmethod
    def of(cls, text: str, **details) -> "Answer":
        """An answer with its attributes set."""
        answer = cls(text)
        vars(answer).update(details)
        return answer

    @property
    def num_new_tokens(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed. The first token comes with the prefill and is not counted."""
        seconds = self.seconds["decode"]
        return (len(self.ids) - 1) / seconds if seconds > 0 and len(self.ids) > 1 else 0.0


class AnswerStream:
    """Iterates over the pieces of an answer as they come; `answer` is the whole once the loop has ended.

    Leaving the loop early (Ctrl-C, or `close`) ends the answer with what there is.
    """

    def __init__(self, pieces: Iterator[str], finish: Callable[[], Answer]):
        self.pieces = pieces
        self.finish = finish
        self.finished: Answer | None = None

    def __iter__(self) -> "AnswerStream":
        return self

    def __next__(self) -> str:
        if self.finished is not None:
            raise StopIteration
        try:
            return next(self.pieces)
        except BaseException:
            self.close()
            raise

    @property
    def answer(self) -> Answer:
        """The whole answer; reads the rest of the stream if it has not ended."""
        for _ in self:
            pass
        return self.close()

    def close(self) -> Answer:
        """Ends the answer here."""
        if self.finished is None:
            self.finished = self.finish()
        return self.finished
