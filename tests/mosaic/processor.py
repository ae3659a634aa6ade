"""From a question and pictures to the inputs of a Mosaic."""

from dataclasses import dataclass

import numpy as np

from mindvlm.processing.chat_processor import ChatProcessor
from mindvlm.processing.images.image_branch import ImageBranchConfig
from mindvlm.processing.images.image_span import IMAGE_MARKER, ImageSpan
from mindvlm.processing.images.loading import ImageSource, load_image
from mindvlm.processing.text.chat_template import ChatTemplate
from mindvlm.processing.text.tokenizer_files import open_tokenizer

TEMPLATE = ChatTemplate(
    name="mosaic", style="colon_pair", system="", roles=("Q", "A"), separator=" ", answer_separator="</s>"
)


@dataclass(kw_only=True)
class MosaicProcessorConfig:
    tokenizer: str
    num_image_tokens: int = 4
    size: int = 8


@dataclass(frozen=True)
class MosaicPixels:
    """One picture: float32 array (3, height, width)."""

    image: np.ndarray


class MosaicProcessor(ChatProcessor):
    def __init__(self, config: MosaicProcessorConfig):
        self.branch = ImageBranchConfig(size=config.size, resize="squash")
        tokenizer = open_tokenizer(config.tokenizer)
        tokenizer.add_placeholder(IMAGE_MARKER)
        span = ImageSpan(config.num_image_tokens, start="", placeholder=IMAGE_MARKER, end="")
        super().__init__(tokenizer, TEMPLATE, span, image_joint="\n")

    def pixels(self, image: ImageSource) -> MosaicPixels:
        return MosaicPixels(self.branch.pixels(load_image(image)))
