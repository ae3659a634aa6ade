"""The fonts of pages and charts, and the characters that each of them has."""

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ImageFont

from mindvlm.core.errors import UserError
from mindvlm.datagen.rendered_text import FONT_FILES, FONT_FOLDERS

FONT_ENDINGS = (".ttf", ".otf", ".ttc")
ENOUGH = 0.98
# (platform, encoding) of the Unicode tables of a font, best first
_UNICODE_TABLES = {(3, 10): 0, (0, 6): 1, (0, 4): 2, (3, 1): 3, (0, 3): 4, (0, 2): 5, (0, 1): 6, (0, 0): 7}
CHINESE_REMEDY = "give a folder of fonts that have it: --fonts FOLDER (Debian: fonts-noto-cjk or fonts-wqy-microhei)"


class FontSet:
    """Font files, chosen by the characters they have.

    Args:
        paths: of font files.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)

    def pick(self, text: str, rng: np.random.Generator) -> tuple[str, str]:
        """Returns a random font with (nearly) all characters of `text`, and the text without those it lacks.

        If no font has enough of them, returns the one that has most.
        """
        counts = Counter(text)
        shares = [self.share(path, counts) for path in self.paths]
        enough = [path for path, share in zip(self.paths, shares, strict=True) if share >= min(max(shares), ENOUGH)]
        path = enough[int(rng.integers(len(enough)))]
        return path, "".join(c for c in text if c.isspace() or c in characters_of(path))

    def share(self, path: str, counts: Counter) -> float:
        """Returns the share of the characters that a font has."""
        covered = characters_of(path)
        return sum(n for c, n in counts.items() if c.isspace() or c in covered) / max(1, counts.total())

    def check(self, counts: Counter, source: str) -> None:
        """Raises UserError, which names `source`, unless some font has enough of the characters."""
        shares = {path: self.share(path, counts) for path in self.paths}
        best = max(shares, key=shares.get)
        if shares[best] < ENOUGH:
            missing = next(c for c, _ in counts.most_common() if not c.isspace() and c not in characters_of(best))
            raise UserError(f"{source}: no font has {missing!r} (U+{ord(missing):04X}); {CHINESE_REMEDY}")


def find_fonts(folder: str | Path | None = None) -> FontSet:
    """Returns the shipped DejaVu fonts and all usable font files in and below `folder`.

    Raises:
        UserError: the folder is missing or has no usable font.
    """
    shipped = next((f for f in FONT_FOLDERS if all((f / name).is_file() for name in FONT_FILES)), None)
    paths = [shipped / name for name in FONT_FILES] if shipped else []
    if folder is not None:
        if not Path(folder).is_dir():
            raise UserError(f"fonts folder {folder}: not found; give a folder of {', '.join(FONT_ENDINGS)} files")
        own = [path for path in Path(folder).rglob("*") if path.suffix.lower() in FONT_ENDINGS and _is_usable(path)]
        if not own:
            raise UserError(
                f"fonts folder {folder}: holds no {', '.join(FONT_ENDINGS)} file that can be used; choose another"
            )
        paths += sorted(own)
    if not paths:
        raise UserError("no fonts are installed with the library; give a folder of fonts: --fonts FOLDER")
    return FontSet([str(path) for path in paths])


def _is_usable(path: Path) -> bool:
    """Outline fonts with a Unicode table are usable; bitmap fonts and symbol fonts with their own encoding are not."""
    try:
        return bool(characters_of(str(path))) and load_font(str(path), 20).getlength("x") > 0
    except UserError:
        return False


@lru_cache(maxsize=512)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns a font at `size` pixels. Raises UserError if Pillow cannot read it."""
    try:
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(f"font {path}: cannot be used ({error}); remove the file from the fonts folder") from None


def is_chinese(text: Iterable[str]) -> bool:
    """Returns whether a third or more of the letters are Chinese."""
    letters = [c for c in text if c.isalpha()]
    return 3 * sum("\u3400" <= c <= "\u9fff" for c in letters) >= max(1, len(letters))


@lru_cache(maxsize=512)
def characters_of(path: str) -> frozenset[str]:
    """Returns the characters with a glyph, by the cmap table (OpenType, formats 4 and 12); of a collection, those of
    its first font.

    Raises:
        UserError: the file is not a font, or has no Unicode table.
    """
    try:
        data = Path(path).read_bytes()
        start = struct.unpack_from(">I", data, 12)[0] if data[:4] == b"ttcf" else 0
        cmap = _table(data, start, b"cmap")
        subtables = [struct.unpack_from(">HHI", data, cmap + 4 + 8 * i) for i in range(_uint16(data, cmap + 2))]
        ranks = [(_UNICODE_TABLES.get((system, encoding)), offset) for system, encoding, offset in subtables]
        known = [(rank, offset) for rank, offset in ranks if rank is not None]
        for _, offset in sorted(known):
            read = {4: _format_4, 12: _format_12}.get(_uint16(data, cmap + offset))
            if read:
                return frozenset(chr(code) for code in read(data, cmap + offset) if not 0xD800 <= code < 0xE000)
    except (OSError, struct.error, ValueError, StopIteration):
        pass
    raise UserError(f"font {path}: its character table cannot be read; remove the file from the fonts folder")


def _uint16(data: bytes, position: int) -> int:
    return struct.unpack_from(">H", data, position)[0]


def _table(data: bytes, start: int, tag: bytes) -> int:
    records = (struct.unpack_from(">4sIII", data, start + 12 + 16 * i) for i in range(_uint16(data, start + 4)))
    return next(offset for name, _, offset, _ in records if name == tag)


def _format_4(data: bytes, start: int) -> list[int]:
    count = _uint16(data, start + 6) // 2
    arrays = [np.frombuffer(data, ">u2", count, start + 14 + skip) for skip in (0, 2 * count + 2, 4 * count + 2)]
    ends, firsts, deltas = (array.astype(int).tolist() for array in arrays)
    offsets_at = start + 16 + 6 * count
    offsets = np.frombuffer(data, ">u2", count, offsets_at).tolist()
    codes = []
    for i, (first, end, delta, offset) in enumerate(zip(firsts, ends, deltas, offsets, strict=True)):
        for code in range(first, min(end, 0xFFFE) + 1):
            glyph = (code + delta) & 0xFFFF
            if offset:
                glyph = _uint16(data, offsets_at + 2 * i + offset + 2 * (code - first))
            if glyph:
                codes.append(code)
    return codes


def _format_12(data: bytes, start: int) -> list[int]:
    (count,) = struct.unpack_from(">I", data, start + 12)
    groups = np.frombuffer(data, ">u4", 3 * count, start + 16).reshape(count, 3).tolist()
    return [
        code for first, end, glyph in groups for code in range(first, min(end, 0x10FFFF) + 1) if glyph + code - first
    ]
