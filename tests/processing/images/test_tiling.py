import numpy as np
import pytest
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images.picture import NEWLINE
from mindvlm.processing.images.tiling import TilingConfig, choose_resolution, fit_on_black, grid_shape, tiles
from mindvlm.processing.images.transforms import chat_picture

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
        ((2000, 1), "Default", (2000, 1)),
    ],
)
def test_chat_pictures_are_small(size, mode, expected):
    assert chat_picture(striped(*size), mode).size == expected


def arranged(rows: np.ndarray, grid: tuple[int, int], side: int, size: tuple[int, int], merge: str) -> np.ndarray:
    """LLaVA-1.6's order of (views, side * side) numbers: the views on a grid, as it does it with features."""
    overview, parts = rows[0], rows[1:]
    if merge == "flat":
        return rows.reshape(-1)
    columns, lines = grid
    plane = np.block([[parts[i * columns + j].reshape(side, side) for j in range(columns)] for i in range(lines)])
    if merge == "spatial_unpad":
        height, width = plane.shape
        if size[0] / size[1] > width / height:
            margin = (height - int(size[1] * width / size[0])) // 2
            plane = plane[margin : height - margin]
        else:
            margin = (width - int(size[0] * height / size[1])) // 2
            plane = plane[:, margin : width - margin]
        plane = np.concatenate([plane, np.full((len(plane), 1), NEWLINE)], axis=1)
    return np.concatenate([overview, plane.reshape(-1)])


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", [(40, 20), (40, 12), (20, 40), (11, 40), (40, 40), (39, 37), (7, 9)])
def test_the_order_of_feature_rows(size, merge):
    tiling = TilingConfig(resolutions=[list(point) for point in POINTS], merge=merge)
    columns, lines = grid_shape(size, POINTS, 10)
    num_views = len(tiling.tiles(striped(*size), 10))
    assert num_views == 1 + columns * lines
    expected = arranged(np.arange(num_views * 9).reshape(-1, 9), (columns, lines), 3, size, merge)
    np.testing.assert_array_equal(tiling.layout(size, tile=10, num_tokens=9), expected)


def test_margins_are_left_out_and_lines_end():
    tiling = TilingConfig(resolutions=[[20, 20]], merge="spatial_unpad")
    rows = tiling.layout((40, 20), tile=10, num_tokens=4)
    # 2 x 2 tiles of 2 x 2 rows each: the lines 1 and 2 of 0 to 3 show the picture
    assert rows.tolist() == [0, 1, 2, 3, 6, 7, 10, 11, NEWLINE, 12, 13, 16, 17, NEWLINE]


@pytest.mark.parametrize(
    ("options", "tile", "num_tokens", "message"),
    [
        ({"resolutions": [[20, 15]]}, 10, 4, "\\[20, 15\\] is not a multiple of the tower's image size of 10 pixels"),
        ({"resolutions": [[20, 20]], "merge": "spatial"}, 10, 5, "an image has 5 tokens, which is not a square number"),
    ],
)
def test_tiles_that_do_not_fit_the_tower(options, tile, num_tokens, message):
    with pytest.raises(UserError, match=message):
        TilingConfig(**options).check(tile, num_tokens)
