"""COCO's run-length encoding of masks, and pictures painted from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mindvlm.models.delvm.made_data.run_lengths import area, paint, parse_counts, run_lengths
from mindvlm.processing.samples.public_data import Unusable

MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=30))
WHITE = np.full((1, 3), 255, np.uint8)


def runs_of(mask):
    """Returns the lengths of runs down the columns, the first outside the mask."""
    flat = np.concatenate(([False], mask.T.reshape(-1)))
    borders = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate(([0], borders, [mask.size]))).tolist()


def compressed(counts):
    """Writes run lengths as text: differences to the number two before, from the fourth on, 5 bits a character."""
    text = ""
    for number, count in enumerate(counts):
        value = count - (counts[number - 2] if number > 2 else 0)
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(bits + 32 * more + 48)
    return text


@given(MASKS)
def test_masks_survive_both_forms(mask):
    counts = runs_of(mask)
    for form in (counts, compressed(counts)):
        height, width, found = run_lengths({"size": list(mask.shape), "counts": form})
        assert (height, width) == mask.shape and found == counts and area(found) == mask.sum()
        assert (paint([found], WHITE, height, width) == mask[..., None] * 255).all()


@given(MASKS)
def test_text_is_that_of_pycocotools(mask):
    masks = pytest.importorskip("pycocotools.mask")
    encoded = masks.encode(np.asfortranarray(mask, np.uint8))
    assert parse_counts(encoded["counts"].decode()) == runs_of(mask)


@given(st.lists(st.integers(0, 2**40), max_size=20))
def test_numbers_of_any_size_survive(counts):
    assert parse_counts(compressed(counts)) == counts


def test_a_later_mask_lies_over_those_before():
    masks = [[0, 4, 2], [2, 3, 1]]
    colours = np.array([(200, 10, 10), (100, 250, 0)], np.uint8)
    picture = paint(masks, colours, 3, 2)
    red, green, black = (200, 10, 10), (100, 250, 0), (0, 0, 0)
    assert picture.transpose(1, 0, 2).reshape(-1, 3).tolist() == [*map(list, (red, red, green, green, green, black))]


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ({"size": [2, 3], "counts": [0, 7]}, "overrun"),
        ({"size": [2, 3], "counts": [2, 3]}, "do not fill"),
        ({"size": [2, 3], "counts": []}, "do not fill"),
        ({"size": [2, 3], "counts": compressed([1, 2, 30])}, "overrun"),
        ({"size": [2, 3], "counts": [10, -4]}, "negative"),
        ({"size": [2, 3], "counts": [3.5, 2.5]}, "no run-length"),
        ({"size": [2, 3], "counts": "1\n"}, "no run-length"),
        ({"size": [2, 3], "counts": "1P"}, "no run-length"),
        ({"size": [2], "counts": [2]}, "no run-length"),
        ({"size": [2, 3]}, "no run-length"),
        ([[1.0, 2.0, 3.0, 4.0]], "no run-length"),
        (None, "no run-length"),
    ],
)
def test_damaged_encodings_say_why(encoding, reason):
    with pytest.raises(Unusable, match=reason):
        run_lengths(encoding)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        run_lengths({"size": [3, 4], "counts": text})
    except Unusable:
        pass
