import numpy as np
import pytest
from PIL import Image

from mindvlm.processing.images.trimming import Page, pad_to_aspect, trim_margins

BOX = (30, 20, 90, 45)


def page(paper=(255, 255, 255), ink=(0, 0, 0), noise: float = 0.0, num_specks: int = 0) -> Image.Image:
    generator = np.random.default_rng(1)
    array = np.empty((100, 150, 3))
    array[:] = paper
    left, top, right, bottom = BOX
    array[top:bottom, left:right] = ink
    array[top + 5 : bottom - 5, left + 5 : right - 5] = paper
    array += generator.normal(0, noise, array.shape) if noise else 0
    for _ in range(num_specks):
        array[generator.integers(60, 98), generator.integers(2, 148)] = ink
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("noise", [0.0, 6.0, 12.0])
@pytest.mark.parametrize("paper", [(255, 255, 255), (235, 220, 190), (190, 210, 230)])
def test_the_box_is_found_on_tinted_and_noisy_paper(paper, noise):
    assert Page(page(paper=paper, ink=(40, 40, 60), noise=noise)).ink_box() == BOX


def test_specks_do_not_count():
    assert Page(page(num_specks=5)).ink_box() == BOX


def test_light_ink_on_dark_paper_is_found():
    assert Page(page(paper=(20, 20, 40), ink=(220, 220, 220))).ink_box() == BOX


def test_pale_ink_is_found():
    assert Page(page(paper=(250, 250, 250), ink=(200, 200, 200))).ink_box() == BOX


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_blank_paper_has_no_box_and_stays(noise):
    blank = page(ink=(255, 255, 255), noise=noise)
    assert Page(blank).ink_box() is None
    assert trim_margins(Page(blank)) is blank


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_tiny_pictures_are_left_alone(size):
    assert trim_margins(Page(Image.new("RGB", size))).size == size


def test_trimming_keeps_the_margin_that_is_there():
    assert trim_margins(Page(page())).size == (60, 25)
    assert trim_margins(Page(page()), margin=3).size == (66, 31)
    assert trim_margins(Page(page()), margin=1000).size == page().size


def test_trimming_does_not_depend_on_where_the_ink_stands():
    shifted = Image.new("RGB", (300, 200), "white")
    shifted.paste(page(), (77, 33))
    assert (np.asarray(trim_margins(Page(shifted))) == np.asarray(trim_margins(Page(page())))).all()


def test_padding_adds_paper_on_the_right_and_below():
    image = trim_margins(Page(page(paper=(235, 220, 190))), margin=8).resize((60, 25))
    wide = pad_to_aspect(image, 4.0, colour=(235, 220, 190))
    assert wide.size == (100, 25)
    assert (np.asarray(wide)[:, :60] == np.asarray(image)).all()
    assert (np.asarray(wide)[:, 60:] == (235, 220, 190)).all()
    high = pad_to_aspect(image, 0.0, max_aspect=1.0, colour=(1, 2, 3))
    assert high.size == (60, 60) and (np.asarray(high)[25:] == (1, 2, 3)).all()
    assert pad_to_aspect(image, 2.4, colour=(1, 2, 3)) is image


def test_a_tall_picture_is_made_smaller_before_it_becomes_huge():
    padded = pad_to_aspect(Image.new("RGB", (100, 20_000), "grey"), 8, colour=(1, 2, 3))
    assert padded.width * padded.height <= 1.01 * 2**26 and padded.width >= 8 * padded.height


def test_paper_is_the_most_common_ground():
    assert Page(page(paper=(235, 220, 190))).paper == (235, 220, 190)


@pytest.mark.parametrize("highest", [255, 70, 25])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (8, 5), (67, 40)])
def test_paper_and_ink_are_those_of_their_definitions(size, highest):
    width, height = size
    values = np.random.default_rng(highest).integers(0, highest + 1, (height, width, 3))
    values[: height // 2] //= 4
    shown = Page(Image.fromarray(values.astype(np.uint8)))

    paper = np.floor(np.median(values, axis=(0, 1)))
    assert shown.paper == tuple(paper)

    distance = np.abs(values - paper)
    assert np.abs(np.subtract(shown.ink_colour(), paper)).sum() == distance.sum(axis=2).max()
    difference = distance.max(axis=2)
    above, beside = np.minimum(difference[1:], difference[:-1]), np.minimum(difference[:, 1:], difference[:, :-1])
    is_dark = difference >= max(24, 0.35 * max([*above.flat, *beside.flat], default=0))
    neighbours = np.lib.stride_tricks.sliding_window_view(np.pad(is_dark, 1), (3, 3)).sum(axis=(2, 3))
    assert (shown.is_ink == (is_dark & (neighbours >= 3))).all()
