"""From a question and pictures to the inputs of a TinyLLaVA model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.templates import TAGGED_IMAGE, TEMPLATES, announces_images, image_turns
from mindvlm.processing.chat_processor import ChatProcessor, ChatPrompt, History
from mindvlm.processing.images.chat_pictures import PictureMode, chat_picture
from mindvlm.processing.images.image_branch import ImageBranchConfig
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageRows, ImageSpan, with_image_marks
from mindvlm.processing.images.loading import DEFAULT_MAX_PIXELS, ImageSource, load_image
from mindvlm.processing.images.tiling import TilingConfig
from mindvlm.processing.images.transforms import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD
from mindvlm.processing.samples.chat_samples import TrainingSample
from mindvlm.processing.samples.llava_samples import expand_images, image_to_front, llava_sample
from mindvlm.processing.text.chat_template import ChatTemplate, get_template
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.processing.text.tokenizer_files import open_tokenizer

QUICK_START_MARKER = "<image-placeholder>"
"""How questions of the original's quick start mark the place of a picture."""

IMAGE_START, IMAGE_END, IMAGE_PATCH = "<im_start>", "<im_end>", "<im_patch>"


def siglip_branch(size: int = 384, *, aspect_ratio: str = "pad") -> ImageBranchConfig:
    """SigLIP's picture: straight to size x size. `aspect_ratio` as of `padding_of`."""
    statistics = {"mean": list(SIGLIP_MEAN), "std": list(SIGLIP_STD)}
    return ImageBranchConfig(size=size, resize="squash", padding=padding_of(aspect_ratio), **statistics)


def clip_branch(size: int = 336, *, aspect_ratio: str = "pad") -> ImageBranchConfig:
    """CLIP's picture: shortest edge to size, then the middle square. `aspect_ratio` as of `padding_of`."""
    statistics = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}
    return ImageBranchConfig(size=size, resize="crop", padding=padding_of(aspect_ratio), **statistics)


def padding_of(aspect_ratio: str) -> str:
    """The padding that `image_aspect_ratio` of a config.json stands for: "centre" for pad, else "none"."""
    return "centre" if aspect_ratio == "pad" else "none"


@dataclass(kw_only=True)
class TinyLlavaProcessorConfig:
    """Everything between files and model inputs. The defaults are those of the 3.1B model.

    Attributes:
        tokenizer: folder of the tokenizer's files, or one of them, see `open_tokenizer`.
        vocab_size: rows of the model's embedding, to refuse a tokenizer with more tokens; None skips the check.
        template: name in `templates.TEMPLATES`: phi for 3.1B and 2.0B, v1 for 1.5B.
        system: system message instead of the template's.
        num_image_tokens: feature rows of an image.
        use_im_start_end: `<im_start>` and `<im_end>` around every image; `use_im_patch_token`: only in the vocabulary.
        image_joint: text between an image and the question where the question has no `<image>` marker of its own.
        image: picture of the tower.
        tiling: pictures are cut into tiles of its size; null for one look at the whole.
        web_chat_picture: pictures are first made as small as the original's web chat sends them, see `chat_picture`.
        original_parse: training samples as the original program makes them, see `llava_sample`.
        max_pixels: limit of width x height of a source image.
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
        pixels: (num_views, 3, height, width) float32; a picture has one view, or several where it is cut into tiles.
    """

    pixels: np.ndarray


class TinyLlavaProcessor(ChatProcessor):
    """Questions, earlier turns and pictures to ids and pixels.

    The text before, between and behind pictures is encoded piece by piece, as the original does.

    Raises:
        UserError: there is no tokenizer, it has more tokens than the model, or the template is unknown.
    """

    def __init__(self, config: TinyLlavaProcessorConfig):
        self.config = config
        template = get_template(config.template, TEMPLATES)
        span = image_span(config)
        super().__init__(
            make_tokenizer(config),
            template if config.system is None else replace(template, system=config.system),
            span,
            image_joint=config.image_joint,
        )

    @property
    def cuts_samples(self) -> bool:
        """Whether `training_sample` cuts long samples as the original does, so that nothing else may."""
        return self.config.original_parse

    def __call__(
        self,
        query: str,
        images: Sequence[ImageSource | TinyLlavaPixels] | None = None,
        history: History | None = None,
    ) -> TinyLlavaInputs:
        """Inputs of one prompt; arguments as of `prompt`, `images` are all pictures of the conversation in order
        (`pixels` of one may be given in its place).

        Raises:
            UserError: a picture cannot be used, or pictures and `<image>` markers differ in number.
        """
        images = list(images or ())
        views = [[image] if isinstance(image, TinyLlavaPixels) else self.views(image) for image in images]
        lengths = [
            self.image_span.num_tokens if isinstance(image, TinyLlavaPixels) else len(self.image_rows(image).rows)
            for image in images
        ]
        prompt = self.prompt(query, num_images=len(images), history=history, image_lengths=lengths)
        shape = (0, 3, *self.config.image.height_width)
        arrays = [view.image for one in views for view in one]
        return TinyLlavaInputs(**vars(prompt), pixels=np.stack(arrays) if arrays else np.zeros(shape, np.float32))

    def pixels(self, image: ImageSource) -> TinyLlavaPixels:
        """The tower's pixels of one picture. Raises UserError if it cannot be read, or has more views than one."""
        if self.config.tiling:
            raise UserError("processor.tiling cuts pictures into tiles, which training does not take; set it to null")
        return TinyLlavaPixels(self.config.image.pixels(self.load(image)))

    def load(self, image: ImageSource) -> Image.Image:
        """The picture that is looked at. Raises UserError if it cannot be read."""
        picture = load_image(image, max_pixels=self.config.max_pixels)
        return chat_picture(picture, self.config.web_chat_picture) if self.config.web_chat_picture else picture

    def views(self, image: ImageSource) -> list[TinyLlavaPixels]:
        config = self.config
        if config.tiling is None:
            return super().views(image)
        parts = config.tiling.tiles(self.load(image), config.image.height_width[0])
        return [TinyLlavaPixels(config.image.pixels(part)) for part in parts]

    def image_rows(self, image: ImageSource) -> ImageRows:
        config = self.config
        if config.tiling is None:
            return super().image_rows(image)
        edge = config.image.height_width[0]
        return config.tiling.image_rows(self.load(image).size, tile=edge, num_tokens=config.num_image_tokens)

    @property
    def picture_lengths(self) -> tuple[int, int]:
        config = self.config
        if config.tiling is None:
            return super().picture_lengths
        edge, num_tokens = config.image.height_width[0], config.num_image_tokens
        sizes = config.tiling.sizes
        lengths = [len(config.tiling.image_rows(size, tile=edge, num_tokens=num_tokens).rows) for size in sizes]
        return min(lengths), max(lengths)

    def with_usual_markers(self, query: str) -> str:
        return query.replace(QUICK_START_MARKER, IMAGE_MARKER)

    def question_turns(self, question: str) -> list[str]:
        return image_turns(self.template, question)

    def training_sample(self, record: dict | list, *, max_length: int) -> TrainingSample:
        """Ids and labels of a training record; the picture of a message moves to its front, as in the original, and
        gets the marks that the template announces.

        Raises:
            UserError: the record is malformed, or an image does not fit into `max_length`.
        """
        if self.config.original_parse:
            return self.original_sample(record, max_length=max_length)
        if isinstance(record, dict) and isinstance(record.get("conversations"), list) and record.get("image"):
            # the image span brings <im_start> and <im_end> itself
            marks = image_marks(self.template, use_im_start_end=False)
            record = {**record, "conversations": [shown_images(turn, marks) for turn in record["conversations"]]}
        return super().training_sample(record, max_length=max_length)

    def original_sample(self, record: dict | list, *, max_length: int) -> TrainingSample:
        """The sample of `llava_sample`, cut before and after its images become placeholders."""
        record = record if isinstance(record, dict) else {"conversations": record}
        sample = cut(self.unexpanded_sample(record, max_length=max_length), max_length)
        placeholder_id = self.tokenizer.special_id(IMAGE_MARKER)
        sample = expand_images(sample, placeholder_id=placeholder_id, num_tokens=self.image_span.num_tokens)
        needed = self.image_span.needed_length(sample.input_ids.tolist(), self.tokenizer)
        if needed > max_length:
            raise UserError(f"max_length {max_length} cuts an image of the sample, it needs {needed}; raise max_length")
        return cut(sample, max_length)

    def unexpanded_sample(self, record: dict, *, max_length: int) -> TrainingSample:
        """See `llava_sample`."""
        return llava_sample(
            record,
            tokenizer=self.tokenizer,
            template=self.template,
            max_length=max_length,
            image_marks=image_marks(self.template, self.config.use_im_start_end),
        )


def cut(sample: TrainingSample, length: int) -> TrainingSample:
    """The first `length` tokens of a sample."""
    return replace(sample, input_ids=sample.input_ids[:length], labels=sample.labels[:length])


def shown_images(turn: object, marks: tuple[str, str]) -> object:
    """A turn of a training record with these marks around its images; a single one moves to the front."""
    if not isinstance(turn, dict) or turn.get("from") != "human" or "value" not in turn:
        return turn
    text = str(turn["value"])
    shown = image_to_front(text, marks) if text.count(IMAGE_MARKER) == 1 else with_image_marks(text, marks)
    return {**turn, "value": shown}


def image_marks(template: ChatTemplate, use_im_start_end: bool) -> tuple[str, str]:
    """Text around every image of a training sample: what the template announces, and within it the image's span."""
    start, end = TAGGED_IMAGE if announces_images(template) else ("", "")
    return (start + IMAGE_START, IMAGE_END + end) if use_im_start_end else (start, end)


def image_span(config: TinyLlavaProcessorConfig) -> ImageSpan:
    """The tokens of one image."""
    if config.num_image_tokens < 1:
        raise UserError(f"processor.num_image_tokens is {config.num_image_tokens}; expected at least 1")
    start, end = (IMAGE_START, IMAGE_END) if config.use_im_start_end else ("", "")
    return ImageSpan(config.num_image_tokens, start=start, placeholder=IMAGE_MARKER, end=end)


def make_tokenizer(config: TinyLlavaProcessorConfig) -> Tokenizer:
    """The tokenizer with the tokens of an image."""
    more = [IMAGE_PATCH] if config.use_im_patch_token else []
    more += [IMAGE_START, IMAGE_END] if config.use_im_start_end else []
    tokenizer = open_tokenizer(config.tokenizer, more_special_tokens=more)
    tokenizer.add_placeholder(IMAGE_MARKER)
    if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer {config.tokenizer}: {tokenizer.vocab_size} tokens, but the model has embeddings for "
            f"{config.vocab_size}; use the tokenizer that belongs to the model"
        )
    return tokenizer


def new_image_marks(config: TinyLlavaProcessorConfig) -> list[int]:
    """Ids of `<im_start>` and `<im_end>`, where they are used and the tokenizer's own files lack them."""
    if not config.use_im_start_end:
        return []
    tokenizer, num_known = make_tokenizer(config), open_tokenizer(config.tokenizer).vocab_size
    return [token_id for token_id in map(tokenizer.special_id, (IMAGE_START, IMAGE_END)) if token_id >= num_known]
