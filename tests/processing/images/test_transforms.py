import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models import clip

from mindvlm.core.errors import UserError
from mindvlm.processing.images import transforms
from mindvlm.processing.images.loading import load_image
from tests.golden_files import golden_path

RECORDED_RGB = ("wide", "tall", "square")
RECORDED = (*RECORDED_RGB, "gray", "rgba")
SAMPLED = slice(5, None, 16)
CROP = (slice(None), slice(480, 528), slice(500, 564))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(131, 90), (90, 131), (56, 56), (300, 57), (20, 31)])
def test_crop_is_the_clip_image_processor_of_transformers(size):
    processor_class = getattr(clip, "CLIPImageProcessorPil", None) or clip.CLIPImageProcessor
    processor = processor_class(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = np.asarray(processor(noise(*size), return_tensors="np")["pixel_values"][0])
    ours = transforms.normalize(transforms.crop_to_square(noise(*size), 56))
    assert ours.dtype == np.float32
    assert (ours == expected).all()


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 40))
def test_sizes(width, height, size):
    image = Image.new("RGB", (width, height))
    assert min(transforms.resize_shortest_edge(image, size).size) == size
    assert transforms.crop_to_square(image, size).size == (size, size)
    assert transforms.pad_to_square(image, size).size == (size, size)
    assert transforms.squash(image, size, 2 * size).size == (2 * size, size)
    assert max(transforms.keep_aspect(image, size).size) <= max(transforms.KEEP_LONGEST_EDGE, size)


def test_pad_keeps_the_picture_at_the_top_left():
    padded = np.asarray(transforms.pad_to_square(Image.new("RGB", (100, 50), "white"), 100))
    assert (padded[:45] == 255).all()
    assert (padded[55:] == [int(channel * 255) for channel in transforms.CLIP_MEAN]).all()


def test_normalize_puts_channels_first():
    array = transforms.normalize(Image.new("RGB", (5, 4), (255, 0, 51)), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.1))
    assert array.shape == (3, 4, 5) and array.dtype == np.float32
    assert np.allclose(array[:, 0, 0], [1.0, -2.0, -3.0], rtol=1e-6)
    scaled = transforms.normalize_scaled(
        Image.new("RGB", (5, 4), (255, 0, 51)), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.1)
    )
    assert np.allclose(scaled, array, rtol=1e-5)


def test_a_picture_like_a_thread_is_refused():
    with pytest.raises(UserError, match="1 x 400000: too narrow"):
        transforms.crop_to_square(Image.new("RGB", (1, 400000)), 224)


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden_path("vary/preprocess/outputs.npz"))


def recorded_image(name: str) -> Image.Image:
    return load_image(golden_path(f"vary/preprocess/{name}.png"))


@pytest.mark.parametrize("name", RECORDED)
def test_clip_pixels_are_the_original_ones(recorded, name):
    ours = transforms.normalize(transforms.crop_to_square(recorded_image(name), 224))
    assert (ours == recorded[f"clip_{name}"]).all()


@pytest.mark.parametrize("name", RECORDED)
def test_squashed_pixels_are_the_original_ones(recorded, name):
    ours = transforms.normalize(transforms.squash(recorded_image(name), 1024, 1024))
    assert (ours[:, SAMPLED, SAMPLED] == recorded[f"high_sample_{name}"]).all()
    assert (ours[CROP] == recorded[f"high_crop_{name}"]).all()
    assert np.allclose(ours.sum(axis=2, dtype=np.float64), recorded[f"high_row_sum_{name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", RECORDED_RGB)
def test_squashed_bytes_are_the_original_ones(name):
    ours = np.asarray(transforms.squash(recorded_image(name), 1024, 1024))
    assert (ours == np.asarray(Image.open(golden_path(f"vary/preprocess/{name}_high1024.png")))).all()


@pytest.mark.parametrize("name", RECORDED_RGB)
def test_keep_and_pad_pixels_are_the_original_ones(recorded, name):
    image = recorded_image(name)
    assert np.array_equal(transforms.normalize(transforms.keep_aspect(image, 224)), recorded[f"keep_{name}"])
    assert np.array_equal(transforms.normalize(transforms.pad_to_square(image, 224)), recorded[f"pad_{name}"])


@pytest.mark.parametrize("name", RECORDED_RGB)
def test_bilinear_pixels_are_the_original_ones(recorded, name):
    ours = transforms.normalize_scaled(transforms.squash_bilinear(recorded_image(name), 1024, 1024))
    assert (ours[:, SAMPLED, SAMPLED] == recorded[f"alb_sample_{name}"]).all()
    assert (ours[CROP] == recorded[f"alb_crop_{name}"]).all()
    assert np.allclose(ours.sum(axis=2, dtype=np.float64), recorded[f"alb_row_sum_{name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("size", "corner"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((3, 3), (0, 0))])
def test_a_picture_in_the_middle_of_a_square(size, corner):
    square = transforms.centre_on_square(Image.new("RGB", size, "white"), transforms.SIGLIP_MEAN)
    values = np.asarray(square)
    left, top = corner
    assert square.size == (max(size), max(size))
    assert (values[top : top + size[1], left : left + size[0]] == 255).all()
    assert (values == 255).sum() == 3 * size[0] * size[1] and set(np.unique(values)) <= {127, 255}


def test_a_square_of_a_thread_is_refused():
    with pytest.raises(UserError, match="too narrow to become a square of 20000 x 20000"):
        transforms.centre_on_square(Image.new("RGB", (20000, 1)))
