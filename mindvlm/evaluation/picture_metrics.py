"""Metrics of a predicted picture beside the true one.

H rows, W columns. Pictures are (H, W, 3) uint8. Distances are those of values in 0..1.
"""

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageFilter

MAX_PSNR = 100.0
WINDOW_RADIUS, WINDOW_SIGMA = 5, 1.5
K1, K2 = 0.01, 0.03
MAX_CLASSES = 8


def mean_squared_error(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Returns the mean over pixels and channels of the squared difference."""
    return float(((as_unit(predicted) - as_unit(truth)) ** 2).mean())


def psnr(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio -10 log10(MSE) in dB, `MAX_PSNR` at most, as for equal pictures."""
    error = mean_squared_error(predicted, truth)
    return min(MAX_PSNR, -10 * float(np.log10(error))) if error else MAX_PSNR


def ssim(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Returns the structural similarity (Wang et al. 2004), the mean over channels and over whole windows.

    Windows are Gaussian with sigma 1.5, 11 x 11 pixels, or as many as a smaller picture holds; K1 is 0.01, K2 0.03,
    and covariances are not corrected for the number of samples.
    """
    x, y = as_unit(predicted), as_unit(truth)
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    return float((luminance * (2 * covariance + K2**2) / (variance_x + variance_y + K2**2)).mean())


def blurred(values: np.ndarray) -> np.ndarray:
    """Returns the Gaussian means of the windows that lie within a picture, (H - 2r, W - 2r, channels)."""
    radius = min(WINDOW_RADIUS, (min(values.shape[:2]) - 1) // 2)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / WINDOW_SIGMA) ** 2)
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(values, len(weights), axis)
        values = windows @ (weights / weights.sum())
    return values


def as_unit(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float64) / 255


def palette(labels: Iterable[np.ndarray]) -> np.ndarray | None:
    """Returns the colours (classes, 3) of label pictures in ascending order; None for more than `MAX_CLASSES`."""
    colours: set[int] = set()
    for label in labels:
        colours |= set(np.unique(packed(label)).tolist())
        if len(colours) > MAX_CLASSES:
            return None
    return np.array([(colour >> 16, colour >> 8 & 255, colour & 255) for colour in sorted(colours)])


def packed(picture: np.ndarray) -> np.ndarray:
    """Returns each colour as one number, (H, W) int32."""
    return picture.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def nearest_class(picture: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Returns the number of the nearest colour (classes, 3) of each pixel, the first of equals, (H, W)."""
    return ((picture[:, :, None].astype(np.int32) - colours) ** 2).sum(-1).argmin(-1)


def foreground(picture: np.ndarray, threshold: int) -> np.ndarray:
    """Returns where the grey level (ITU-R 601-2) is at least `threshold` of 255, (H, W) bool."""
    return np.asarray(Image.fromarray(picture).convert("L")) >= threshold


def overlaps(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the pixels in the intersection and in the union of each class, (2, classes), of classes (H, W)."""
    both = np.bincount(truth[predicted == truth].ravel(), minlength=num_classes)
    counts = [np.bincount(one.ravel(), minlength=num_classes) for one in (predicted, truth)]
    return np.stack([both, counts[0] + counts[1] - both])


def mean_iou(counts: np.ndarray) -> float:
    """Returns the mean over classes of intersection / union, from the summed `overlaps` of all pictures.

    A class that no picture has is left out; without any, the result is 1.
    """
    both, union = counts[:, counts[1] > 0]
    return float((both / union).mean()) if union.size else 1.0


def line_matches(predicted: np.ndarray, truth: np.ndarray, tolerance: int) -> np.ndarray:
    """Returns the counts behind the F1 of thin lines, (H, W) bool: matched and all predicted, matched and all true.

    A pixel is matched if the other picture has a line within `tolerance` rows and columns of it.
    """
    return np.array([
        (predicted & dilated(truth, tolerance)).sum(), predicted.sum(),
        (truth & dilated(predicted, tolerance)).sum(), truth.sum(),
    ])  # fmt: skip


def dilated(mask: np.ndarray, distance: int) -> np.ndarray:
    picture = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.MaxFilter(2 * distance + 1))) > 0


def f1(counts: np.ndarray) -> float:
    """Returns the harmonic mean of precision and recall, from summed `line_matches`; 1 if there is no line at all."""
    matched_predicted, predicted, matched_true, true = counts
    if not predicted or not true:
        return float(predicted == true)
    precision, recall = matched_predicted / predicted, matched_true / true
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0
