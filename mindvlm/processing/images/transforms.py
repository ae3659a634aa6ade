"""Pictures to normalised arrays. Pictures are RGB PIL images, arrays float32 with channels first.

Resizing is Pillow's bicubic, which is what `CLIPImageProcessor` and torchvision do with PIL images.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.processing.images.opencv_resize import resize_bilinear

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

KEEP_LONGEST_EDGE = 448
MAX_RESIZED_PIXELS = 64 * 2**20
MAX_SQUARE_PIXELS = 256 * 2**20


def resize_shortest_edge(image: Image.Image, size: int) -> Image.Image:
    """Shortest edge to `size`, the other in proportion, rounded down.

    Raises:
        UserError: the picture is so long and narrow that the result would have more than MAX_RESIZED_PIXELS.
    """
    width, height = image.size
    longest = int(size * max(width, height) / min(width, height))
    if size * longest > MAX_RESIZED_PIXELS:
        raise UserError(f"image of {width} x {height}: too narrow to become {size} x {longest}; crop it")
    new_size = (size, longest) if width <= height else (longest, size)
    return image.resize(new_size, Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle `height` x `width` of a picture that is at least as large."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def squash(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize to `height` x `width` whatever the aspect ratio."""
    return image.resize((width, height), Image.Resampling.BICUBIC)


def squash_bilinear(image: Image.Image, height: int, width: int) -> Image.Image:
    """As `squash`, with OpenCV's bilinear interpolation (no antialiasing): the transform of Vary-base and Vary-tiny."""
    return Image.fromarray(resize_bilinear(np.asarray(image), height, width))


def crop_to_square(image: Image.Image, size: int) -> Image.Image:
    """Option `square` of the original program: shortest edge to `size`, then the middle square."""
    return centre_crop(resize_shortest_edge(image, size), size, size)


def keep_aspect(image: Image.Image, size: int) -> Image.Image:
    """Option `keep`: nothing is cropped, the longest edge stays within 448 and the shortest within `size`."""
    aspect = max(image.size) / min(image.size)
    return resize_shortest_edge(image, max(1, int(min(KEEP_LONGEST_EDGE / aspect, size))))


def pad_to_square(image: Image.Image, size: int, mean: Sequence[float] = CLIP_MEAN) -> Image.Image:
    """Option `pad`: the picture at the top left of a square of the mean colour, then `crop_to_square`."""
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), eight_bit_colour(mean))
    square.paste(image, (0, 0))
    return crop_to_square(square, size)


def centre_on_square(image: Image.Image, mean: Sequence[float] = CLIP_MEAN) -> Image.Image:
    """The picture in the middle of a square of its longer edge, filled with the mean colour (LLaVA-1.5's padding).

    Raises:
        UserError: the picture is so long and narrow that the square would have more than MAX_SQUARE_PIXELS.
    """
    width, height = image.size
    edge = max(width, height)
    if edge * edge > MAX_SQUARE_PIXELS and width != height:
        raise UserError(f"image of {width} x {height}: too narrow to become a square of {edge} x {edge}; crop it")
    if width == height:
        return image
    square = Image.new("RGB", (edge, edge), eight_bit_colour(mean))
    square.paste(image, ((edge - width) // 2, (edge - height) // 2))
    return square


def eight_bit_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """A colour of 0..1 in 0..255, rounded down."""
    return tuple(int(channel * 255) for channel in mean)


def normalize(image: Image.Image, *, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> np.ndarray:
    """(3, h, w) float32: (value / 255 - mean) / std, every step in float32."""
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    mean_column, std_column = (np.array(values, dtype=np.float32)[:, None, None] for values in (mean, std))
    return np.ascontiguousarray((pixels - mean_column) / std_column)


def normalize_scaled(
    image: Image.Image, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> np.ndarray:
    """(3, h, w) float32: (value - 255 mean) * (1 / (255 std)), the order of operations of albumentations."""
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    mean_column, std_column = (
        (np.array(values, dtype=np.float32) * np.float32(255))[:, None, None] for values in (mean, std)
    )
    return np.ascontiguousarray((pixels - mean_column) * np.reciprocal(std_column))
