"""Damage that printed pages suffer, as random changes to training pictures.

Kinds and probabilities are those of the original's training transform (Vary-tiny and Vary-base; the paper of Vary-toy
trains without). There is no flip, and what comes into view at the borders is white.
"""

import io
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageFilter

from mindvlm.core.errors import UserError
from mindvlm.training.datasets import warps

MAX_SHEAR_DEGREES = 3.0
MAX_ROTATION_DEGREES = 2.0
SCALES = (0.85, 1.03)
MAX_SHIFTS = (0.04, 0.03)
GRID_CELLS, GRID_LIMIT = 5, 0.05
ELASTIC_CELL_PIXELS, ELASTIC_LIMIT_PIXELS = 24, 3.0
CONTRAST_LIMIT = BRIGHTNESS_LIMIT = 0.1
JPEG_QUALITY = 95
MAX_NOISE_VARIANCE = 20.0
BLUR_RADIUS = 0.8


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Probability of each change; they are drawn independently and applied in this order."""

    erosion_or_dilation: float = 0.02
    shear: float = 0.03
    shift_scale_rotate: float = 0.03
    grid_distortion: float = 0.04
    elastic: float = 0.04
    brightness_contrast: float = 0.03
    jpeg: float = 0.07
    gaussian_noise: float = 0.08
    gaussian_blur: float = 0.03

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not 0 <= value <= 1:
                raise UserError(f"data.augment.{f.name} is {value}; expected a probability from 0 to 1")


def augment(image: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """The RGB picture with random changes; its size stays. The result depends on picture, config and `rng` alone."""
    for name, change in _CHANGES.items():
        if rng.random() < getattr(config, name):
            image = change(image, rng)
    return image


def erode_or_dilate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Thickens dark strokes by 1 or 2 pixels, or thins them by 1 in one direction (more would wipe small print out)."""
    pixels = np.asarray(image)
    thicken = rng.random() < 0.5
    extreme = np.minimum if thicken else np.maximum
    for axis, num_pixels in enumerate(rng.integers(1, 3, 2) if thicken else rng.permutation(2)):
        for _ in range(num_pixels):
            edge = pixels.take([0], axis)
            shifted = np.concatenate([edge, pixels[:-1] if axis == 0 else pixels[:, :-1]], axis)
            pixels = extreme(pixels, shifted)
    return Image.fromarray(pixels)


def shear(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Slants both axes by up to 3 degrees."""
    x, y = np.tan(np.radians(rng.uniform(0, MAX_SHEAR_DEGREES, 2)))
    return warps.affine(image, np.array([[1, x], [-y, 1]]))


def shift_scale_rotate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Moves by up to 4 % of the width and 3 % of the height, scales by 0.85 to 1.03, turns by up to 2 degrees."""
    angle = np.radians(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    scale = rng.uniform(*SCALES)
    shift = rng.uniform(0, MAX_SHIFTS) * image.size
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return warps.affine(image, turn / scale, -shift)


def grid_distortion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Stretches and squeezes the columns and rows of a grid of 5 x 5 cells."""
    columns, rows = (np.cumsum(1 + rng.uniform(-GRID_LIMIT, GRID_LIMIT, GRID_CELLS)) for _ in range(2))
    regular = np.arange(1, GRID_CELLS + 1)
    x = np.concatenate([[0], columns - regular]) * image.width / GRID_CELLS
    y = np.concatenate([[0], rows - regular]) * image.height / GRID_CELLS
    moves = np.stack(np.meshgrid(x, y), axis=-1)
    return warps.displace(image, moves)


def elastic(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Moves the picture by up to 3 pixels in a random direction that changes smoothly from place to place."""
    shape = [max(1, edge // ELASTIC_CELL_PIXELS) + 1 for edge in (image.height, image.width)]
    coarse = [max(2, edge // 3) for edge in shape]
    moves = [
        np.asarray(Image.fromarray(noise.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
        for noise in rng.uniform(-ELASTIC_LIMIT_PIXELS, ELASTIC_LIMIT_PIXELS, (2, *coarse))
    ]
    return warps.displace(image, np.stack(moves, axis=-1))


def brightness_contrast(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Up to 10 % more or less of both."""
    contrast = 1 + rng.uniform(-CONTRAST_LIMIT, CONTRAST_LIMIT)
    brightness = 255 * rng.uniform(-BRIGHTNESS_LIMIT, BRIGHTNESS_LIMIT)
    table = np.clip(np.rint(np.arange(256) * contrast + brightness), 0, 255).astype(int).tolist()
    return image.point(table * 3)


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """What JPEG of quality 95 leaves of it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def gaussian_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Noise of variance 0 to 20 on every value."""
    deviation = np.float32(rng.uniform(0, MAX_NOISE_VARIANCE) ** 0.5)
    noise = rng.standard_normal((image.height, image.width, 3), dtype=np.float32) * deviation
    return Image.fromarray(np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8))


def gaussian_blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A blur about as wide as a window of 3 x 3 pixels."""
    return image.filter(ImageFilter.GaussianBlur(BLUR_RADIUS))


_CHANGES = {
    "erosion_or_dilation": erode_or_dilate,
    "shear": shear,
    "shift_scale_rotate": shift_scale_rotate,
    "grid_distortion": grid_distortion,
    "elastic": elastic,
    "brightness_contrast": brightness_contrast,
    "jpeg": jpeg,
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": gaussian_blur,
}
