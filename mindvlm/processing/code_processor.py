"""Pictures of a model that generates codes of pictures: its processor, example pairs, labelled grids."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mindvlm.core.errors import UserError
from mindvlm.processing.images.loading import ImageSource

PICTURE, LABEL = "_img", "_label"
CAPTION_HEIGHT, MARGIN = 16, 4


class CodeProcessor(ABC):
    """Converts pictures to the pixels of a model that generates codes of pictures, and back."""

    @abstractmethod
    def squared(self, source: ImageSource) -> Image.Image:
        """Returns a picture as the model sees it. Raises UserError if it cannot be read."""

    @abstractmethod
    def pixels(self, source: ImageSource) -> np.ndarray:
        """Returns the pixels (3, height, width) float32 of a picture. Raises UserError if it cannot be read."""

    @abstractmethod
    def picture(self, pixels: np.ndarray) -> Image.Image:
        """Returns the picture of pixels (3, height, width) float32."""


def find_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """Returns the pairs NAME_img and NAME_label of pictures in a folder, by name.

    Raises:
        UserError: the folder does not exist or holds no pair, or a picture has no partner, two, or another name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of pairs NAME{PICTURE}.png and NAME{LABEL}.png")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        is_named = path.stem.endswith((PICTURE, LABEL))
        if not is_named and path.suffix.lower() in Image.registered_extensions():
            raise UserError(
                f"{path}: is no NAME{PICTURE} or NAME{LABEL}, as pictures in a folder of pairs are named; rename or "
                "remove it"
            )
        if is_named and files.setdefault(path.stem, path) is not path:
            raise UserError(f"{folder}: holds {files[path.stem].name} and {path.name}; remove one of them")
    pictures = {stem.removesuffix(PICTURE): path for stem, path in files.items() if stem.endswith(PICTURE)}
    labels = {stem.removesuffix(LABEL): path for stem, path in files.items() if stem.endswith(LABEL)}
    alone = sorted(pictures.keys() ^ labels.keys())
    if alone:
        there, missing = (PICTURE, LABEL) if alone[0] in pictures else (LABEL, PICTURE)
        raise UserError(
            f"{folder}: holds {files[alone[0] + there].name} but no {alone[0]}{missing} beside it; add its partner or "
            "remove it"
        )
    if not pictures:
        raise UserError(f"{folder}: holds no pairs NAME{PICTURE}.png and NAME{LABEL}.png; give the folder of some")
    return [(pictures[name], labels[name]) for name in sorted(pictures)]


def labelled_grid(rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """Returns one picture of rows of equally large pictures, each under its caption."""
    width, height = rows[0][0][1].size
    step = width + MARGIN, height + CAPTION_HEIGHT + MARGIN
    grid = Image.new("RGB", (max(map(len, rows)) * step[0] + MARGIN, len(rows) * step[1] + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    for line, row in enumerate(rows):
        for column, (caption, picture) in enumerate(row):
            left, top = MARGIN + column * step[0], MARGIN + line * step[1]
            draw.text((left, top), caption, fill="black")
            grid.paste(picture, (left, top + CAPTION_HEIGHT))
    return grid
