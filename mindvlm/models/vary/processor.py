"""Converts a question and pictures to the inputs of a Vary model."""

import re
from dataclasses import dataclass, field, replace

import numpy as np

from mindvlm.models.vary.templates import TEMPLATES
from mindvlm.models.vary.tokenizer import open_tokenizer
from mindvlm.processing.chat_processor import ChatProcessor
from mindvlm.processing.images.image_branch import ImageBranchConfig
from mindvlm.processing.images.image_span import ImageSpan
from mindvlm.processing.images.loading import DEFAULT_MAX_PIXELS, ImageSource, load_image
from mindvlm.processing.images.trimming import TrimConfig
from mindvlm.processing.text.chat_template import get_template


@dataclass(kw_only=True)
class VaryProcessorConfig:
    """The processor config. The defaults match Vary-toy.

    Attributes:
        vocab_file: tiktoken rank file (Vary-toy); vocab.json or tokenizer.json of OPT, or their folder (Vary-tiny).
        vocab_size: rows of the model's embedding, which the tokenizer must match; None skips the check.
        special_tokens: control tokens; None for those of Vary-toy or Vary-tiny, depending on the file.
        template: name in `templates.TEMPLATES`.
        system: system message that replaces the template's.
        num_image_tokens: number of placeholders per image.
        image_joint: text between an image and a question without an `<image>` marker.
        clip: transform of a picture for the CLIP tower; None for Vary-tiny.
        high: transform of a picture for the vision vocabulary.
        trim: crops margins before the transforms; None keeps the picture unchanged.
        max_pixels: limit of width x height of a source picture.
    """

    vocab_file: str
    vocab_size: int | None = None
    special_tokens: list[str] | None = None
    template: str = "mpt"
    system: str | None = None
    num_image_tokens: int = 256
    image_start_token: str = "<img>"
    image_placeholder_token: str = "<imgpad>"
    image_end_token: str = "</img>"
    image_joint: str = "\n"
    clip: ImageBranchConfig | None = field(default_factory=lambda: ImageBranchConfig(size=224, resize="crop"))
    high: ImageBranchConfig = field(default_factory=lambda: ImageBranchConfig(size=1024, resize="squash"))
    trim: TrimConfig | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class VaryPixels:
    """One picture for both towers: float32 arrays (3, height, width)."""

    clip: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class VaryTinyPixels:
    """One picture for the vision vocabulary alone: float32 array (3, height, width)."""

    high: np.ndarray


class VaryProcessor(ChatProcessor):
    """Converts questions, earlier turns and pictures to ids and pixels.

    Control tokens in questions and answers are encoded as plain text; only those of the template act as control tokens.

    Raises:
        UserError: the tokenizer file is wrong, the template is unknown, or the vocabulary lacks a required token.
    """

    templates = TEMPLATES

    def __init__(self, config: VaryProcessorConfig):
        self.config, self.max_pixels = config, config.max_pixels
        tokenizer = open_tokenizer(
            config.vocab_file, special_tokens=config.special_tokens, expected_vocab_size=config.vocab_size
        )
        template = get_template(config.template, self.templates)
        image_span = ImageSpan(
            num_tokens=config.num_image_tokens,
            start=config.image_start_token,
            placeholder=config.image_placeholder_token,
            end=config.image_end_token,
        )
        super().__init__(
            tokenizer,
            template if config.system is None else replace(template, system=config.system),
            image_span,
            image_joint=config.image_joint,
        )
        for token in re.findall(r"<\|\w+\|>", "".join(template.roles) + template.separator):
            tokenizer.special_id(token)

    def pixels(self, image: ImageSource) -> VaryPixels | VaryTinyPixels:
        """Returns the pixels of one picture for all towers. Raises UserError if it cannot be read."""
        picture = load_image(image, max_pixels=self.max_pixels)
        if self.config.trim is not None:
            picture = self.config.trim.apply(picture)
        high = self.config.high.pixels(picture)
        if self.config.clip is None:
            return VaryTinyPixels(high)
        is_same = self.config.clip == self.config.high
        return VaryPixels(high if is_same else self.config.clip.pixels(picture), high)
