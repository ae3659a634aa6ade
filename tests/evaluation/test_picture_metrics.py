"""Metrics of pictures: against scikit-image, against values counted by hand, and what must always hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mindvlm.evaluation import picture_metrics as metrics


def pictures(seed: int, shape=(24, 30), *, noise=40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 256, (*shape, 3))
    return np.clip(truth + rng.normal(0, noise, truth.shape), 0, 255).astype(np.uint8), truth.astype(np.uint8)


@pytest.mark.parametrize("seed, noise", [(0, 3), (1, 40), (2, 200)])
def test_as_scikit_image(seed, noise):
    predicted, truth = pictures(seed, noise=noise)
    assert metrics.psnr(predicted, truth) == pytest.approx(peak_signal_noise_ratio(truth, predicted), rel=1e-12)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = structural_similarity(truth, predicted, channel_axis=-1, **options)
    assert metrics.ssim(predicted, truth) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20))
def test_distances(seed, height, width):
    predicted, truth = pictures(seed, (height, width))
    assert metrics.mean_squared_error(truth, truth) == 0
    assert metrics.psnr(truth, truth) == metrics.MAX_PSNR
    assert metrics.ssim(truth, truth) == pytest.approx(1)
    similarity = metrics.ssim(predicted, truth)
    assert similarity == pytest.approx(metrics.ssim(truth, predicted)) and similarity <= 1 + 1e-9
    assert 0 <= metrics.mean_squared_error(predicted, truth) == metrics.mean_squared_error(truth, predicted) <= 1


def test_black_beside_white():
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert metrics.mean_squared_error(black, white) == 1
    assert metrics.psnr(black, white) == 0
    assert metrics.ssim(black, white) == pytest.approx(0.01**2 / (1 + 0.01**2))


def test_a_palette():
    label = np.array([[(0, 0, 0), (255, 0, 0)], [(0, 0, 255), (255, 0, 0)]], np.uint8)
    colours = metrics.palette([label, label[:1]])
    assert colours.tolist() == [[0, 0, 0], [0, 0, 255], [255, 0, 0]]
    blurred = (label * 0.7 + 20).astype(np.uint8)
    assert metrics.nearest_class(blurred, colours).tolist() == [[0, 2], [1, 2]]
    assert metrics.palette([pictures(0)[1]]) is None


def test_iou_counted_by_hand():
    truth = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    predicted = np.array([[0, 0, 0, 1], [0, 0, 1, 2]])
    counts = metrics.overlaps(predicted, truth, 4)
    assert counts.tolist() == [[4, 2, 0, 0], [5, 4, 1, 0]]
    # class 3 occurs nowhere; class 2 has no true pixel
    assert metrics.mean_iou(counts) == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)
    assert metrics.mean_iou(np.zeros((2, 3), int)) == 1


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_iou_of_classes(seed, num_classes):
    predicted, truth = np.random.default_rng(seed).integers(0, num_classes, (2, 6, 7))
    counts = metrics.overlaps(predicted, truth, num_classes)
    for number in range(num_classes):
        both = ((predicted == number) & (truth == number)).sum()
        assert counts[:, number].tolist() == [both, ((predicted == number) | (truth == number)).sum()]
    assert 0 <= metrics.mean_iou(counts) <= 1 == metrics.mean_iou(metrics.overlaps(truth, truth, num_classes))


def test_the_foreground_is_above_a_grey_level():
    picture = np.array([[(0, 0, 0), (0, 0, 255), (19, 19, 19), (20, 20, 20)]], np.uint8)
    # pure blue has the grey level 29
    assert metrics.foreground(picture, 20).tolist() == [[False, True, False, True]]


def test_lines_within_a_tolerance():
    truth, predicted = np.zeros((2, 9, 9), bool)
    truth[4], predicted[5, :6], predicted[0, 0] = True, True, True
    assert metrics.line_matches(predicted, truth, 0).tolist() == [0, 7, 0, 9]
    # a true pixel of column 6 has a neighbour in column 5
    assert metrics.line_matches(predicted, truth, 1).tolist() == [6, 7, 7, 9]
    assert metrics.f1(np.array([6, 7, 7, 9])) == pytest.approx(2 * (6 / 7) * (7 / 9) / (6 / 7 + 7 / 9))
    assert metrics.f1(np.array([0, 7, 0, 9])) == 0
    assert metrics.f1(np.array([0, 0, 0, 0])) == 1
    assert metrics.f1(np.array([0, 0, 0, 9])) == 0
