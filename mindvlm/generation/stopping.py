"""When an answer ends, and what of it may be shown meanwhile."""

from collections.abc import Collection, Sequence

from mindvlm.processing.text.stream_decoder import StreamDecoder


class RowStop:
    """Stop ids and stop strings of one row, and its text so far.

    Text that could be the beginning of a stop string is held back, so that no piece of one is ever shown. Blanks around
    an answer are not part of it, as in the original programs: a template writes its own.

    Args:
        stop_ids: ids that end the answer and are not part of its text.
        stop_strings: texts that end the answer; what precedes the first one is the answer.
        decoder: ids to whole characters.

    Attributes:
        text: what was generated, blanks included.
    """

    def __init__(self, stop_ids: Collection[int], stop_strings: Sequence[str], decoder: StreamDecoder):
        self.stop_ids = frozenset(stop_ids)
        self.stop_strings = [text for text in stop_strings if text]
        self.decoder = decoder
        self.text = ""
        self.num_taken = 0
        self.ended = False

    def reason_after(self, token: int) -> str | None:
        """Takes the next generated id; 'stop_token' or 'stop_string' when it ends the row, else None."""
        if token in self.stop_ids:
            self.end()
            return "stop_token"
        self.text += self.decoder.push(token)
        cut = self.first_stop_string()
        if cut is None:
            return None
        self.text = self.text[:cut]
        self.ended = True
        return "stop_string"

    def first_stop_string(self) -> int | None:
        starts = [start for start in (self.text.find(text) for text in self.stop_strings) if start >= 0]
        return min(starts, default=None)

    def end(self) -> None:
        """Completes the text when no more ids will come."""
        if not self.ended:
            self.text += self.decoder.flush()
            self.ended = True

    @property
    def answer(self) -> str:
        """The text without blanks around it."""
        return self.text.strip()

    def take(self) -> str:
        """The part of `answer` that became safe to show since the last call."""
        safe = self.text if self.ended else self.text[: len(self.text) - self.held_back()]
        # blanks at the end wait until something follows them
        shown = safe.strip()
        piece = shown[self.num_taken :]
        self.num_taken = max(self.num_taken, len(shown))
        return piece

    def held_back(self) -> int:
        """How many characters at the end could still grow into a stop string."""
        longest = 0
        for text in self.stop_strings:
            for size in range(min(len(text) - 1, len(self.text)), longest, -1):
                if self.text.endswith(text[:size]):
                    longest = size
                    break
        return longest
