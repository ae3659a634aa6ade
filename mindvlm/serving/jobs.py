"""An answer that the scheduler generates, and what it reports on the way."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.answer import AnswerText
from mindvlm.generation.request import ERROR, Slot
from mindvlm.serving.errors import ApiError
from mindvlm.serving.prompts import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredToken:
    """A generated token with its log probability, and the most likely ones at its place.

    Attributes:
        top: pairs of id and log probability, in falling order.
    """

    id: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How an answer ended.

    Attributes:
        stop_reason: as in `Answer`.
        num_prompt_tokens, num_reused: length of the prompt, and how much of it was in the cache.
        num_new_tokens: generated tokens, including the stop token.
        prefill_seconds, decode_seconds: time of the prompt, pictures included, and of the answer.
    """

    stop_reason: str
    num_prompt_tokens: int
    num_reused: int
    num_new_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True)
class Event:
    """News of a job: a piece of its text, its end or an error."""

    text: str = ""
    tokens: Sequence[ScoredToken] = ()
    finish: Finish | None = None
    error: ApiError | None = None


@dataclass(eq=False, kw_only=True)
class Job:
    """An answer to generate.

    Attributes:
        receive: called with each `Event` in the thread of the requests.
        streams: whether pieces are wanted before the end.
        has_begun: whether there was one.
        top_logprobs: see `Wishes`.
        asked_at: `time.monotonic()` of the request.
        expires: that at which the job fails.
        is_cancelled: set when nobody waits for the answer any more.
        has_failed: set when its text cannot be made.
    """

    prompt: Prompt
    options: GenerationConfig
    seed: int
    text: AnswerText
    receive: Callable[[Event], None]
    streams: bool = False
    top_logprobs: int | None = None
    expires: float
    is_cancelled: bool = False
    has_failed: bool = False
    slot: Slot | None = None
    key: np.ndarray | None = None
    num_reused: int = 0
    asked_at: float
    started_at: float = 0.0
    prefilled_at: float = 0.0
    has_begun: bool = False
    # the tokens that were not reported yet, with the length of the text before each
    waiting_tokens: list[tuple[int, ScoredToken]] = field(default_factory=list)
    text_length: int = 0

    @property
    def is_expired(self) -> bool:
        return time.monotonic() > self.expires

    def reason_after(self, token: int) -> str | None:
        """Takes the next id into the text; returns the stop reason if it ends the answer, else None."""
        try:
            return self.text.reason_after(token)
        except Exception:
            # an error would end the answers of all clients
            logger.exception("the text of an answer cannot be made")
            self.has_failed = True
            return ERROR

    def take_token(self, logits: np.ndarray | None, *, sends_piece: bool) -> Event | None:
        """Returns what is new after the engine added a token to the slot; None if nothing is to be reported.

        Args:
            logits: (V,) float32 from which the token was chosen, for log probabilities.
            sends_piece: whether it is time for a piece; the first one and the end do not wait.
        """
        if not self.has_failed:
            try:
                return self.new_event(logits, sends_piece=sends_piece)
            except Exception:
                logger.exception("the text of an answer cannot be made")
                self.has_failed = True
        return Event(error=ApiError(500, "the text cannot be made; see the log of the server", code="text_failed"))

    def new_event(self, logits: np.ndarray | None, *, sends_piece: bool) -> Event | None:
        """See `take_token`."""
        token, ended = self.slot.new_ids[-1], self.slot.stop_reason is not None
        if ended:
            self.text.end()
        if logits is not None and token not in self.text.stop_ids:
            scored = score(token, logits, self.top_logprobs)
            self.waiting_tokens.append((self.text_length, scored))
        self.text_length = len(self.text.text)
        if ended:
            return Event(text=self.text.take(), tokens=self.take_tokens(), finish=self.finish)
        if not self.streams or (self.has_begun and not sends_piece):
            return None
        piece = self.text.take()
        if not piece:
            return None
        self.has_begun = True
        return Event(text=piece, tokens=self.take_tokens())

    def take_tokens(self) -> list[ScoredToken]:
        """Returns the tokens of the text since the last call, without those that belong to a stop string."""
        ends = {None: self.text.taken_length, "stop_string": self.text_length}
        end = ends.get(self.slot.stop_reason, math.inf)
        tokens = [token for start, token in self.waiting_tokens if start < end]
        self.waiting_tokens = self.waiting_tokens[len(tokens) :]
        return tokens

    @property
    def finish(self) -> Finish:
        return Finish(
            stop_reason=self.slot.stop_reason,
            num_prompt_tokens=len(self.slot.request.ids),
            num_reused=self.num_reused,
            num_new_tokens=len(self.slot.new_ids),
            prefill_seconds=self.prefilled_at - self.started_at,
            decode_seconds=time.monotonic() - self.prefilled_at,
        )


def score(token: int, logits: np.ndarray, num_top: int) -> ScoredToken:
    """Returns a token with its log probability and the `num_top` most likely ones, for logits (V,)."""
    logits = logits.astype(np.float64)
    highest = logits.max()
    logprobs = logits - (highest + np.log(np.exp(logits - highest).sum()))
    top = np.argsort(-logprobs, kind="stable")[:num_top]
    return ScoredToken(token, float(logprobs[token]), [(int(one), float(logprobs[one])) for one in top])
