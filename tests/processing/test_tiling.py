import numpy as np
import pytest
from PIL import Image

from mindvlm.errors import UserError
from mindvlm.processing.chat_pictures import chat_picture
from mindvlm.processing.tiling import choose_resolution, fit_on_black, grid_shape, tiles

POINTS = [(20, 10), (10, 20), (20, 20)]


def striped(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(1, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "chosen"), [((40, 20), (20, 10)), ((20, 40), (10, 20)), ((40, 40), (20, 20)), ((5, 5), (20, 10))]
)
def test_most_of_the_picture_then_least_waste(size, chosen):
    assert choose_resolution(size, POINTS) == chosen


def test_no_resolution_is_an_error():
    with pytest.raises(UserError, match="image_grid_pinpoints is empty"):
        choose_resolution((4, 4), [])


@pytest.mark.parametrize(("size", "box"), [((40, 10), (0, 7, 20, 12)), ((10, 40), (7, 0, 12, 20))])
def test_the_rest_is_black(size, box):
    fitted = np.asarray(fit_on_black(striped(*size), (20, 20)))
    left, top, right, bottom = box
    assert fitted.shape == (20, 20, 3) and fitted[top:bottom, left:right].min() > 0
    fitted = fitted.copy()
    fitted[top:bottom, left:right] = 0
    assert fitted.max() == 0


def test_tiles_make_up_the_picture_behind_the_overview():
    image = striped(40, 20)
    overview, *parts = tiles(image, POINTS, tile=10, overview=(10, 10))
    assert overview.size == (10, 10) and grid_shape(image.size, POINTS, 10) == (2, 1)
    large = np.concatenate([np.asarray(part) for part in parts], axis=1)
    assert (large == np.asarray(fit_on_black(image, (20, 10)))).all()


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ((1600, 400), "Default", (800, 200)),
        ((900, 900), "Default", (400, 400)),
        ((30, 60), "Default", (30, 60)),
        ((30, 60), "Pad", (60, 60)),
        ((30, 60), "Resize", (336, 336)),
    ],
)
def test_chat_pictures_are_small(size, mode, expected):
    assert chat_picture(striped(*size), mode).size == expected
