"""A request to a model, and the engine's slot for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from mindspore import Tensor

from mindvlm.core.config import GenerationConfig
from mindvlm.core.errors import UserError

MAX_NEW_TOKENS, CONTEXT_FULL, ERROR = "max_new_tokens", "context_full", "error"


@dataclass(kw_only=True)
class Request:
    """A prompt with generation options, as ids.

    Attributes:
        ids: the prompt, at least one id, with one placeholder per row of `features`.
        features: feature rows of the pictures in the order of the placeholders, (..., hidden); None without pictures.
        options: generation options; `stop_strings`, `max_repeated_tokens` and `seed` are ignored here in favour of
            `stop` and `seed`.
        stop: called with each new id; returns the stop reason, or None to continue. None ends the answer by length
            only.
        seed: seed for sampling.
        forced_ids: ids to generate instead of those the model chooses, for checks against a given answer.
    """

    ids: Sequence[int]
    features: Tensor | None = None
    options: GenerationConfig = field(default_factory=GenerationConfig)
    stop: Callable[[int], str | None] | None = None
    seed: int = 0
    forced_ids: Sequence[int] | None = None


class Slot:
    """The state of a request in one row of the engine's cache. Only the engine changes it.

    Attributes:
        row: row of the cache.
        cached: ids whose keys and values are in the cache.
        alpha: dynamic NTK factor of the rotated keys.
        new_ids: generated ids, including the stop token. The last one is not in the cache yet.
        stop_reason: None while the answer is incomplete; then the result of `Request.stop`, 'max_new_tokens',
            'context_full' or 'error'.
        error: the error that ended the answer; None without one.
        is_released: whether the row was freed.
    """

    def __init__(self, row: int, request: Request, alpha: float):
        self.row, self.request, self.alpha = row, request, alpha
        self.cached: list[int] = list(request.ids)
        self.new_ids: list[int] = []
        self.stop_reason: str | None = None
        self.error: UserError | None = None
        self.is_released = False

    @cached_property
    def random(self) -> np.random.Generator:
        """The source of the numbers with which tokens are sampled."""
        return np.random.default_rng(self.request.seed)

    @property
    def is_running(self) -> bool:
        return self.stop_reason is None and not self.is_released

    @property
    def history(self) -> np.ndarray:
        """Ids of the prompt and the answer, int32, for the repetition rules."""
        return np.array([*self.request.ids, *self.new_ids], np.int32)

    def common_length(self, ids: Sequence[int]) -> int:
        """Returns the length of the common prefix of `ids` and the cached ids."""
        pairs = zip(self.cached, ids, strict=False)
        return next((i for i, (mine, other) in enumerate(pairs) if mine != other), min(len(self.cached), len(ids)))

    @property
    def forced_id(self) -> int | None:
        """The next id if the request forces it."""
        forced = self.request.forced_ids
        return None if forced is None or len(self.new_ids) >= len(forced) else int(forced[len(self.new_ids)])

    def fail(self, error: UserError) -> None:
        """Ends the answer with an error. Nothing in the cache is used again."""
        self.error, self.stop_reason, self.cached = error, ERROR, []

    def take(self, token: int, max_length: int) -> None:
        """Appends an id to the answer and sets `stop_reason` if the answer ends with it."""
        request = self.request
        self.new_ids.append(token)
        self.stop_reason = request.stop(token) if request.stop else None
        if self.stop_reason is None and len(self.new_ids) >= request.options.max_new_tokens:
            self.stop_reason = MAX_NEW_TOKENS
        if self.stop_reason is None and len(self.cached) >= max_length:
            self.stop_reason = CONTEXT_FULL


class Addition(NamedTuple):
    """A request to add to the engine; see `Engine.add`."""

    request: Request
    slot: Slot | None = None
    num_kept: int | None = None
