"""The expected values were computed with OpenCV 4.10."""

import numpy as np
import pytest

from mindvlm.processing.images.transforms import resize_bilinear

ODD_REDUCTION = [
    [1, 75, 161, 191, 78, 164, 108, 81, 155],
    [12, 86, 173, 202, 89, 176, 120, 92, 166],
    [24, 97, 184, 213, 101, 187, 131, 104, 178],
    [35, 109, 95, 50, 112, 198, 142, 115, 189],
]
ENLARGED_COLUMNS = [
    [78, 17, 211, 149],
    [82, 21, 215, 153],
    [88, 26, 221, 159],
    [94, 32, 226, 164],
    [99, 37, 232, 170],
    [105, 43, 237, 176],
    [110, 49, 117, 181],
    [114, 53, 23, 185],
]
HALVED = [[143, 109, 75], [131, 161, 127]]


def pattern(height: int, width: int) -> np.ndarray:
    return (np.arange(height * width * 3) * 37 % 256).astype(np.uint8).reshape(height, width, 3)


@pytest.mark.parametrize(
    ("old", "new", "channel", "expected"),
    [
        ((5, 7), (4, 9), 0, ODD_REDUCTION),
        ((5, 7), (8, 4), 1, ENLARGED_COLUMNS),
        ((4, 6), (2, 3), 2, HALVED),
    ],
)
def test_values_of_opencv(old, new, channel, expected):
    assert resize_bilinear(pattern(*old), *new)[:, :, channel].tolist() == expected


def test_same_size_changes_nothing():
    assert (resize_bilinear(pattern(6, 5), 6, 5) == pattern(6, 5)).all()


def test_one_pixel_fills_any_size():
    assert (resize_bilinear(np.full((1, 1, 3), 93, np.uint8), 7, 5) == 93).all()
