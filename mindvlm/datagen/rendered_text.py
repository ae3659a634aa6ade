"""Renders pictures of printed text on the fly: the training and evaluation data of Vary-nano, and its curriculum.

A picture shows one or two lines of up to 32 characters in total, in DejaVu Sans, Serif or Sans Mono of 14 to 40 pixels,
dark on lightly tinted paper, on a canvas up to 512 pixels wide with random margins. A sample depends on (seed, index,
split, difficulty) alone, so a run can be repeated, or resumed at any step. A checksum of its lower-case form assigns
every word of three or more characters to one split: evaluation words never occur in training.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mindvlm.core.errors import UserError

FONT_FILES = ("DejaVuSansMono.ttf", "DejaVuSans.ttf", "DejaVuSerif.ttf")
FONT_FOLDERS = (
    Path(__file__).resolve().parents[1] / "examples" / "fonts",
    Path(__file__).resolve().parents[2] / "examples" / "fonts",
    Path("/usr/share/fonts/truetype/dejavu"),
)
MAX_CHARACTERS = 32
MAX_WIDTH = 512
MIN_FONT_SIZE, MAX_FONT_SIZE = 14, 40
PUNCTUATION = ".,:;!?'\"-()/&%+=#@*$_"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
UPPER = LETTERS.upper()
DIGITS = "0123456789"
EVALUATION_SHARE = 8

# Successors of a letter, most frequent English bigrams first and repeated by weight; "^" starts a word.
_SUCCESSORS = {
    "^": "ttttaaassshhwwiiooobbccmmffppddrrllggnneeuuvyjkqz",
    "a": "nnnnttttrrrllllssscddmmppbbiiggvykuwfxz",
    "b": "eeeelllaaoouuurrriijsby",
    "c": "ooooohhhhheeeeaaattkkkllirrucy",
    "d": "eeeeeiiiiaaaooossrruudlygn",
    "e": "rrrrrnnnnnssssdddaaallltttcccmmveeixpfgywoqbhku",
    "f": "oooofffiiirrreeaatul",
    "g": "eeeehhhrrraaaiioouulsngy",
    "h": "eeeeeeaaaaiiiooottruy",
    "i": "nnnnnnttttssssooolllccceeddmmrgavfpbkzx",
    "j": "uuuooaae",
    "k": "eeeeiiisnalyo",
    "l": "eeeeelllliiiaaayyoodsutkvmf",
    "m": "eeeeaaaaooiiippmmubsy",
    "n": "ddddgggggtttteeeesssccoooiiaakknvufly",
    "o": "nnnnnrrrruuuuffmmmtttlllwwssoovdpkicbgaeyhxz",
    "p": "eeerrraaalllooopppiitthusy",
    "q": "uuuuuu",
    "r": "eeeeeiiiiaaaaoootttsssydumnnkclrgvpfb",
    "s": "ttttteeeeehhhiiissssooouuapckmlwnyq",
    "t": "hhhhhheeeeiiiiiooooaaatttrrrsuulywmcnz",
    "u": "rrrrnnnnttttsssslllppgccmmbdeiaafkxz",
    "v": "eeeeeeiiiaaao",
    "w": "aaaaiiiieeehhhooonsrl",
    "x": "pptiaecuo",
    "y": "oosseetpimabl",
    "z": "eeezaioly",
}


@dataclass(frozen=True)
class Difficulty:
    """What the pictures of one stage of the curriculum may contain. Sizes and margins are in pixels."""

    num_fonts: int = 3
    min_characters: int = 1
    max_characters: int = MAX_CHARACTERS
    two_lines: float = 0.35
    spaces: bool = True
    tints: bool = True
    min_font_size: int = MIN_FONT_SIZE
    max_margin: int = 250


FULL_DIFFICULTY = Difficulty()
"""Everything that the model should read; evaluation draws from it."""


@dataclass(frozen=True)
class RenderedText:
    """An RGB picture and the text on it; a newline separates lines."""

    image: Image.Image
    text: str


def in_split(word: str, split: str) -> bool:
    """Returns whether a word may occur in `split`; words of fewer than three characters may occur in both."""
    if len(word) < 3:
        return True
    held_out = zlib.crc32(word.lower().encode()) % EVALUATION_SHARE == 0
    return held_out == (split == "evaluation")


def _pick(rng: np.random.Generator, characters: str) -> str:
    return characters[int(rng.random() * len(characters))]


def _pseudo_word(rng: np.random.Generator, length: int) -> str:
    letters, previous = [], "^"
    for _ in range(length):
        previous = _pick(rng, LETTERS if rng.random() < 0.2 else _SUCCESSORS[previous])
        letters.append(previous)
    word = "".join(letters)
    case = rng.random()
    if case < 0.30:
        return word.capitalize()
    if case < 0.50:
        return word.upper()
    if case < 0.58:
        return "".join(c.upper() if rng.random() < 0.5 else c for c in word)
    return word


def _digits(rng: np.random.Generator, length: int) -> str:
    return "".join(_pick(rng, DIGITS) for _ in range(length))


def _number(rng: np.random.Generator, length: int) -> str:
    kind = int(rng.random() * 5)
    if kind == 0 and length >= 8:
        year = min(4, length - 6)
        return "".join(_digits(rng, count) + _pick(rng, "./-") for count in (2, 2)) + _digits(rng, year)
    if kind == 1 and length >= 5:
        return f"{_digits(rng, length - 4)}.{_digits(rng, 2)}{_pick(rng, '$%')}"
    if kind == 2 and length >= 5:
        return f"{_pick(rng, '$#+-')}{_digits(rng, length - 4)}{_pick(rng, '.,:')}{_digits(rng, 2)}"
    return _digits(rng, length)


def _word(rng: np.random.Generator, length: int, split: str) -> str:
    while True:
        kind = rng.random()
        if kind < 0.60:
            word = _pseudo_word(rng, length)
            if length > 2 and rng.random() < 0.2:
                word = word[:-1] + _pick(rng, ".,:;!?")
        elif kind < 0.78:
            word = _number(rng, length)
        else:
            alphabet = LETTERS + UPPER + DIGITS + PUNCTUATION
            word = "".join(_pick(rng, alphabet) for _ in range(length))
        if in_split(word, split):
            return word


def _line(rng: np.random.Generator, length: int, spaces: bool, split: str) -> str:
    words, left = [], length
    while left > 0:
        size = left if not spaces else min(left, 1 + int(rng.integers(0, 12)))
        if left - size == 1:
            size = left
        words.append(_word(rng, size, split))
        left -= size + 1
    return " ".join(words)


def random_text(rng: np.random.Generator, *, difficulty: Difficulty = FULL_DIFFICULTY, split: str = "training") -> str:
    """Returns one or two lines of words, numbers and single characters within the limits of `difficulty`."""
    total = int(rng.integers(difficulty.min_characters, difficulty.max_characters + 1))
    if total >= 2 and rng.random() < difficulty.two_lines:
        first = int(rng.integers(max(1, total // 4), max(2, total - total // 4)))
        parts = [first, total - first]
    else:
        parts = [total]
    return "\n".join(_line(rng, part, difficulty.spaces, split) for part in parts)


@lru_cache(maxsize=256)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns the font `name` at `size` pixels.

    Raises:
        UserError: the font is neither shipped nor installed in the system.
    """
    for folder in FONT_FOLDERS:
        if (folder / name).is_file():
            return ImageFont.truetype(str(folder / name), size, layout_engine=ImageFont.Layout.BASIC)
    raise UserError(f"font {name}: not found in {', '.join(map(str, FONT_FOLDERS))}; install fonts-dejavu-core")


def _tint(rng: np.random.Generator, tints: bool) -> tuple[np.ndarray, np.ndarray]:
    if not tints or rng.random() < 0.4:
        return np.full(3, 255.0), np.zeros(3)
    paper = 255 - rng.uniform(0, 35) - rng.uniform(0, 20, 3)
    ink = rng.uniform(0, 60) + rng.uniform(0, 40, 3)
    return paper, ink


def _ink_mask(lines: list[str], font: ImageFont.FreeTypeFont, spacing: int, shift: float) -> Image.Image:
    size = font.size
    widths = [font.getlength(line) for line in lines]
    indents = [shift * (max(widths) - width) for width in widths]
    height = size * 2 + (len(lines) - 1) * (size + spacing)
    mask = Image.new("L", (int(max(widths)) + 2 * size, height), 0)
    draw = ImageDraw.Draw(mask)
    for number, line in enumerate(lines):
        draw.text((size // 2 + indents[number], size // 3 + number * (size + spacing)), line, fill=255, font=font)
    return mask


def render(text: str, rng: np.random.Generator, *, difficulty: Difficulty = FULL_DIFFICULTY) -> RenderedText:
    """Draws `text` with a random font, size, tint and margins within the limits of `difficulty`."""
    lines = text.split("\n")
    name = FONT_FILES[int(rng.integers(0, difficulty.num_fonts))]
    widest = max(load_font(name, MAX_FONT_SIZE).getlength(line) for line in lines) / MAX_FONT_SIZE
    largest = int(min(MAX_FONT_SIZE, (MAX_WIDTH - 12) / max(widest, 1e-3)))
    size = int(rng.integers(min(difficulty.min_font_size, largest), largest + 1))
    font = load_font(name, size)
    shift = 0.0 if rng.random() < 0.7 else 0.5
    mask = _ink_mask(lines, font, int(size * rng.uniform(0.1, 0.5)), shift)
    mask = mask.crop(mask.getbbox() or (0, 0, 1, 1))
    room = max(1, MAX_WIDTH - mask.width)
    left, right = (int(m) for m in rng.uniform(0, 1, 2) ** 2 * min(room / 2, difficulty.max_margin))
    top, bottom = (int(m) for m in rng.uniform(0, 1, 2) ** 2 * difficulty.max_margin)
    canvas = Image.new("L", (mask.width + left + right, mask.height + top + bottom), 0)
    canvas.paste(mask, (left, top))
    paper, ink = _tint(rng, difficulty.tints)
    ramp = np.arange(256)[:, None] / 255.0 * (ink - paper)[None] + paper[None]
    tables = np.rint(ramp).astype(np.uint8)
    image = Image.merge("RGB", [canvas.point(tables[:, channel].tolist()) for channel in range(3)])
    return RenderedText(image=image, text=text)


def sample(seed: int, index: int, *, difficulty: Difficulty = FULL_DIFFICULTY, split: str = "training") -> RenderedText:
    """Returns picture `index` of the endless set `seed` of a split."""
    rng = np.random.Generator(np.random.PCG64([seed, index, int(split == "evaluation")]))
    return render(random_text(rng, difficulty=difficulty, split=split), rng, difficulty=difficulty)


# The processor crops margins before the model sees a picture; narrow ones are faster to draw.
TRAINING_MARGIN = 12

DIFFICULTIES = (
    Difficulty(
        num_fonts=1, min_characters=8, max_characters=8, two_lines=0, spaces=False, tints=False, min_font_size=22
    ),
    Difficulty(num_fonts=1, min_characters=3, max_characters=12, two_lines=0, spaces=False, min_font_size=18),
    Difficulty(num_fonts=3, min_characters=2, max_characters=16, two_lines=0.1),
    Difficulty(num_fonts=3, min_characters=1, max_characters=24, two_lines=0.25),
    Difficulty(),
)
TRAINING_DIFFICULTIES = tuple(Difficulty(**{**vars(one), "max_margin": TRAINING_MARGIN}) for one in DIFFICULTIES)

SMOOTHING = 0.95
MIN_STEPS_PER_STAGE = 50


@dataclass
class Curriculum:
    """Moves to the next stage, an index into `DIFFICULTIES`, when the smoothed loss falls below `threshold`.

    Every field is a plain number, so that a checkpoint can hold it.
    """

    threshold: float = 0.5
    stage: int = 0
    smoothed_loss: float = 10.0
    steps_in_stage: int = 0

    def update(self, loss: float) -> bool:
        """Receives the loss of one step; returns whether a new stage begins."""
        self.smoothed_loss = SMOOTHING * self.smoothed_loss + (1 - SMOOTHING) * loss
        self.steps_in_stage += 1
        is_last = self.stage == len(TRAINING_DIFFICULTIES) - 1
        if is_last or self.steps_in_stage < MIN_STEPS_PER_STAGE or self.smoothed_loss >= self.threshold:
            return False
        self.stage += 1
        self.steps_in_stage = 0
        # harder pictures raise the loss at once; the average lags behind and would skip a stage
        self.smoothed_loss = max(self.smoothed_loss, 2 * self.threshold)
        return True
