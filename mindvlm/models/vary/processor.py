"""Converts a question and pictures to the inputs of a Vary model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.models.vary.templates import TEMPLATES
from mindvlm.models.vary.tokenizer import open_tokenizer
from mindvlm.processing.chat_processor import ChatProcessor, ChatPrompt, History
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


@dataclass(frozen=True)
class VaryInputs(ChatPrompt):
    """A prompt with its pictures, in the order of their placeholders.

    Attributes:
        clip_pixels: (num_images, 3, height, width) float32, None for Vary-tiny.
        high_pixels: (num_images, 3, height, width) float32.
    """

    clip_pixels: np.ndarray | None
    high_pixels: np.ndarray


Pixels = VaryPixels | VaryTinyPixels


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

    def __call__(
        self, query: str, images: Sequence[ImageSource | Pixels] | None = None, history: History | None = None
    ) -> VaryInputs:
        """Returns the inputs of one prompt.

        Args:
            query: the question. Each `<image>` marks the place of a picture. Without a marker, pictures that the
                history does not use go before the question.
            images: all pictures of the conversation in order, as files, images or results of `pixels`.
            history: earlier turns.

        Raises:
            UserError: a picture cannot be used, or the numbers of pictures and `<image>` markers differ.
        """
        images = list(images or ())
        prompt = self.prompt(query, num_images=len(images), history=history)
        pixels = [image if isinstance(image, Pixels) else self.pixels(image) for image in images]
        clip = self.config.clip
        return VaryInputs(
            **vars(prompt),
            clip_pixels=_stack([one.clip for one in pixels], clip) if clip else None,
            high_pixels=_stack([one.high for one in pixels], self.config.high),
        )

    def pixels(self, image: ImageSource) -> Pixels:
        """Returns the pixels of one picture for all towers. Raises UserError if it cannot be read."""
        picture = load_image(image, max_pixels=self.max_pixels)
        if self.config.trim is not None:
            picture = self.config.trim.apply(picture)
        high = self.config.high.pixels(picture)
        if self.config.clip is None:
            return VaryTinyPixels(high)
        is_same = self.config.clip == self.config.high
        return VaryPixels(high if is_same else self.config.clip.pixels(picture), high)


def _stack(arrays: list[np.ndarray], branch: ImageBranchConfig) -> np.ndarray:
    if len({array.shape for array in arrays}) > 1:
        raise UserError(f"resize {branch.resize!r} gave pictures of different sizes: use one image, or another resize")
    return np.stack(arrays) if arrays else np.zeros((0, 3, *branch.height_width), dtype=np.float32)
