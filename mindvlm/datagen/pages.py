"""Makes document pages with the text on them."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mindvlm.core.errors import UserError
from mindvlm.datagen.dataset import MadeSample, pick
from mindvlm.datagen.fonts import FontSet, find_fonts, is_chinese, load_font
from mindvlm.datagen.line_breaking import Line, break_lines
from mindvlm.datagen.text_source import TextSource

ENGLISH_QUESTIONS = (
    "Provide the OCR results of this image.",
    "Provide the ocr results of this image.",
    "Read all the text in this image.",
    "What is written on this page?",
    "Transcribe the text of this page.",
    "Extract the text from this image.",
    "Write down everything that the page says.",
    "Please recognize the text in the picture.",
    "Output all words that you can see in this image.",
    "Give me the full text of this document.",
)
CHINESE_QUESTIONS = (
    "写出这幅图中所有文字。",
    "请识别图中的文字。",
    "这一页上写了什么？",
    "提取这张图片里的全部文字。",
    "请把这页文档的内容完整地抄写下来。",
    "读出图片中的文字。",
    "给出这幅图的文字识别结果。",
    "图中的文字是什么？",
    "请输出这张图片中的所有内容。",
    "把这幅图转成文本。",
)
TITLE_SHARE, RULE_SHARE, JUSTIFIED_SHARE, PLAIN_SHARE = 0.35, 0.3, 0.5, 0.4
MAX_TITLE_CHARACTERS = 40


@dataclass(kw_only=True)
class PageOptions:
    """The look of pages.

    Attributes:
        text: files to take the text from.
        fonts: folder of further fonts.
        size: (width, height) in pixels.
        columns: column counts to choose from.
        font_sizes: (smallest, largest) in pixels.
        max_characters: on a page; 0 fills it.
        line_breaks: "join" writes a paragraph as one line of the answer, "keep" keeps the lines of the page.

    Raises:
        UserError: a size is out of range, or the columns are too narrow for the font.
    """

    text: list[str]
    fonts: str | None = None
    size: list[int] = field(default_factory=lambda: [1000, 1414])
    columns: list[int] = field(default_factory=lambda: [1, 2])
    font_sizes: list[int] = field(default_factory=lambda: [16, 28])
    max_characters: int = 0
    line_breaks: str = "join"

    def __post_init__(self) -> None:
        width, height = self.size
        smallest, largest = self.font_sizes
        if min(width, height) < 64 or max(width, height) > 8192:
            raise UserError(f"size {width} x {height}: expected 64 to 8192 pixels each")
        if not 6 <= smallest <= largest or min(self.columns) < 1 or self.max_characters < 0:
            raise UserError(
                "font_sizes must rise from at least 6; columns must be at least 1, max_characters at least 0"
            )
        if 0.85 * width / max(self.columns) < 4 * largest:
            raise UserError(
                f"size {width} x {height}: too narrow for {max(self.columns)} columns in a font of {largest} pixels; "
                "widen it or choose fewer columns or a smaller font"
            )


class PageMaker:
    """Typesets pages. Raises UserError if a text or font cannot be used, or no font has the characters of the texts."""

    version = 1

    def __init__(self, options: PageOptions):
        self.options = options
        self.fonts: FontSet = find_fonts(options.fonts)
        self.source = TextSource(options.text)
        self.fonts.check(self.source.counts, f"text {options.text[0]}")

    def make(self, rng: np.random.Generator) -> MadeSample:
        """Makes a page, which depends on the options and `rng` alone."""
        options = self.options
        font_size = int(rng.integers(options.font_sizes[0], options.font_sizes[1] + 1))
        room = int(1.2 * options.size[0] * options.size[1] / (0.4 * font_size * font_size)) + 200
        passage = self.source.passage(rng, min(room, options.max_characters or room))
        font_path, text = self.fonts.pick("\n".join(passage), rng)
        paragraphs = [paragraph for line in text.split("\n") if (paragraph := " ".join(line.split()))] or ["."]
        if options.max_characters:
            paragraphs = _first_characters(paragraphs, options.max_characters)
        image, answer = _Page(options, rng, font_path, font_size).set(paragraphs)
        questions = CHINESE_QUESTIONS if is_chinese(answer) and rng.random() < 0.7 else ENGLISH_QUESTIONS
        return MadeSample(image, pick(rng, questions), answer)


def _first_characters(paragraphs: list[str], limit: int) -> list[str]:
    kept, left = [], limit
    for paragraph in paragraphs:
        if left < 1:
            break
        part = paragraph[:left]
        if len(part) < len(paragraph) and " " in part and not is_chinese(part):
            part = part.rpartition(" ")[0]
        kept.append(part.strip())
        left -= len(paragraph)
    return [part for part in kept if part] or [paragraphs[0][:limit]]


class _Page:
    """One page: draws lines column by column until it is full, and collects their text."""

    def __init__(self, options: PageOptions, rng: np.random.Generator, font_path: str, font_size: int):
        self.options, self.rng = options, rng
        self.font_path, self.font_size = font_path, font_size
        self.font = load_font(font_path, font_size)
        width, height = options.size
        self.left, self.top = int(width * rng.uniform(0.05, 0.1)), int(height * rng.uniform(0.04, 0.09))
        self.bottom = height - int(height * rng.uniform(0.04, 0.09))
        self.num_columns = pick(rng, options.columns)
        self.gap = int(font_size * rng.uniform(1.2, 2.2))
        self.column_width = (width - 2 * self.left - (self.num_columns - 1) * self.gap) / self.num_columns
        self.leading = int(font_size * rng.uniform(1.25, 1.7))
        self.paragraph_gap = int(font_size * rng.choice([0.0, 0.4, 0.8]))
        self.indent = font_size * float(rng.choice([0.0, 2.0])) if self.column_width > 10 * font_size else 0.0
        self.is_justified = rng.random() < JUSTIFIED_SHARE
        paper, self.ink = _colours(rng)
        self.image = Image.new("RGB", (width, height), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.text = ""

    def set(self, paragraphs: list[str]) -> tuple[Image.Image, str]:
        top = self.top
        if self.rng.random() < TITLE_SHARE and len(paragraphs) > 1 and len(paragraphs[0]) <= MAX_TITLE_CHARACTERS:
            top = self.set_title(paragraphs[0])
            paragraphs = paragraphs[1:]
        if self.num_columns > 1 and self.rng.random() < RULE_SHARE:
            for column in range(1, self.num_columns):
                x = self.column_left(column) - self.gap / 2
                self.draw.line((x, top, x, self.bottom), fill=self.ink, width=1)
        column, y = 0, top
        for paragraph in paragraphs:
            for line in break_lines(paragraph, self.column_width, self.indent, self.font.getlength):
                if y + self.font_size * 1.2 > self.bottom and self.text:
                    column, y = column + 1, top
                    if column == self.num_columns:
                        return self.image, self.text
                self.set_line(line, self.column_left(column), y)
                y += self.leading + (self.paragraph_gap if line.closes else 0)
        return self.image, self.text

    def column_left(self, column: int) -> float:
        return self.left + column * (self.column_width + self.gap)

    def set_title(self, title: str) -> int:
        size = int(self.font_size * self.rng.uniform(1.2, 1.6))
        room = self.options.size[0] - 2 * self.left
        while size > self.font_size and load_font(self.font_path, size).getlength(title) > room:
            size -= 1
        font: ImageFont.FreeTypeFont = load_font(self.font_path, size)
        if font.getlength(title) > room:
            self.font_size = min(self.font_size, size)
        lines = break_lines(title, room, 0.0, font.getlength)
        y = self.top
        for line in lines:
            x = self.left + (room - font.getlength(line.text)) / 2
            self.draw.text((x, y), line.text, fill=self.ink, font=font)
            y += int(1.4 * size)
        self.text = title
        return y + size // 2

    def set_line(self, line: Line, x: float, y: float) -> None:
        if line.opens:
            x += self.indent
            self.text += "\n" if self.text else ""
        else:
            self.text += "\n" if self.options.line_breaks == "keep" else line.joint
        self.text += line.text
        if not self.is_justified or line.closes or len(line.units) < 2:
            self.draw.text((x, y), line.text, fill=self.ink, font=self.font)
            return
        widths = [self.font.getlength(" " * space + unit) for unit, space in zip(line.units, line.spaced, strict=True)]
        is_wide = not any(line.spaced)
        gaps = len(line.units) - 1 if is_wide else sum(line.spaced)
        room = self.column_width - (self.indent if line.opens else 0.0)
        extra = max(0.0, room - sum(widths)) / gaps
        for i, (unit, space, width) in enumerate(zip(line.units, line.spaced, widths, strict=True)):
            x += extra if i and (is_wide or space) else 0.0
            self.draw.text((x, y), " " * space + unit, fill=self.ink, font=self.font)
            x += width


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if rng.random() < PLAIN_SHARE:
        return (255, 255, 255), (0, 0, 0)
    paper = 255 - rng.uniform(0, 20) - rng.uniform(0, 12, 3)
    ink = rng.uniform(0, 50) + rng.uniform(0, 30, 3)
    return tuple(int(value) for value in paper), tuple(int(value) for value in ink)
