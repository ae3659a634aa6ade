"""Text answers, whole or streamed, and the rules that end them."""

from collections.abc import Callable, Collection, Sequence

from mindvlm.core.errors import UserError
from mindvlm.generation.engine import Engine
from mindvlm.generation.repetition import RepeatedTail
from mindvlm.generation.request import Slot
from mindvlm.processing.text.text_decoders import TextDecoder

Turns = list[tuple[str, str]]


class Answer(str):
    """The text of an answer without surrounding white space, with details of its generation.

    Attributes:
        generated: the text with surrounding white space.
        ids: generated ids, including the stop token.
        num_prompt_tokens: length of the prompt, including image placeholders.
        stop_reason: 'stop_token', 'stop_string', 'repetition', 'max_new_tokens', 'context_full', 'error' or
            'interrupted'.
        seconds: time per stage: 'compile', 'vision', 'prefill', 'decode'.
        history: the conversation including this turn; pass it as `history` to the next `chat`.
    """

    generated: str
    ids: list[int]
    num_prompt_tokens: int
    stop_reason: str
    seconds: dict[str, float]
    history: Turns

    @classmethod
    def of(cls, text: str, **details) -> "Answer":
        """Returns an answer with its attributes set."""
        answer = cls(text)
        vars(answer).update(details)
        return answer

    @property
    def num_new_tokens(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed. The first token is part of the prefill and not counted."""
        seconds = self.seconds["decode"]
        return (len(self.ids) - 1) / seconds if seconds > 0 and len(self.ids) > 1 else 0.0


class AnswerText:
    """The growing text of one answer, which ends at a stop id, a stop string or in a loop.

    Text that may be the beginning of a stop string is held back. White space around an answer is removed, as in the
    original programs; the template adds its own.

    Args:
        stop_ids: ids that end the answer and are not part of its text.
        stop_strings: texts that end the answer and are not part of it.
        decoder: converts ids to text.
        max_repeated_tokens: see `GenerationConfig`.

    Attributes:
        text: the text so far, including surrounding white space.
    """

    def __init__(
        self,
        stop_ids: Collection[int],
        stop_strings: Sequence[str],
        decoder: TextDecoder,
        *,
        max_repeated_tokens: int = 0,
    ):
        self.tail = RepeatedTail(max_repeated_tokens) if max_repeated_tokens else None
        self.stop_ids = frozenset(stop_ids)
        self.stop_strings = [text for text in stop_strings if text]
        self.decoder = decoder
        self.text = ""
        self.num_taken = 0
        self.ended = False

    def reason_after(self, token: int) -> str | None:
        """Takes the next generated id; returns the stop reason if it ends the answer, else None."""
        if token in self.stop_ids:
            self.end()
            return "stop_token"
        if self.is_stopped_by(self.decoder.push(token)):
            return "stop_string"
        if self.tail and self.tail.is_loop_with(token):
            self.end()
            return "repetition"
        return None

    def is_stopped_by(self, added: str) -> bool:
        """Appends text, up to the first stop string if there is one; returns whether there is."""
        self.text += added
        starts = [start for start in (self.text.find(text) for text in self.stop_strings) if start >= 0]
        if starts:
            self.text, self.ended = self.text[: min(starts)], True
        return bool(starts)

    def end(self) -> None:
        """Completes the text after the last id."""
        if not self.ended:
            self.is_stopped_by(self.decoder.flush())
            self.ended = True

    @property
    def answer(self) -> str:
        """The text without surrounding white space."""
        return self.text.strip()

    def take(self) -> str:
        """Returns the part of `answer` that became final since the last call."""
        safe = self.text if self.ended else self.text[: len(self.text) - self.held_back()]
        # trailing white space is held back until text follows
        shown = safe.strip()
        piece = shown[self.num_taken :]
        self.num_taken = max(self.num_taken, len(shown))
        return piece

    @property
    def taken_length(self) -> int:
        """Length of the part of `text` up to the end of the last `take`."""
        return len(self.text) - len(self.text.lstrip()) + self.num_taken

    def held_back(self) -> int:
        """Returns the number of characters at the end that may be the beginning of a stop string."""
        longest = 0
        for text in self.stop_strings:
            for size in range(min(len(text) - 1, len(self.text)), longest, -1):
                if self.text.endswith(text[:size]):
                    longest = size
                    break
        return longest


class AnswerStream:
    """An iterator over the pieces of an answer as they are generated; `answer` is the whole.

    Ending the loop early, by Ctrl-C or `close`, ends the answer with the text so far. A model whose logits contain NaN
    or infinity raises UserError after the text so far.

    Args:
        engine: generates the tokens.
        slot: the slot of the request, whose stop rule is `text.reason_after`.
        text: the text of the answer.
        earlier: turns before this one.
        asked: question of this turn.
        on_close: called once with the finished answer.
    """

    def __init__(
        self,
        engine: Engine,
        slot: Slot,
        text: AnswerText,
        *,
        earlier: Turns,
        asked: str,
        on_close: Callable[[Answer], None] | None = None,
    ):
        self.engine, self.slot, self.text = engine, slot, text
        self.earlier, self.asked = earlier, asked
        self.on_close = on_close
        self.finished: Answer | None = None

    def __iter__(self) -> "AnswerStream":
        return self

    def __next__(self) -> str:
        try:
            while self.finished is None:
                if piece := self.text.take():
                    return piece
                if self.slot.error and self.text.ended:
                    raise self.slot.error
                if self.slot.stop_reason and self.text.ended:
                    self.close()
                elif self.slot.stop_reason:
                    self.text.end()
                elif self.slot.is_released:
                    raise UserError(
                        "this answer was interrupted by another request to the model; read an answer to its end first"
                    )
                else:
                    self.engine.step()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer. Reads the rest of the stream first."""
        for _ in self:
            pass
        return self.close()

    def close(self) -> Answer:
        """Ends the answer with the text so far and returns it."""
        if self.finished is None:
            self.text.end()
            text = self.text.answer
            self.finished = Answer.of(
                text,
                generated=self.text.text,
                ids=list(self.slot.new_ids),
                num_prompt_tokens=len(self.slot.request.ids),
                stop_reason=self.slot.stop_reason or "interrupted",
                seconds=dict(self.engine.runner.seconds),
                history=[*self.earlier, (self.asked, text)],
            )
            if self.on_close:
                self.on_close(self.finished)
        return self.finished
