"""Random changes to training images that imitate damage to printed pages.

Kinds and probabilities are those of the original's training transform (Vary-tiny and Vary-base; Vary-toy's paper trains
without). Images are not flipped, and uncovered borders are white.
"""

import io
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageFilter

from mindvlm.core.errors import UserError

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
WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Probability of each change; changes are drawn independently and applied in this order."""

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
    """Applies random changes to an RGB image of unchanged size. The result depends on image, config and `rng` alone."""
    for name, change in _CHANGES.items():
        if rng.random() < getattr(config, name):
            image = change(image, rng)
    return image


def erode_or_dilate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Thickens dark strokes by 1 or 2 pixels, or thins them by 1 in one direction (more would erase small print)."""
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
    return affine(image, np.array([[1, x], [-y, 1]]))


def shift_scale_rotate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shifts by up to 4 % of the width and 3 % of the height, scales by 0.85 to 1.03, rotates by up to 2 degrees."""
    angle = np.radians(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    scale = rng.uniform(*SCALES)
    shift = rng.uniform(0, MAX_SHIFTS) * image.size
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return affine(image, turn / scale, -shift)


def grid_distortion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Stretches and squeezes the columns and rows of a grid of 5 x 5 cells."""
    columns, rows = (np.cumsum(1 + rng.uniform(-GRID_LIMIT, GRID_LIMIT, GRID_CELLS)) for _ in range(2))
    regular = np.arange(1, GRID_CELLS + 1)
    x = np.concatenate([[0], columns - regular]) * image.width / GRID_CELLS
    y = np.concatenate([[0], rows - regular]) * image.height / GRID_CELLS
    moves = np.stack(np.meshgrid(x, y), axis=-1)
    return displace(image, moves)


def elastic(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Displaces pixels by up to 3 pixels in random directions that vary smoothly."""
    shape = [max(1, edge // ELASTIC_CELL_PIXELS) + 1 for edge in (image.height, image.width)]
    coarse = [max(2, edge // 3) for edge in shape]
    moves = [
        np.asarray(Image.fromarray(noise.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
        for noise in rng.uniform(-ELASTIC_LIMIT_PIXELS, ELASTIC_LIMIT_PIXELS, (2, *coarse))
    ]
    return displace(image, np.stack(moves, axis=-1))


def brightness_contrast(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes both by up to 10 %."""
    contrast = 1 + rng.uniform(-CONTRAST_LIMIT, CONTRAST_LIMIT)
    brightness = 255 * rng.uniform(-BRIGHTNESS_LIMIT, BRIGHTNESS_LIMIT)
    table = np.clip(np.rint(np.arange(256) * contrast + brightness), 0, 255).astype(int).tolist()
    return image.point(table * 3)


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Compresses and decompresses as JPEG of quality 95."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def gaussian_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Adds noise of variance 0 to 20 to every value."""
    deviation = np.float32(rng.uniform(0, MAX_NOISE_VARIANCE) ** 0.5)
    noise = rng.standard_normal((image.height, image.width, 3), dtype=np.float32) * deviation
    return Image.fromarray(np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8))


def gaussian_blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blurs about as much as a window of 3 x 3 pixels."""
    return image.filter(ImageFilter.GaussianBlur(BLUR_RADIUS))


def affine(image: Image.Image, matrix: np.ndarray, shift: np.ndarray | tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """Takes every pixel from `matrix` @ (its position - centre) + centre + `shift`; uncovered areas become white.

    Args:
        matrix: (2, 2), for (x, y).
        shift: (x, y) in pixels.
    """
    centre = np.array([image.width / 2, image.height / 2])
    offset = centre - matrix @ centre + np.asarray(shift)
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform(
        image.size, Image.Transform.AFFINE, tuple(map(float, data)), Image.Resampling.BICUBIC, fillcolor=WHITE
    )


def displace(image: Image.Image, moves: np.ndarray) -> Image.Image:
    """Takes every pixel from its position plus a displacement, given at grid corners and linear between them.

    Args:
        moves: (rows + 1, columns + 1, 2), the displacement (x, y) in pixels at each corner of the cells.
    """
    num_rows, num_columns = moves.shape[0] - 1, moves.shape[1] - 1
    x = np.rint(np.linspace(0, image.width, num_columns + 1)).astype(int)
    y = np.rint(np.linspace(0, image.height, num_rows + 1)).astype(int)
    corners = np.stack(np.meshgrid(x, y), axis=-1) + moves
    mesh = []
    for row in range(num_rows):
        for column in range(num_columns):
            box = (int(x[column]), int(y[row]), int(x[column + 1]), int(y[row + 1]))
            if box[0] == box[2] or box[1] == box[3]:
                continue
            # Pillow's order: upper left, lower left, lower right, upper right
            around = ((row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1))
            mesh.append((box, tuple(float(value) for corner in around for value in corners[corner])))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC, fillcolor=WHITE)


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
