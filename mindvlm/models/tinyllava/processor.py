"""Converts a question and pictures to the inputs of a TinyLLaVA model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.templates import TAGGED_IMAGE, TEMPLATES, announces_images, image_turns
from mindvlm.processing.chat_processor import ChatProcessor, ChatPrompt, History
from mindvlm.processing.images.image_branch import ImageBranchConfig
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.images.loading import DEFAULT_MAX_PIXELS, ImageSource, load_image
from mindvlm.processing.images.picture import Picture, ShownView
from mindvlm.processing.images.tiling import TilingConfig, grid_shape
from mindvlm.processing.images.transforms import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, PictureMode, chat_picture
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.processing.samples.llava_samples import expand_images, llava_sample, with_images_in_front
from mindvlm.processing.text.chat_template import ChatTemplate, get_template
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.tokenizer_files import find_tokenizer, open_tokenizer
from mindvlm.processing.text.tokenizer_settings import file_of_added_token

QUICK_START_MARKER = "<image-placeholder>"
"""The image marker in questions of the original quick start."""

IMAGE_START, IMAGE_END, IMAGE_PATCH = "<im_start>", "<im_end>", "<im_patch>"


def siglip_branch(size: int = 384, *, aspect_ratio: str = "pad") -> ImageBranchConfig:
    """Returns SigLIP's transform: resize to size x size. `aspect_ratio` as in `padding_of`."""
    statistics = {"mean": list(SIGLIP_MEAN), "std": list(SIGLIP_STD)}
    return ImageBranchConfig(size=size, resize="squash", padding=padding_of(aspect_ratio), **statistics)


def clip_branch(size: int = 336, *, aspect_ratio: str = "pad") -> ImageBranchConfig:
    """Returns CLIP's transform: resize the short edge to size, crop the center. `aspect_ratio` as in `padding_of`."""
    statistics = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}
    return ImageBranchConfig(size=size, resize="crop", padding=padding_of(aspect_ratio), **statistics)


def padding_of(aspect_ratio: str) -> str:
    """Returns the padding for `image_aspect_ratio` of a config.json: "centre" for "pad", else "none"."""
    return "centre" if aspect_ratio == "pad" else "none"


@dataclass(kw_only=True)
class TinyLlavaProcessorConfig:
    """The processor config. The defaults match the 3.1B model.

    Attributes:
        tokenizer: folder of the tokenizer's files, or one of them; see `open_tokenizer`.
        vocab_size: rows of the model's embedding, the limit for the tokenizer; None skips the check.
        template: name in `templates.TEMPLATES`: phi for 3.1B and 2.0B, v1 for 1.5B.
        system: system message that replaces the template's.
        num_image_tokens: number of feature rows per image, or per tile.
        use_im_start_end: whether `<im_start>` and `<im_end>` surround each image.
        use_im_patch_token: whether the vocabulary contains `<im_patch>`, which no prompt uses.
        image_joint: text between an image and a question without an `<image>` marker.
        image: transform of a picture for the tower.
        tiling: how pictures are cut into tiles; null for one view of the whole picture.
        web_chat_picture: downscales pictures as the original web chat does; see `chat_picture`.
        original_parse: builds training samples as the original program does; see `llava_sample`.
        max_pixels: limit of width x height of a source picture.
    """

    tokenizer: str
    vocab_size: int | None = None
    template: str = "phi"
    system: str | None = None
    num_image_tokens: int = 729
    use_im_start_end: bool = False
    use_im_patch_token: bool = False
    image_joint: str = "\n"
    image: ImageBranchConfig = field(default_factory=siglip_branch)
    tiling: TilingConfig | None = None
    web_chat_picture: PictureMode | None = None
    original_parse: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class TinyLlavaPixels:
    """One picture: float32 array (3, height, width)."""

    image: np.ndarray


@dataclass(frozen=True)
class TinyLlavaInputs(ChatPrompt):
    """A prompt with its pictures, in the order of their placeholders.

    Attributes:
        pixels: (num_views, 3, height, width) float32; one view per picture, or several if it is tiled.
    """

    pixels: np.ndarray


class TinyLlavaProcessor(ChatProcessor):
    """Converts questions, earlier turns and pictures to ids and pixels.

    Text before, between and after pictures is encoded in separate pieces, as in the original program.

    Raises:
        UserError: the tokenizer is missing or has more tokens than the model, or the template is unknown.
    """

    templates = TEMPLATES

    def __init__(self, config: TinyLlavaProcessorConfig):
        self.config, self.max_pixels = config, config.max_pixels
        template = get_template(config.template, self.templates)
        span = image_span(config)
        super().__init__(
            make_tokenizer(config),
            template if config.system is None else replace(template, system=config.system),
            span,
            image_joint=config.image_joint,
        )

    @property
    def cuts_samples(self) -> bool:
        """Whether `training_sample` truncates long samples itself, as the original program does."""
        return self.config.original_parse

    def __call__(
        self,
        query: str,
        images: Sequence[ImageSource | TinyLlavaPixels] | None = None,
        history: History | None = None,
    ) -> TinyLlavaInputs:
        """Returns the inputs of one prompt.

        Args:
            query: the question; see `prompt`.
            images: all pictures of the conversation in order, as files, images or results of `pixels`.
            history: earlier turns.

        Raises:
            UserError: a picture cannot be used, or the numbers of pictures and `<image>` markers differ.
        """
        images = list(images or ())
        pictures = [
            self.whole_picture(image) if isinstance(image, TinyLlavaPixels) else self.picture(image) for image in images
        ]
        lengths = [len(picture.layout) for picture in pictures]
        prompt = self.prompt(query, num_images=len(images), history=history, image_lengths=lengths)
        shape = (0, 3, *self.config.image.height_width)
        arrays = [view.image for picture in pictures for view in picture.views]
        return TinyLlavaInputs(**vars(prompt), pixels=np.stack(arrays) if arrays else np.zeros(shape, np.float32))

    def pixels(self, image: ImageSource) -> TinyLlavaPixels:
        """Returns the pixels of one picture. Raises UserError if it cannot be read or has several views."""
        if self.config.tiling:
            raise UserError("processor.tiling is set, so a picture has several views; give it to `picture`")
        return TinyLlavaPixels(self.config.image.pixels(self.load(image)))

    def load(self, image: ImageSource) -> Image.Image:
        """Returns the decoded picture. Raises UserError if it cannot be read."""
        picture = load_image(image, max_pixels=self.max_pixels)
        return chat_picture(picture, self.config.web_chat_picture) if self.config.web_chat_picture else picture

    def picture(self, image: ImageSource) -> Picture:
        """Returns the picture as one view, or as an overview and tiles if tiling is configured."""
        config = self.config
        if config.tiling is None:
            return super().picture(image)
        loaded, edge = self.load(image), config.image.height_width[0]
        parts = config.tiling.tiles(loaded, edge)
        layout = config.tiling.layout(loaded.size, tile=edge, num_tokens=config.num_image_tokens)
        return Picture(tuple(TinyLlavaPixels(config.image.pixels(part)) for part in parts), layout)

    def shown_views(self, image: ImageSource) -> list[ShownView]:
        """Returns the overview and the tiles. Raises UserError if there are none, or the tokens form no square."""
        config, side = self.config, math.isqrt(self.config.num_image_tokens)
        if config.tiling is None:
            return super().shown_views(image)
        if side**2 != config.num_image_tokens:
            raise UserError(
                f"the {config.num_image_tokens} tokens of a tile form no square, so they have no place in it"
            )
        loaded, edge = self.load(image), config.image.height_width[0]
        overview, *tiles = config.tiling.tiles(loaded, edge)
        columns, _ = grid_shape(loaded.size, config.tiling.sizes, edge)
        shown = [ShownView("overview", overview, 0, side)]
        for number, tile in enumerate(tiles):
            line, column = divmod(number, columns)
            shown.append(ShownView(f"tile {number + 1}", tile, (number + 1) * side**2, side, (column, line)))
        return shown

    @property
    def picture_lengths(self) -> tuple[int, int]:
        config = self.config
        if config.tiling is None:
            return super().picture_lengths
        edge, num_tokens = config.image.height_width[0], config.num_image_tokens
        sizes = config.tiling.sizes
        lengths = [len(config.tiling.layout(size, tile=edge, num_tokens=num_tokens)) for size in sizes]
        return min(lengths), max(lengths)

    def with_usual_markers(self, query: str) -> str:
        return query.replace(QUICK_START_MARKER, IMAGE_MARKER)

    def question_turns(self, question: str) -> list[str]:
        return image_turns(self.template, question)

    def training_sample(
        self, record: dict | list, *, max_length: int, image_lengths: Sequence[int] | None = None
    ) -> TrainingSample:
        """Returns ids and labels of a training record.

        As in the original program, the picture of a message moves to its front and gets the tags that the template
        announces.

        Raises:
            UserError: the record is malformed, or an image does not fit into `max_length`.
        """
        if self.config.original_parse:
            return self.original_sample(record, max_length=max_length, image_lengths=image_lengths)
        # the image span adds <im_start> and <im_end>
        record = with_images_in_front(record, image_marks(self.template, use_im_start_end=False))
        return super().training_sample(record, max_length=max_length, image_lengths=image_lengths)

    def original_sample(
        self, record: dict | list, *, max_length: int, image_lengths: Sequence[int] | None = None
    ) -> TrainingSample:
        """Returns the sample of `llava_sample`, truncated before and after its images are expanded."""
        record = record if isinstance(record, dict) else {"conversations": record}
        sample = cut(self.unexpanded_sample(record, max_length=max_length), max_length)
        placeholder_id = self.tokenizer.special_id(IMAGE_MARKER)
        num_tokens = self.image_span.num_tokens
        sample = expand_images(sample, placeholder_id=placeholder_id, num_tokens=num_tokens, lengths=image_lengths)
        needed = self.image_span.needed_length(sample.input_ids.tolist(), self.tokenizer)
        if needed > max_length:
            raise UserError(
                f"max_length {max_length} cuts an image of the sample, which needs {needed} tokens; raise max_length"
            )
        return cut(sample, max_length)

    def unexpanded_sample(self, record: dict, *, max_length: int) -> TrainingSample:
        """Returns the sample of `llava_sample`, with one id per image."""
        return llava_sample(
            record,
            tokenizer=self.tokenizer,
            template=self.template,
            max_length=max_length,
            image_marks=image_marks(self.template, self.config.use_im_start_end),
        )


def cut(sample: TrainingSample, length: int) -> TrainingSample:
    """Returns the first `length` tokens of a sample."""
    return replace(sample, input_ids=sample.input_ids[:length], labels=sample.labels[:length])


def image_marks(template: ChatTemplate, use_im_start_end: bool) -> tuple[str, str]:
    """Returns the text before and after an image of a training sample: the template's tags, then the image tokens."""
    start, end = TAGGED_IMAGE if announces_images(template) else ("", "")
    return (start + IMAGE_START, IMAGE_END + end) if use_im_start_end else (start, end)


def image_span(config: TinyLlavaProcessorConfig) -> ImageSpan:
    """Returns the tokens of one image."""
    if config.num_image_tokens < 1:
        raise UserError(f"processor.num_image_tokens is {config.num_image_tokens}; expected at least 1")
    start, end = (IMAGE_START, IMAGE_END) if config.use_im_start_end else ("", "")
    return ImageSpan(config.num_image_tokens, start=start, placeholder=IMAGE_MARKER, end=end)


def make_tokenizer(config: TinyLlavaProcessorConfig) -> Tokenizer:
    """Returns the tokenizer with the image tokens added.

    Raises:
        UserError: the tokenizer cannot be read or has more tokens than the model.
    """
    more = [IMAGE_PATCH] if config.use_im_patch_token else []
    more += [IMAGE_START, IMAGE_END] if config.use_im_start_end else []
    tokenizer = open_tokenizer(config.tokenizer, more_special_tokens=more)
    if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        file = find_tokenizer(Path(config.tokenizer))
        beyond = [token for token, token_id in tokenizer.special_ids.items() if token_id >= config.vocab_size]
        added = f" ({beyond[0]!r} is beyond, see {file_of_added_token(beyond[0], file).name})" if beyond else ""
        raise UserError(
            f"tokenizer {config.tokenizer}: {tokenizer.vocab_size} tokens, but the model has embeddings for "
            f"{config.vocab_size}{added}; use the tokenizer of the model"
        )
    tokenizer.add_placeholder(IMAGE_MARKER)
    return tokenizer


def new_image_marks(config: TinyLlavaProcessorConfig) -> list[int]:
    """Returns the ids of `<im_start>` and `<im_end>` if they are used but missing in the tokenizer's files."""
    if not config.use_im_start_end:
        return []
    tokenizer, num_known = make_tokenizer(config), open_tokenizer(config.tokenizer).vocab_size
    return [token_id for token_id in map(tokenizer.special_id, (IMAGE_START, IMAGE_END)) if token_id >= num_known]
