"""The key `weights`: how the weight matrices of a model are stored on a CPU.

`weights: int8` sets a format for the whole model, and `weights: int4,head=int8,towers=16bit` other ones for its parts:

    format     weight matrices                                  sums
    float32    float32                                          MindSpore
    16bit      the 16-bit values of the checkpoint; float32 values are rounded to float16, or to bfloat16 if they exceed
               its range                                        float32
    int8       blocks of 32 values with a common scale          int8 products, float32 sums
    int8c      int8 with one scale for all weights of an output channel
                                                                int8 products, float32 sums
    int4       blocks of 32 values of 4 bits with a common scale
                                                                int8 products, float32 sums
    int4k      4 bits, with a minimum beside the scale; as int4 where the width is no multiple of 256
                                                                int8 products, float32 sums
    auto       as the checkpoint stores them: float32, 16-bit values, or the blocks of a quantized file

A file that `mindvlm-convert --quant` wrote can also be read as float32 or 16bit; another block format is refused.
"""

import functools
import re
from typing import NamedTuple

from mindvlm.core.errors import UserError

WEIGHT_FORMATS = ("auto", "float32", "16bit", "int8", "int8c", "int4", "int4k")
PARTS = ("decoder", "head", "embeddings", "towers")
"""Layers of the decoder, its head, its token embeddings, and everything before it."""

BLOCK_FORMATS = {"int8": ("q8_0",), "int8c": ("q8_c",), "int4": ("q4_0",), "int4k": ("q4_K", "q4_0")}
"""Format of a part -> names of its blocks; the first that divides the width of a matrix is used."""
DIVISORS = {"q8_0": 32, "q8_c": 32, "q4_0": 32, "q4_K": 256}
"""The width of a matrix is a multiple of this number. A kernel multiplies 32 values at a time."""

_DECODER = r"(?:.*\.)?language_model\."
PATTERNS = {
    "head": rf"{_DECODER}lm_head",
    "embeddings": rf"{_DECODER}embed_tokens(?:\..*)?",
    "decoder": rf"{_DECODER}.*",
    # tables of positions and codebooks are read as a whole, not multiplied
    "towers": r"(?!.*embedding).*",
}
"""Part -> regular expression for the names of its Cells; the first match applies."""

# 4 bits are too few for logits; embeddings are only looked up, and towers are small
DEFAULTS = {
    "int8": {"embeddings": "16bit", "towers": "16bit"},
    "int8c": {"embeddings": "16bit", "towers": "16bit"},
    "int4": {"head": "int8", "embeddings": "16bit", "towers": "16bit"},
    "int4k": {"head": "int8", "embeddings": "16bit", "towers": "16bit"},
}


def parse_weights(text: str, key: str = "weights") -> dict[str, str]:
    """Returns the format of each part; `key` names the value in messages.

    Raises:
        UserError: a part or a format does not exist, or is given twice.
    """
    formats: dict[str, str] = {}
    for entry in str(text).split(","):
        part, equals, value = entry.strip().rpartition("=")
        wrong = value not in WEIGHT_FORMATS or (equals and part not in PARTS) or part in formats
        if wrong:
            raise UserError(
                f"{key} is {text!r}; expected one of {', '.join(WEIGHT_FORMATS)}, or PART=FORMAT for parts of "
                f"{', '.join(PARTS)}, such as int4,head=int8"
            )
        formats[part] = value
    whole = formats.pop("", "auto")
    return {part: whole for part in PARTS} | DEFAULTS.get(whole, {}) | formats


def part_of(tensor: str, shape: tuple[int, ...]) -> str | None:
    """Returns the part that a native tensor belongs to; None unless it is a matrix of a part."""
    cell, _, kind = tensor.rpartition(".")
    if kind != "weight" or len(shape) != 2:
        return None
    return next((part for part, pattern in PATTERNS.items() if re.fullmatch(pattern, cell)), None)


def blocks_for(weight_format: str | None, width: int) -> str | None:
    """Returns the dtype of a matrix of a width in a format of `WEIGHT_FORMATS`; None if it is not stored in blocks."""
    fits = (name for name in BLOCK_FORMATS.get(weight_format, ()) if width and width % DIVISORS[name] == 0)
    name = next(fits, None)
    return f"{name}[{width}]" if name == "q8_c" else name


class Block(NamedTuple):
    """A block of quantized values of a row: its format, the number of values, and that of its bytes."""

    format: str
    size: int
    num_bytes: int


_BLOCKS = {"q8_0": Block("q8_0", 32, 34), "q4_0": Block("q4_0", 32, 18), "q4_K": Block("q4_K", 256, 144)}


@functools.cache
def find_block(dtype: str) -> Block | None:
    """Returns the block of a stored dtype; None if it has none. A row of "q8_c[I]" is one block of I values."""
    if row := re.fullmatch(r"q8_c\[(\d+)\]", dtype):
        return Block("q8_c", int(row[1]), 4 + int(row[1]))
    return _BLOCKS.get(dtype)
