"""Reuse of the keys and values of finished slots for prompts with the same beginning."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindvlm.generation.graphs import BLOCK
from mindvlm.generation.images import ImageFeatures
from mindvlm.generation.request import Slot


@dataclass
class KeptPrompt:
    """A finished slot with the key of its prompt."""

    slot: Slot
    key: np.ndarray


def prompt_key(ids: Sequence[int], placeholder_id: int, features: ImageFeatures) -> np.ndarray:
    """Returns a number for each token, (L,) int64, equal for equal tokens and for equal feature rows of pictures.

    The rows of a picture have its digest plus their index, and are negative.
    """
    key = np.array(ids, np.int64)
    places = np.flatnonzero(key == placeholder_id)
    if features.rows is None:
        return key
    ends = np.cumsum([0, *features.counts])
    rows = features.rows.asnumpy()
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        digest = hashlib.sha256(rows[start:end].tobytes()).digest()
        first = int.from_bytes(digest[:8], "little") >> 2
        key[places[start:end]] = -1000 - first - np.arange(end - start)
    return key


class PromptCache:
    """The finished slots, the least recently used one first."""

    def __init__(self) -> None:
        self.kept: list[KeptPrompt] = []

    def keep(self, slot: Slot, key: np.ndarray) -> None:
        """Keeps the prompt of a finished slot. Only its prompt is reused, as the answer has other bits."""
        self.kept.append(KeptPrompt(slot, key))

    def take(self, key: np.ndarray, alpha: float) -> tuple[Slot | None, int]:
        """Returns the slot with the longest common beginning and its length, and forgets the slot; (None, 0) if none.

        Args:
            alpha: dynamic NTK factor of the new prompt, which the slot must have.
        """
        lengths = [common_blocks(one.key, key) if one.slot.alpha == alpha else 0 for one in self.kept]
        best = max(range(len(lengths)), key=lambda number: (lengths[number], number), default=None)
        if best is None or lengths[best] == 0:
            return None, 0
        return self.kept.pop(best).slot, lengths[best]

    def oldest(self) -> Slot:
        """Returns the least recently used slot and forgets it."""
        return self.kept.pop(0).slot

    def clear(self) -> None:
        self.kept.clear()


def common_blocks(earlier: np.ndarray, later: np.ndarray) -> int:
    """Returns the length of the common beginning of two keys in whole blocks, without the last token of `later`.

    In whole blocks, because the engine computes blocks to the same bits; see `Engine.is_exact`.
    """
    length = min(len(earlier), len(later) - 1)
    differ = np.flatnonzero(earlier[:length] != later[:length])
    common = int(differ[0]) if len(differ) else length
    return common // BLOCK * BLOCK
