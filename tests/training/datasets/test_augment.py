import numpy as np
import pytest
from PIL import Image, ImageDraw

from mindvlm.core.errors import UserError
from mindvlm.training.datasets import augment as changes
from mindvlm.training.datasets.augment import AugmentConfig, augment

NONE = dict.fromkeys(vars(AugmentConfig()), 0.0)


@pytest.fixture
def page() -> Image.Image:
    image = Image.new("RGB", (200, 150), "white")
    draw = ImageDraw.Draw(image)
    for y in range(20, 130, 12):
        draw.line((25, y, 170, y), fill="black", width=2)
    return image


def changed(page, name, seed=3):
    return augment(page, AugmentConfig(**{**NONE, name: 1.0}), np.random.default_rng(seed))


def test_probabilities_are_those_of_the_original():
    assert list(vars(AugmentConfig()).values()) == [0.02, 0.03, 0.03, 0.04, 0.04, 0.03, 0.07, 0.08, 0.03]


def test_nothing_changes_without_luck(page):
    assert augment(page, AugmentConfig(**NONE), np.random.default_rng(1)) is page


@pytest.mark.parametrize("name", NONE)
def test_a_change_is_mild_and_repeatable(page, name):
    results = [np.asarray(changed(page, name, seed), dtype=float) for seed in range(6)]
    again = np.asarray(changed(page, name, 4), dtype=float)
    original = np.asarray(page, dtype=float)
    np.testing.assert_array_equal(again, results[4])
    assert any((result != original).any() for result in results)
    for result in results:
        assert result.shape == original.shape
        assert np.abs(result - original).mean() < 60
        assert abs(result.mean() - original.mean()) < 45, "still mostly paper"


@pytest.mark.parametrize("name", ["shear", "shift_scale_rotate", "grid_distortion", "elastic"])
def test_what_comes_into_view_is_white(name):
    black = Image.new("RGB", (90, 60), "black")
    pixels = np.stack([np.asarray(changed(black, name, seed)) for seed in range(20)])
    assert (pixels[:, :2] == 255).any() or (pixels[:, -2:] == 255).any()
    assert (pixels[:, 20:40, 30:60] < 40).all()


def test_strokes_get_thicker_or_thinner(page):
    ink = {
        int((np.asarray(changes.erode_or_dilate(page, np.random.default_rng(seed))) < 128).sum()) for seed in range(9)
    }
    original = int((np.asarray(page) < 128).sum())
    assert min(ink) < original < max(ink)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (500, 2)])
def test_odd_sizes_pass(size):
    for name in NONE:
        assert changed(Image.new("RGB", size, "grey"), name).size == size


def test_impossible_probabilities_are_named():
    with pytest.raises(UserError, match="data.augment.jpeg is 1.5; expected a probability"):
        AugmentConfig(jpeg=1.5)
