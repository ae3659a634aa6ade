"""The scenarios of a TinyLLaVA case: prompts as arrays, in which -200 marks an image."""

from dataclasses import dataclass

import numpy as np

from tests.golden_readers.case import Case

PLACEHOLDER = -200
IGNORED = -100


@dataclass(frozen=True)
class Scenario:
    """One entry of scenarios.json with its inputs.

    Attributes:
        options: the entry.
        rows: ids of each row without padding; every placeholder is one feature row.
        labels: labels of each row, or None.
        pixels: all images, (N, 3, height, width), or None.
        used: indices of the images used in a row; the others fill the place of a text row.
        num_masked: whether a mask was passed.
        max_length: length to which rows are cut, or None.
        is_left_padded: the recorded rows are aligned at their end.
    """

    name: str
    options: dict
    rows: list[list[int]]
    labels: list[list[int]] | None
    pixels: np.ndarray | None
    used: list[int]
    has_mask: bool
    max_length: int | None
    is_left_padded: bool

    @property
    def kept_rows(self) -> list[list[int]]:
        """The rows, cut to `max_length`."""
        return [row[: self.max_length] for row in self.rows]

    @property
    def is_cut_in_a_picture(self) -> bool:
        return any(PLACEHOLDER in row[self.max_length :] for row in self.rows) if self.max_length else False

    @property
    def lengths(self) -> list[int]:
        """The lengths of the recorded rows."""
        return [min(len(row), self.max_length or len(row)) for row in self.rows]

    def padded(self, rows: list[list[int]], fill: int) -> np.ndarray:
        """Returns rows as an array (B, L) int32, padded on the right."""
        length = max(map(len, rows))
        return np.array([row + [fill] * (length - len(row)) for row in rows], np.int32)

    def as_recorded(self, array: np.ndarray) -> np.ndarray:
        """Moves the padding of an array (B, L, ...) from the right to the side on which the recorded array has it."""
        if not self.is_left_padded:
            return array
        return np.stack([np.roll(row, array.shape[1] - n, 0) for row, n in zip(array, self.lengths, strict=True)])

    @property
    def valid(self) -> np.ndarray:
        """Returns a mask (B, L) bool of the recorded rows, False at padding."""
        length = max(self.lengths)
        return self.as_recorded(np.array([[i < n for i in range(length)] for n in self.lengths]))


def find_scenarios(case: Case, *, image_token_len: int, placeholder: int) -> list[Scenario]:
    """Returns the scenarios of a case.

    Args:
        placeholder: the id of an image in the recorded ids.
    """
    listed = case.documents["scenarios.json"]["scenarios"]
    return [one_scenario(case, name, listed[name], image_token_len, placeholder) for name in listed]


def one_scenario(case: Case, name: str, options: dict, image_token_len: int, placeholder: int) -> Scenario:
    prefix = f"{options.get('inputs', name)}."
    arrays = {key.removeprefix(prefix): array for key, array in case.inputs.items() if key.startswith(prefix)}
    ids, mask, labels = arrays["input_ids"], arrays.get("attention_mask"), arrays.get("labels")
    kept = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    slots, pixels = picture_slots(arrays)
    rows, row_labels, used = [], [], []
    for number, row in enumerate(ids):
        row_ids = row[kept[number]].tolist()
        own_labels = [IGNORED] * len(row_ids) if labels is None else labels[number][kept[number]].tolist()
        merged, merged_labels = [], []
        for token, label in zip(row_ids, own_labels, strict=True):
            if token == placeholder:
                pictures = slots.pop(0)
                used += pictures
                merged += [PLACEHOLDER] * (image_token_len * len(pictures))
                merged_labels += [IGNORED] * (image_token_len * len(pictures))
            else:
                merged.append(token)
                merged_labels.append(label)
        if placeholder not in row_ids and slots and placeholder == PLACEHOLDER:
            # the official program takes a picture for a row of text, too, and leaves it out
            slots.pop(0)
        rows.append(merged)
        row_labels.append(merged_labels)
    changed = options.get("config", {})
    config = {**case.config, **changed}
    return Scenario(
        name=name,
        options=options,
        rows=rows,
        labels=None if labels is None else row_labels,
        pixels=pixels,
        used=used,
        has_mask=mask is not None,
        # without pictures the official function leaves early, before it cuts
        max_length=None if pixels is None else config.get("tokenizer_model_max_length"),
        is_left_padded=config.get("tokenizer_padding_side") == "left",
    )


def picture_slots(arrays: dict[str, np.ndarray]) -> tuple[list[list[int]], np.ndarray | None]:
    """Returns the images of each placeholder in order, and all images."""
    for name in ("images", "pixel_values"):
        if name in arrays:
            return [[i] for i in range(len(arrays[name]))], arrays[name]
    names = [name for name in arrays if name.startswith("images_")]
    lists = [arrays[name] for name in sorted(names, key=lambda name: int(name.removeprefix("images_")))]
    if not lists:
        return [], None
    slots, first = [], 0
    for pictures in lists:
        slots.append(list(range(first, first + len(pictures))))
        first += len(pictures)
    return slots, np.concatenate(lists)
