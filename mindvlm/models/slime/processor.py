"""Converts a question and pictures to the inputs of a SliME model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mindvlm.core.errors import UserError
from mindvlm.models.slime.templates import TEMPLATES, TEXT_END, TEXT_START, TURN_END, llama3_sample
from mindvlm.models.slime.views import MAX_CROPS, ViewsConfig
from mindvlm.processing.chat_processor import ChatProcessor
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.images.loading import DEFAULT_MAX_PIXELS, ImageSource, load_image
from mindvlm.processing.images.picture import Picture, ShownView
from mindvlm.processing.images.transforms import normalize
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.processing.samples.llava_samples import expand_images, llava_sample, with_images_in_front
from mindvlm.processing.text.chat_template import get_template
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.tokenizer_files import open_tokenizer

QUICK_START_MARKER = "<image-placeholder>"
"""The image marker in questions of the original quick start."""

MIN_CROPS = 2


@dataclass(kw_only=True)
class SlimeProcessorConfig:
    """The processor config.

    Attributes:
        tokenizer: folder of the tokenizer's files, or one of them; see `open_tokenizer`.
        vocab_size: rows of the model's embedding, the limit for the tokenizer; None skips the check.
        template: name in `templates.TEMPLATES`: v1 for Vicuna, llama3 for Llama-3.
        image_joint: text between an image and a question without an `<image>` marker.
        views: how a picture is cut into views.
        original_parse: builds training samples as the original program does: see `llava_sample` and `llama3_sample`.
        max_pixels: limit of width x height of a source picture.
    """

    tokenizer: str
    vocab_size: int | None = None
    template: str = "v1"
    image_joint: str = "\n"
    views: ViewsConfig = field(default_factory=ViewsConfig)
    original_parse: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class SlimePixels:
    """The global view: float32 array (3, height, width)."""

    image: np.ndarray


@dataclass(frozen=True)
class SlimeCrops:
    """A bucket of crops: float32 array (C, 3, height, width)."""

    crops: np.ndarray


class SlimeProcessor(ChatProcessor):
    """Converts questions, earlier turns and pictures to ids and pixels.

    Raises:
        UserError: the tokenizer is missing or has more tokens than the model, or the template is unknown.
    """

    templates = TEMPLATES

    def __init__(self, config: SlimeProcessorConfig):
        self.config, self.max_pixels = config, config.max_pixels
        span = ImageSpan(
            config.views.num_rows(MAX_CROPS[config.views.mode]), start="", placeholder=IMAGE_MARKER, end=""
        )
        template = get_template(config.template, TEMPLATES)
        super().__init__(make_tokenizer(config), template, span, image_joint=config.image_joint)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, and both of Llama-3's end tokens."""
        special_ids = self.tokenizer.special_ids
        ends = (special_ids[token] for token in (TURN_END, TEXT_END) if token in special_ids)
        return tuple(dict.fromkeys((*super().stop_ids, *ends)))

    @property
    def picture_lengths(self) -> tuple[int, int]:
        views = self.config.views
        most = MAX_CROPS[views.mode]
        return views.num_rows(min(MIN_CROPS, most)), views.num_rows(most)

    def with_usual_markers(self, query: str) -> str:
        return query.replace(QUICK_START_MARKER, IMAGE_MARKER)

    @property
    def rows_per_view(self) -> int:
        return self.config.views.num_global_tokens

    @property
    def cuts_samples(self) -> bool:
        """Whether `training_sample` truncates long samples itself, as the original program does."""
        return self.config.original_parse

    def picture(self, image: ImageSource) -> Picture:
        """Returns the global view of a picture, and its crops in buckets. Zeros fill the last bucket."""
        views, loaded = self.config.views, load_image(image, max_pixels=self.max_pixels)
        whole = normalize(views.global_view(loaded)) if views.has_global else None
        parts, grid = views.crops(loaded) if views.has_crops else ([], (0, 0))
        return make_picture(views, whole, list(map(normalize, parts)), grid)

    def training_sample(
        self, record: dict | list, *, max_length: int, image_lengths: Sequence[int] | None = None
    ) -> TrainingSample:
        """Returns ids and labels of a training record. The only picture of a question moves to its front.

        With `original_parse`, ids are cut to `max_length` before the pictures are expanded. The model cuts the whole
        sequence after the choice of the router.

        Raises:
            UserError: the record is malformed, or an image does not fit into `max_length`.
        """
        if not self.config.original_parse:
            record = with_images_in_front(record)
            return super().training_sample(record, max_length=max_length, image_lengths=image_lengths)
        record = record if isinstance(record, dict) else {"conversations": record}
        sample = self.original_sample(record, max_length=max_length)
        ids, labels = sample.input_ids[:max_length], sample.labels[:max_length]
        images = sample.images[: list(ids).count(self.tokenizer.special_id(IMAGE_MARKER))]
        return expand_images(
            replace(sample, input_ids=ids, labels=labels, images=images),
            placeholder_id=self.tokenizer.special_id(IMAGE_MARKER),
            num_tokens=self.image_span.num_tokens,
            lengths=image_lengths,
        )

    def shown_views(self, image: ImageSource) -> list[ShownView]:
        """Returns the global view and the crops. Raises UserError if the model gets no crops."""
        views, loaded = self.config.views, load_image(image, max_pixels=self.max_pixels)
        if not views.has_crops:
            return super().shown_views(image)
        whole = views.global_view(loaded) if views.has_global else None
        shown = [ShownView("global view", whole, 0, math.isqrt(views.num_global_tokens))] if whole else []
        crops, (columns, _) = views.crops(loaded)
        for number, crop in enumerate(crops):
            line, column = divmod(number, columns)
            side = math.isqrt(views.num_local_tokens)
            shown.append(ShownView(f"crop {number + 1}", crop, views.first_row(number), side, (column, line)))
        return shown

    def original_sample(self, record: dict, *, max_length: int) -> TrainingSample:
        """Returns the ids and labels of a record as the original program does, with one id per picture.

        Raises:
            UserError: the record is malformed.
        """
        build = llama3_sample if self.template.style == "chatml" else llava_sample
        return build(record, tokenizer=self.tokenizer, template=self.template, max_length=max_length)


def make_picture(
    views: ViewsConfig, whole: np.ndarray | None, crops: Sequence[np.ndarray], grid: tuple[int, int]
) -> Picture:
    """Returns the picture of a global view and of crops, (3, height, width) float32 each.

    Args:
        views: how the picture was cut.
        whole: the global view, if the model gets it.
        crops: the crops row by row.
        grid: columns and rows of the crops.
    """
    size, found = views.crops_per_view, [] if whole is None else [SlimePixels(whole)]
    for start in range(0, len(crops), size):
        bucket = crops[start : start + size]
        blank = [np.zeros_like(bucket[0])] * (size - len(bucket))
        found.append(SlimeCrops(np.stack([*bucket, *blank])))
    layout = views.layout(grid)
    num_local = len(crops) * views.num_local_tokens
    return Picture(tuple(found), layout, None if views.use == "global" else len(layout) - num_local)


def make_tokenizer(config: SlimeProcessorConfig) -> Tokenizer:
    """Returns the tokenizer with the image placeholder.

    Raises:
        UserError: the tokenizer cannot be read or has more tokens than the model.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    tokenizer.add_placeholder(IMAGE_MARKER)
    if not tokenizer.prefix_tokens and TEXT_START in tokenizer.special_ids:
        # some files of Llama-3 lack the rule that adds it, but no SliME was trained without it
        tokenizer.prefix_tokens = (TEXT_START,)
    if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer {config.tokenizer}: {tokenizer.vocab_size} tokens, but the model has embeddings for "
            f"{config.vocab_size}; use the tokenizer of the model"
        )
    return tokenizer
