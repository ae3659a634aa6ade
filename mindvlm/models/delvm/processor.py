"""From pictures to the pixels of the VQGAN, and back."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mindvlm.processing.code_processor import CodeProcessor
from mindvlm.processing.images.loading import ImageSource, load_image
from mindvlm.processing.images.transforms import resize_shortest_edge


@dataclass(kw_only=True)
class DelvmProcessorConfig:
    """`size`: edge of a picture in pixels; None for that of the model, the only one allowed."""

    size: int | None = None


class DelvmProcessor(CodeProcessor):
    """Brings pictures to a square and gives pixels in 0..1 without normalization.

    A picture with transparency is resized with it, as in the original demo, and then loses it: edges of transparent
    areas get other colours than without transparency.
    """

    def __init__(self, config: DelvmProcessorConfig):
        self.size = config.size

    def squared(self, source: ImageSource) -> Image.Image:
        """Returns the picture with its shortest edge resized to `size`, cut to the centre square, as RGB.

        Raises:
            UserError: the picture cannot be read.
        """
        whole = load_image(source, keep_alpha=True)
        image = resize_shortest_edge(whole, self.size, Image.Resampling.BILINEAR)
        # torchvision rounds half a pixel to the even neighbour
        left, top = (round((edge - self.size) / 2) for edge in image.size)
        image = image.crop((left, top, left + self.size, top + self.size))
        return Image.fromarray(np.asarray(image)[..., :3]) if image.mode == "RGBA" else image

    def pixels(self, source: ImageSource) -> np.ndarray:
        """Returns the pixels (3, size, size) float32 of a picture. Raises UserError if it cannot be read."""
        square = np.asarray(self.squared(source), np.float32) / np.float32(255)
        return np.ascontiguousarray(square.transpose(2, 0, 1))

    def picture(self, pixels: np.ndarray) -> Image.Image:
        """Returns the picture of pixels (3, height, width): limited to 0..1, times 255, rounded down."""
        limited = np.clip(pixels, 0, 1).transpose(1, 2, 0) * np.float32(255)
        return Image.fromarray(limited.astype(np.uint8))
