"""OpenCV's bilinear resize of 8-bit pictures, bit for bit, without OpenCV."""

import numpy as np

_COEFFICIENT_BITS = 11


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """What `cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)` returns.

    OpenCV weighs in fixed point with 11-bit coefficients and drops 4 bits between the two passes; a reduction by
    exactly 2 in both directions becomes the mean of 2 x 2 pixels.

    Args:
        pixels: (h, w, channels) uint8.

    Returns:
        (height, width, channels) uint8.
    """
    old_height, old_width = pixels.shape[:2]
    if (old_height, old_width) == (2 * height, 2 * width):
        quads = pixels.reshape(height, 2, width, 2, -1).astype(np.uint16).sum(axis=(1, 3))
        return ((quads + 2) >> 2).astype(np.uint8)
    left, right, left_weight, right_weight = _taps(old_width, width, clamp_weights=True)
    top, bottom, top_weight, bottom_weight = _taps(old_height, height, clamp_weights=False)
    wide = pixels.astype(np.int32)
    rows = wide[:, left] * left_weight[None, :, None] + wide[:, right] * right_weight[None, :, None]
    rows >>= 4
    upper = (rows[top] * top_weight[:, None, None]) >> 16
    lower = (rows[bottom] * bottom_weight[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _taps(old: int, new: int, *, clamp_weights: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For every new index: the two source indices, int64, and their weights in 1/2048, int32.

    At the borders both indices are the same pixel. OpenCV then gives one tap all the weight along rows
    (`clamp_weights`), but keeps two weights along columns, where each of the two products is rounded.
    """
    centre = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int64)
    fraction = centre - first.astype(np.float32)
    if clamp_weights:
        fraction[(first < 0) | (first >= old - 1)] = 0.0
    scale = np.float32(1 << _COEFFICIENT_BITS)
    first_weight = np.rint((np.float32(1) - fraction) * scale).astype(np.int32)
    second_weight = np.rint(fraction * scale).astype(np.int32)
    return np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), first_weight, second_weight
