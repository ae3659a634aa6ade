"""Resizing, padding and normalization. Pictures are RGB PIL images, arrays float32 with channels first.

Resizing is Pillow's bicubic, as in `CLIPImageProcessor` and torchvision for PIL images, or OpenCV's bilinear.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PictureMode = Literal["Pad", "Default", "Crop", "Resize"]
CHAT_LONGEST, CHAT_SHORTEST, CHAT_RESIZED = 800, 400, 336
KEEP_LONGEST_EDGE = 448
OPENCV_COEFFICIENT_BITS = 11
MAX_RESIZED_PIXELS = 64 * 2**20
MAX_SQUARE_PIXELS = 256 * 2**20


def resize(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    *,
    rows_first: bool = False,
) -> Image.Image:
    """Resizes to (width, height).

    Args:
        rows_first: whether to resize along rows first, as Pillow does before version 13. Later versions choose the
            order, which changes the rounding between the two passes. A very long picture is resized as Pillow chooses.
    """
    if rows_first and size[0] * image.height <= MAX_RESIZED_PIXELS:
        image = image.resize((size[0], image.height), resample)
    return image.resize(size, resample)


def resize_shortest_edge(
    image: Image.Image,
    size: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    *,
    rows_first: bool = False,
) -> Image.Image:
    """Resizes the shortest edge to `size` and the other in proportion, rounded down; other arguments as in `resize`.

    Raises:
        UserError: the result would exceed MAX_RESIZED_PIXELS, for a long and narrow picture.
    """
    width, height = image.size
    longest = int(size * max(width, height) / min(width, height))
    if size * longest > MAX_RESIZED_PIXELS:
        raise UserError(f"image of {width} x {height}: too narrow to become {size} x {longest}; crop it")
    new_size = (size, longest) if width <= height else (longest, size)
    return resize(image, new_size, resample, rows_first=rows_first)


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crops the centre `height` x `width` of a picture that is at least as large."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def squash(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes to `height` x `width` without keeping the aspect ratio."""
    return image.resize((width, height), Image.Resampling.BICUBIC)


def squash_bilinear(image: Image.Image, height: int, width: int) -> Image.Image:
    """Like `squash`, with OpenCV's bilinear interpolation (no antialiasing)."""
    return Image.fromarray(resize_bilinear(np.asarray(image), height, width))


def crop_to_square(image: Image.Image, size: int, *, rows_first: bool = False) -> Image.Image:
    """Resizes the shortest edge to `size`, then crops the centre square (option `square` of LLaVA)."""
    return centre_crop(resize_shortest_edge(image, size, rows_first=rows_first), size, size)


def keep_aspect(image: Image.Image, size: int) -> Image.Image:
    """Resizes without cropping: longest edge at most 448, shortest at most `size` (option `keep`)."""
    aspect = max(image.size) / min(image.size)
    return resize_shortest_edge(image, max(1, int(min(KEEP_LONGEST_EDGE / aspect, size))))


def pad_to_square(image: Image.Image, size: int, mean: Sequence[float] = CLIP_MEAN) -> Image.Image:
    """Pads the picture to a square of the mean colour on the right or below, then resizes it (option `pad`)."""
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), eight_bit_colour(mean))
    square.paste(image, (0, 0))
    return crop_to_square(square, size)


def centre_on_square(image: Image.Image, mean: Sequence[float] = CLIP_MEAN) -> Image.Image:
    """Centres the picture on a square of the mean colour with its longer edge (the padding of LLaVA-1.5).

    Raises:
        UserError: the square would exceed MAX_SQUARE_PIXELS, for a long and narrow picture.
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


def chat_picture(image: Image.Image, mode: PictureMode = "Default") -> Image.Image:
    """Shrinks a picture as the chat front ends of LLaVA do: to at most 800 x 400 or 400 x 800 pixels.

    Args:
        mode: "Pad" first centres it on a square of CLIP's mean colour, "Resize" first resizes it to 336 x 336.
    """
    if mode == "Pad":
        image = centre_on_square(image)
    elif mode == "Resize":
        image = image.resize((CHAT_RESIZED, CHAT_RESIZED))
    aspect = max(image.size) / min(image.size)
    # a picture of 2000 x 1 pixels would get a width of 0
    short = max(1, int(min(CHAT_LONGEST / aspect, CHAT_SHORTEST, min(image.size))))
    long = int(short * aspect)
    return image.resize((short, long) if image.height > image.width else (long, short))


def eight_bit_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """Converts a colour from 0..1 to 0..255, rounded down."""
    return tuple(int(channel * 255) for channel in mean)


def normalize(image: Image.Image, *, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> np.ndarray:
    """Returns (3, h, w) float32: (value / 255 - mean) / std, every step in float32."""
    pixels = np.array(channels(image), np.float32)
    mean_column, std_column = (np.array(values, dtype=np.float32)[:, None, None] for values in (mean, std))
    pixels /= np.float32(255)
    pixels -= mean_column
    pixels /= std_column
    return pixels


def normalize_scaled(
    image: Image.Image, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> np.ndarray:
    """Returns (3, h, w) float32: (value - 255 mean) * (1 / (255 std)), albumentations' order of operations."""
    pixels = np.array(channels(image), np.float32)
    mean_column, std_column = (
        (np.array(values, dtype=np.float32) * np.float32(255))[:, None, None] for values in (mean, std)
    )
    pixels -= mean_column
    pixels *= np.reciprocal(std_column)
    return pixels


def channels(image: Image.Image) -> list[np.ndarray]:
    """Returns the red, green and blue values of an RGB picture, (height, width) uint8 each."""
    shape = image.height, image.width
    return [np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(shape) for channel in "RGB"]


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Reproduces `cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)` bit for bit, without OpenCV.

    OpenCV uses 11-bit fixed-point coefficients and drops 4 bits between the two passes. A reduction by exactly 2 in
    both directions is the mean of 2 x 2 pixels.

    Args:
        pixels: (h, w, channels) uint8.

    Returns:
        (height, width, channels) uint8.
    """
    old_height, old_width = pixels.shape[:2]
    if (old_height, old_width) == (2 * height, 2 * width):
        quads = pixels.reshape(height, 2, width, 2, -1).astype(np.uint16).sum(axis=(1, 3))
        return ((quads + 2) >> 2).astype(np.uint8)
    left, right, left_weight, right_weight = _taps(old_width, width, clamp_weights=True)
    top, bottom, top_weight, bottom_weight = _taps(old_height, height, clamp_weights=False)
    wide = pixels.astype(np.int32)
    rows = wide[:, left] * left_weight[None, :, None] + wide[:, right] * right_weight[None, :, None]
    rows >>= 4
    upper = (rows[top] * top_weight[:, None, None]) >> 16
    lower = (rows[bottom] * bottom_weight[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _taps(old: int, new: int, *, clamp_weights: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two source indices (int64) of every new index, and their weights in 1/2048 (int32).

    At the borders both indices are the same pixel. There OpenCV uses a single weight along rows (`clamp_weights`) but
    two weights along columns, whose products are rounded separately.
    """
    centre = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int64)
    fraction = centre - first.astype(np.float32)
    if clamp_weights:
        fraction[(first < 0) | (first >= old - 1)] = 0.0
    scale = np.float32(1 << OPENCV_COEFFICIENT_BITS)
    first_weight = np.rint((np.float32(1) - fraction) * scale).astype(np.int32)
    second_weight = np.rint(fraction * scale).astype(np.int32)
    return np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), first_weight, second_weight
