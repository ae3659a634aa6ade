"""The answers of one batch while they grow."""

from collections.abc import Iterator

from mindvlm.generation.answer import Answer
from mindvlm.generation.engine import Engine
from mindvlm.generation.generate import Row
from mindvlm.generation.stopping import RowStop


class Answers:
    """What has come of each row so far.

    Attributes:
        steps: runs the generation, one token a row each time.
        rows: the rows as of the last step.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: list[list[int]],
        stops: list[RowStop],
        steps: Iterator[list[Row]],
        turns: list[list[tuple[str, str]]],
    ):
        self.engine = engine
        self.prompts = prompts
        self.stops = stops
        self.turns = turns
        self.rows = [Row() for _ in prompts]
        self.steps = self.follow(steps)

    def follow(self, steps: Iterator[list[Row]]) -> Iterator[list[Row]]:
        for self.rows in steps:
            yield self.rows

    def pieces(self, row: int) -> Iterator[str]:
        """Text of one row as it becomes complete."""
        for rows in self.steps:
            if rows[row].stop_reason:
                self.stops[row].end()
            piece = self.stops[row].take()
            if piece:
                yield piece

    def answer(self, row: int) -> Answer:
        """The answer of one row, as far as it came."""
        self.stops[row].end()
        text = self.stops[row].answer
        *earlier, (query, _) = self.turns[row]
        return Answer.of(
            text,
            generated=self.stops[row].text,
            ids=list(self.rows[row].ids),
            num_prompt_tokens=len(self.prompts[row]),
            stop_reason=self.rows[row].stop_reason or "interrupted",
            seconds=dict(self.engine.seconds),
            history=[*earlier, (query, text)],
        )
