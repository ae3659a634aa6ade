"""Views of a picture: grids, canvases, crops and the order of rows; pixels and sizes are among the recorded cases."""

import numpy as np
import pytest
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.models.slime.processor import make_picture
from mindvlm.models.slime.views import MAX_CROPS, SEPARATOR, ViewsConfig, candidate_sizes, slices
from mindvlm.processing.images.tiling import grid_shape

VECTORS = [
    ((100, 100), (1, 2)),
    ((336, 336), (1, 2)),
    ((500, 375), (2, 1)),
    ((640, 480), (2, 2)),
    ((800, 600), (3, 2)),
    ((1024, 1024), (2, 3)),
    ((1920, 1080), (3, 2)),
    ((300, 2000), (1, 6)),
    ((5000, 400), (7, 1)),
]
GRIDS = {(1, n) for n in range(2, 8)} | {(n, 1) for n in range(2, 8)} | {(2, 2), (2, 3), (3, 2)}


def grid_of(size, tile=336):
    return grid_shape(size, candidate_sizes(size, tile), tile)


@pytest.mark.parametrize(("size", "grid"), VECTORS)
def test_the_grid_of_a_size(size, grid):
    assert grid_of(size) == grid


def test_all_grids_are_reached_and_no_other():
    rng = np.random.default_rng(0)
    sizes = [(int(w), int(h)) for w, h in np.exp(rng.uniform(0, np.log(6000), (6000, 2))).round()]
    assert {grid_of(size) for size in sizes} == GRIDS


@pytest.mark.parametrize("mode", ["anyres", "any_res", "pad_then_devide"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 1), (337, 336)])
def test_any_size_is_cut(size, mode):
    views, image = ViewsConfig(size=56, mode=mode), Image.new("RGB", size, "red")
    parts, (columns, rows) = views.crops(image)
    assert len(parts) == columns * rows <= MAX_CROPS[mode]
    assert {part.size for part in (views.global_view(image), *parts)} == {(56, 56)}


def test_slices_are_those_of_the_picture():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 200, 3), np.uint8))
    parts, grid = slices(image, 56)
    assert grid == (4, 2) or len(parts) == grid[0] * grid[1] <= 7
    assert all(part.width == part.height for part in parts)


def rows_of(views: ViewsConfig, grid, first: int) -> np.ndarray:
    """Rows that hold (crop, line, column) of each local token, as the model stacks them."""
    side, columns, lines = 2, *grid
    tokens = [(crop, i // side, i % side) for crop in range(columns * lines) for i in range(side**2)]
    local = np.full((20, 3), -1)
    per_view = views.num_global_tokens
    for number, token in enumerate(tokens):
        crop, place = divmod(number, side**2)
        view, slot = divmod(crop, views.crops_per_view)
        at = (first + view) * per_view + slot * side**2 + place
        local = np.pad(local, ((0, max(0, at + 1 - len(local))), (0, 0)), constant_values=-1)
        local[at] = token
    return local


@pytest.mark.parametrize("use", ["both", "local"])
@pytest.mark.parametrize("grid", [(3, 2), (2, 1), (1, 3)])
def test_local_rows_run_line_by_line_over_all_crops(grid, use):
    views = ViewsConfig(size=56, num_global_tokens=16, num_local_tokens=4, use=use)
    layout, has_global = views.layout(grid), use == "both"
    assert len(layout) == views.num_rows(grid[0] * grid[1])
    if has_global:
        assert layout[:16].tolist() == list(range(16)) and layout[16] == SEPARATOR
    found = rows_of(views, grid, int(has_global))[layout[17 * has_global :]].tolist()
    columns, lines = grid
    expected = [
        [row // 2 * columns + column // 2, row % 2, column % 2]
        for row in range(2 * lines)
        for column in range(2 * columns)
    ]
    assert found == expected
    flat = ViewsConfig(size=56, num_global_tokens=16, num_local_tokens=4, use=use, merge="flat").layout(grid)
    assert flat[17 * has_global :].tolist() == sorted(layout[17 * has_global :])


def test_the_last_bucket_is_filled():
    views = ViewsConfig(size=56, num_global_tokens=16, num_local_tokens=4)
    crops = list(np.random.default_rng(0).normal(size=(3, 3, 56, 56)).astype(np.float32))
    picture = make_picture(views, crops[0], crops, (3, 1))
    whole, *buckets = picture.views
    assert whole.image.shape == (3, 56, 56) and [one.crops.shape for one in buckets] == [(2, 3, 56, 56)] * 2
    assert (buckets[1].crops[0] == crops[2]).all() and not buckets[1].crops[1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "tiles"}, "processor.views.mode is 'tiles'; expected one of anyres"),
        ({"use": "all"}, "processor.views.use is 'all'"),
        ({"merge": "spatial_unpad"}, "processor.views.merge is 'spatial_unpad'; expected one of spatial, flat"),
        ({"size": 0}, "processor.views: size 0"),
        ({"num_local_tokens": 140}, "140 tokens, which is not a square number; set merge to flat"),
        ({"use": "local", "mode": "pad"}, "mode 'pad' cuts no crops"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        ViewsConfig(**changes)


@pytest.mark.parametrize("mode", ["anyres", "any_res", "pad_then_devide", "pad"])
@pytest.mark.parametrize("num_local_tokens", [4, 9])
def test_the_largest_picture_has_the_most_views(mode, num_local_tokens):
    views = ViewsConfig(size=28, mode=mode, num_global_tokens=16, num_local_tokens=num_local_tokens)
    found = []
    for size in [(28, 28), (60, 80), (90, 40), (200, 28), (100, 100)]:
        parts = views.crops(Image.new("RGB", size))[0] if views.has_crops else []
        arrays = [np.zeros((3, 28, 28), np.float32) for _ in parts]
        grid = (len(parts), 1)
        kinds = [type(view) for view in make_picture(views, np.zeros((3, 28, 28), np.float32), arrays, grid).views]
        found.append(tuple(kinds.count(kind) for kind in dict.fromkeys(kinds)))
    assert max(found) == views.most_views
