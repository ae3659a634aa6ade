"""The fonts that pages and charts are set in."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ImageFont

from mindvlm.core.errors import UserError
from mindvlm.datagen.font_coverage import covered_characters
from mindvlm.datagen.rendered_text import FONT_FILES, FONT_FOLDERS

FONT_ENDINGS = (".ttf", ".otf", ".ttc")
ENOUGH = 0.98
CHINESE_REMEDY = "give a folder of fonts that have it: --fonts FOLDER (Debian: fonts-noto-cjk or fonts-wqy-microhei)"


class FontSet:
    """Font files and what they cover.

    Args:
        paths: of font files.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)

    def pick(self, text: str, rng: np.random.Generator) -> tuple[str, str]:
        """A random font that has (nearly) all characters of `text`, and the text without those that it lacks.

        If no font has enough of them, the one that has most is taken.
        """
        counts = Counter(text)
        shares = [self.share(path, counts) for path in self.paths]
        enough = [path for path, share in zip(self.paths, shares, strict=True) if share >= min(max(shares), ENOUGH)]
        path = enough[int(rng.integers(len(enough)))]
        return path, "".join(c for c in text if c.isspace() or c in characters_of(path))

    def share(self, path: str, counts: Counter) -> float:
        """Share of the characters that a font has."""
        covered = characters_of(path)
        return sum(n for c, n in counts.items() if c.isspace() or c in covered) / max(1, counts.total())

    def check(self, counts: Counter, source: str) -> None:
        """Raises UserError unless some font has enough of the characters, as of one page of `source`."""
        shares = {path: self.share(path, counts) for path in self.paths}
        best = max(shares, key=shares.get)
        if shares[best] < ENOUGH:
            missing = next(c for c, _ in counts.most_common() if not c.isspace() and c not in characters_of(best))
            raise UserError(f"{source}: no font has {missing!r} (U+{ord(missing):04X}); {CHINESE_REMEDY}")


def find_fonts(folder: str | Path | None = None) -> FontSet:
    """The shipped DejaVu fonts and all usable font files in `folder` and below it.

    Raises:
        UserError: the folder is missing or has no font that can be used.
    """
    shipped = next((f for f in FONT_FOLDERS if all((f / name).is_file() for name in FONT_FILES)), None)
    paths = [shipped / name for name in FONT_FILES] if shipped else []
    if folder is not None:
        if not Path(folder).is_dir():
            raise UserError(f"fonts folder {folder}: not found; give a folder of {', '.join(FONT_ENDINGS)} files")
        own = [path for path in Path(folder).rglob("*") if path.suffix.lower() in FONT_ENDINGS and _is_usable(path)]
        if not own:
            raise UserError(f"fonts folder {folder}: holds no {', '.join(FONT_ENDINGS)} file that can be used")
        paths += sorted(own)
    if not paths:
        raise UserError("no fonts are installed with the library; give a folder of fonts: --fonts FOLDER")
    return FontSet([str(path) for path in paths])


def _is_usable(path: Path) -> bool:
    """Outline fonts with a Unicode table are; fonts of bitmaps and of symbols with a coding of their own are not."""
    try:
        return bool(characters_of(str(path))) and load_font(str(path), 20).getlength("x") > 0
    except UserError:
        return False


@lru_cache(maxsize=512)
def characters_of(path: str) -> frozenset[str]:
    return covered_characters(path)


@lru_cache(maxsize=512)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at `size` pixels. Raises UserError if Pillow cannot use it."""
    try:
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(f"font {path}: cannot be used ({error}); take the file out of the fonts folder") from None


def is_chinese(text: Iterable[str]) -> bool:
    """Whether a third or more of the letters are Chinese."""
    letters = [c for c in text if c.isalpha()]
    return 3 * sum("\u3400" <= c <= "\u9fff" for c in letters) >= max(1, len(letters))
