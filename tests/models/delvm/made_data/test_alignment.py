"""Squares: the original's crops, and copies in which a picture and its label stay aligned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.alignment import (
    RATIOS,
    SIX,
    WHOLE,
    Source,
    changed,
    generator,
    random_box,
    six_boxes,
    squares_of,
)
from mindvlm.processing.samples.public_data import Unusable

SIDES = st.integers(1, 120)


def coordinates(width, height):
    """Returns two pictures, which have x and y of each pixel as colours."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return [Image.fromarray(np.stack((columns, rows, blue), -1)) for blue in (columns * 0, columns * 0 + 255)]


@given(SIDES, SIDES, st.integers(0, 2**32))
@settings(max_examples=60)
def test_changed_pictures_show_the_same_places(width, height, seed):
    picture, label = changed(coordinates(width, height), np.random.default_rng(seed), 16)
    assert picture.size == label.size == (16, 16)
    one, two = np.asarray(picture).astype(int), np.asarray(label).astype(int)
    assert (one[..., :2] == two[..., :2]).all() and (one[..., 2] == 0).all() and (two[..., 2] == 255).all()
    # x changes along rows alone, y along columns alone: no other turn than by 180 degrees
    assert (one[..., 0] == one[:1, :, 0]).all() and (one[..., 1] == one[:, :1, 1]).all()


def test_all_directions_occur():
    (picture, _), found = coordinates(100, 100), set()
    for seed in range(40):
        pixels = np.asarray(changed([picture], np.random.default_rng(seed), 16)[0]).astype(int)
        found.add((pixels[0, 0, 0] < pixels[0, -1, 0], pixels[0, 0, 1] < pixels[-1, 0, 1]))
    assert len(found) == 4


@given(SIDES, SIDES, st.integers(0, 2**32))
def test_random_boxes_lie_within(width, height, seed):
    left, top, right, bottom = random_box(np.random.default_rng(seed), width, height)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_boxes_vary_as_torchvisions_do():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(rng, 1000, 1000) for _ in range(2000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares, ratios = widths * heights / 1e6, widths / heights
    assert 0.078 < shares.min() < 0.1 and 0.95 < shares.max() <= 1
    assert RATIOS[0] - 0.01 < ratios.min() < 0.77 and 1.3 < ratios.max() < RATIOS[1] + 0.01


@given(SIDES, SIDES, st.integers(1, 150))
def test_six_crops_are_squares_at_the_borders(width, height, crop):
    boxes = six_boxes(width, height, crop)
    edge = min(width, height, crop)
    assert len(boxes) == 6 and all((r - left, b - top) == (edge, edge) for left, top, r, b in boxes)
    assert {box[:2] for box in boxes} >= {(x, y) for x in (0, width - edge) for y in (0, height - edge)}


def test_six_crops_have_the_original_order():
    assert [box[:2] for box in six_boxes(1000, 860)] == [(0, 0), (200, 0), (100, 0), (0, 60), (200, 60), (100, 60)]
    assert [box[:2] for box in six_boxes(300, 420, 200)] == [
        *((0, 0), (100, 0), (0, 110), (100, 110), (0, 220), (100, 220))
    ]
    # a picture smaller than the crop gives squares of its shortest edge
    assert six_boxes(300, 420)[2] == (0, 60, 300, 360)


def source_of(name, *pictures):
    return Source(name, ("_img", "_label"), lambda: pictures)


def test_names_follow_parts_and_copies():
    (item,) = squares_of([source_of("a", *coordinates(90, 60))], SIX, size=16, num_copies=2, seed=1)
    names = [f"a_crop{part}{copy}" for copy in ("", "_copy1", "_copy2") for part in range(1, 7)]
    assert item.groups == [[f"{name}_img", f"{name}_label"] for name in names]
    groups = item.load()
    assert len(groups) == 18 and all(picture.size == (16, 16) for group in groups for picture in group)
    first = [np.asarray(group[0]) for group in groups]
    assert (first[0] != first[6]).any() and (first[6] != first[12]).any()


def test_copies_depend_on_seed_name_and_number_alone():
    def pixels(name, seed, num_copies, others=()):
        sources = [*others, source_of(name, *coordinates(90, 60))]
        item = squares_of(sources, WHOLE, size=16, num_copies=num_copies, seed=seed)[-1]
        return [np.asarray(picture).tobytes() for group in item.load() for picture in group]

    known = pixels("a", 1, 1)
    assert pixels("a", 1, 3, [source_of("b")])[:4] == known
    assert pixels("b", 1, 1)[:2] == known[:2] and pixels("b", 1, 1)[2:] != known[2:]
    assert pixels("a", 2, 1)[2:] != known[2:]
    assert generator(1, "a").random() != generator(1, "a", 1).random()


def test_sources_of_one_name_get_others_and_none_leads_out():
    sources = [source_of(name) for name in ("a", "b", "a", "a_2", "a")]
    items = squares_of(sources, WHOLE, size=16, num_copies=0, seed=1)
    assert [item.name for item in items] == ["a", "b", "a_2", "a_2_2", "a_3"]
    # the second is neither the copy of the first nor its own copy
    items = squares_of([source_of("a"), source_of("a_copy1")], WHOLE, size=16, num_copies=1, seed=1)
    names = [name for item in items for group in item.groups for name in group]
    assert len(set(names)) == len(names) == 8
    for name in ("../a", "a/../../b", "/a", "a//b", ""):
        with pytest.raises(UserError, match="leads out"):
            squares_of([source_of(name)], WHOLE, size=16, num_copies=0, seed=1)


def test_pictures_that_cannot_be_aligned_or_resized_say_why():
    one, two = coordinates(40, 30)
    for pictures, reason in (
        ((one, two.resize((41, 30))), "differ in size"),
        ((one.resize((60000, 1)),), "too narrow"),
    ):
        (item,) = squares_of(
            [Source("a", ("",), lambda pictures=pictures: pictures)], WHOLE, size=64, num_copies=0, seed=1
        )
        with pytest.raises(Unusable, match=reason):
            item.load()
