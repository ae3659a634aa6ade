"""From a question and pictures to the inputs of a Vary model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mindvlm.errors import UserError
from mindvlm.processing.bpe_tokenizer import OPT_SPECIAL_TOKENS, BpeTokenizer
from mindvlm.processing.chat_template import get_template, prompt_text, render, render_turn
from mindvlm.processing.conversation import TrainingSample, build_sample
from mindvlm.processing.image_branch import ImageBranchConfig, TrimConfig
from mindvlm.processing.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.images import DEFAULT_MAX_PIXELS, ImageSource, load_image
from mindvlm.processing.pieces import Piece, encode_pieces
from mindvlm.processing.tiktoken_tokenizer import QWEN_SPECIAL_TOKENS, TiktokenTokenizer
from mindvlm.processing.tokenizer import Tokenizer


@dataclass(kw_only=True)
class VaryProcessorConfig:
    """Everything between files and model inputs. The defaults are those of Vary-toy.

    Attributes:
        vocab_file: tiktoken rank file (Vary-toy); vocab.json or tokenizer.json of OPT, or their folder (Vary-tiny).
        vocab_size: rows of the model's embedding, to refuse a wrong file; None skips the check.
        special_tokens: control tokens; None for those of Vary-toy or Vary-tiny, whichever the file belongs to.
        system: system message instead of the template's.
        num_image_tokens: placeholders per image.
        image_joint: text between an image and the question where the question has no `<image>` marker of its own.
        clip: picture of the CLIP tower; None for Vary-tiny, which has none.
        high: picture of the vision vocabulary.
        trim: for all towers; None leaves the picture as it is.
        max_pixels: limit of width x height of a source image.
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
class VaryPrompt:
    """Token ids of a prompt.

    Attributes:
        text: the prompt with all placeholders, without the tokens that the tokenizer puts in front of every text.
        placeholder_starts: for each image the index of its first placeholder in `input_ids`.
        num_image_tokens: placeholders per image; they stand side by side.
    """

    text: str
    input_ids: list[int]
    placeholder_starts: list[int]
    num_image_tokens: int


@dataclass(frozen=True)
class VaryInputs(VaryPrompt):
    """A prompt with its pictures, in the order of their placeholders.

    Attributes:
        clip_pixels: (num_images, 3, height, width) float32, None for Vary-tiny.
        high_pixels: (num_images, 3, height, width) float32.
    """

    clip_pixels: np.ndarray | None
    high_pixels: np.ndarray


Pixels = VaryPixels | VaryTinyPixels
History = Sequence[tuple[str, str]]
"""Earlier turns as (query, reply). Images of a query are marked in it, see `VaryProcessor.mark_images`."""


class VaryProcessor:
    """Questions, earlier turns and pictures to ids and pixels.

    What people and the model wrote is encoded with control tokens disarmed; only the template's own are armed.

    Raises:
        UserError: the tokenizer file is wrong, the template is unknown, or the vocabulary lacks a token that is needed.
    """

    def __init__(self, config: VaryProcessorConfig):
        self.config = config
        self.tokenizer = open_tokenizer(
            config.vocab_file, special_tokens=config.special_tokens, expected_vocab_size=config.vocab_size
        )
        template = get_template(config.template)
        self.template = template if config.system is None else replace(template, system=config.system)
        self.image_span = ImageSpan(
            num_tokens=config.num_image_tokens,
            start=config.image_start_token,
            placeholder=config.image_placeholder_token,
            end=config.image_end_token,
        )
        needed = [self.image_span.start, self.image_span.placeholder, self.image_span.end, self.tokenizer.end_token]
        needed += re.findall(r"<\|\w+\|>", "".join(template.roles) + template.separator)
        for token in needed:
            self.tokenizer.special_id(token)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's closing mark, if it is a token, and the end of text."""
        special_ids = self.tokenizer.special_ids
        marks = dict.fromkeys((self.template.answer_separator, self.tokenizer.end_token))
        return tuple(special_ids[mark] for mark in marks if mark in special_ids)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The closing mark, where it is no single token of this vocabulary."""
        mark = self.template.answer_separator
        return () if mark in self.tokenizer.special_ids else (mark,)

    def __call__(
        self, query: str, images: Sequence[ImageSource | Pixels] | None = None, history: History | None = None
    ) -> VaryInputs:
        """Inputs of one prompt.

        Args:
            query: the question. Each `<image>` in it is the place of a picture; without any, the pictures that the
                history does not use stand before the question.
            images: all pictures of the conversation in order; `pixels` of one may be given in its place.
            history: earlier turns.

        Raises:
            UserError: a picture cannot be used, or pictures and `<image>` markers differ in number.
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
        """The towers' pixels of one picture. Raises UserError if it cannot be read."""
        picture = load_image(image, max_pixels=self.config.max_pixels)
        if self.config.trim is not None:
            picture = self.config.trim.apply(picture)
        high = self.config.high.pixels(picture)
        return VaryPixels(self.config.clip.pixels(picture), high) if self.config.clip else VaryTinyPixels(high)

    def mark_images(self, query: str, num_images: int) -> str:
        """The query with an `<image>` marker for each of its pictures, as it belongs into a history.

        Raises:
            UserError: the query has markers of its own, in another number; or it has no picture and the template takes
                nothing else.
        """
        if self.template.style == "caption" and not num_images:
            raise UserError(f"template {self.template.name!r} answers to pictures only; give an image, or another one")
        num_markers = query.count(IMAGE_MARKER)
        if num_markers == 0:
            return (IMAGE_MARKER + self.config.image_joint) * num_images + query
        if num_markers != num_images:
            raise UserError(f"{num_images} images for {num_markers} {IMAGE_MARKER} markers: give one image per marker")
        return query

    def prompt(self, query: str, *, num_images: int = 0, history: History | None = None) -> VaryPrompt:
        """Ids of a conversation that ends with the assistant's open turn. Arguments and errors as in `__call__`."""
        history = history or ()
        num_used = sum(earlier.count(IMAGE_MARKER) for earlier, _ in history)
        if num_used > num_images:
            raise UserError(
                f"{num_images} images for {num_used} {IMAGE_MARKER} markers in the history: give all of them"
            )
        messages: list[list[Piece] | str | None] = []
        for earlier, reply in history:
            messages += [self.image_span.expand(earlier), reply]
        messages += [self.image_span.expand(self.mark_images(query, num_images - num_used)), None]
        return self._encode(render(self.template, messages), prefix_ids=self.tokenizer.prefix_ids)

    def follow_up(self, query: str, *, num_images: int = 0, answer_is_closed: bool) -> VaryPrompt:
        """What comes after an answer that is in the KV cache already: the next question and the open answer.

        Args:
            answer_is_closed: the closing mark was generated and its key and value are in the cache.
        """
        message = self.image_span.expand(self.mark_images(query, num_images))
        pieces = [] if answer_is_closed else [Piece(self.template.answer_separator, control=True)]
        pieces += render_turn(self.template, message, is_answer=False)
        return self._encode(pieces + render_turn(self.template, None, is_answer=True))

    def training_sample(self, record: dict | list, *, max_length: int) -> TrainingSample:
        """Ids and labels of a training record, see `build_sample`."""
        return build_sample(
            record,
            tokenizer=self.tokenizer,
            template=self.template,
            image_span=self.image_span,
            max_length=max_length,
        )

    def _encode(self, pieces: list[Piece], *, prefix_ids: Sequence[int] = ()) -> VaryPrompt:
        ids, _ = encode_pieces(pieces, self.tokenizer)
        ids = [*prefix_ids, *ids]
        start_id = self.tokenizer.special_id(self.image_span.start)
        starts = [position + 1 for position, token_id in enumerate(ids) if token_id == start_id]
        return VaryPrompt(prompt_text(pieces), ids, starts, self.image_span.num_tokens)


def open_tokenizer(
    path: str, *, special_tokens: Sequence[str] | None = None, expected_vocab_size: int | None = None
) -> Tokenizer:
    """OPT's tokenizer from a folder or a JSON file, Qwen's from a rank file. Raises UserError as their `from_file`."""
    if Path(path).is_dir() or path.endswith(".json"):
        kind, default = BpeTokenizer, OPT_SPECIAL_TOKENS
    else:
        kind, default = TiktokenTokenizer, QWEN_SPECIAL_TOKENS
    tokens = default if special_tokens is None else special_tokens
    return kind.from_file(path, special_tokens=tokens, expected_vocab_size=expected_vocab_size)


def _stack(arrays: list[np.ndarray], branch: ImageBranchConfig) -> np.ndarray:
    if len({array.shape for array in arrays}) > 1:
        raise UserError(f"resize {branch.resize!r} gave pictures of different sizes: use one image, or another resize")
    return np.stack(arrays) if arrays else np.zeros((0, 3, *branch.height_width), dtype=np.float32)
