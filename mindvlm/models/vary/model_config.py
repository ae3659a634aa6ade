"""Which parts a Vary model has and of what size; impossible sizes are errors that name the key."""

import math
from dataclasses import dataclass

from mindvlm.core.errors import UserError
from mindvlm.models.vary.vision_vocabulary import VisionVocabularyConfig
from mindvlm.nn.checks import (
    check_divides,
    check_image_size,
    check_language_model,
    check_positive,
    check_vision_tower,
)
from mindvlm.nn.decoder import DecoderConfig
from mindvlm.nn.patches import grid_size
from mindvlm.nn.vit import VitConfig


@dataclass(kw_only=True)
class VaryModelConfig:
    """The parts of a Vary model; a part that is None is left out.

    A decoder and a vision vocabulary without a `vision_tower` (CLIP) are a Vary-tiny. `image_token_len` is the number
    of feature rows (and placeholders) per image, `max_length` the longest prompt plus answer in tokens.
    """

    language_model: DecoderConfig | None
    vision_tower: VitConfig | None
    vision_vocabulary: VisionVocabularyConfig | None
    vision_select_layer: int = -2
    image_token_len: int = 256
    max_length: int = 2048
    freeze_vision_tower: bool = True

    def __post_init__(self):
        lm, vit, sam = self.language_model, self.vision_tower, self.vision_vocabulary
        if vit:
            check_vision_tower(vit, self.vision_select_layer)
        if sam:
            check_vision_vocabulary(sam)
        if lm:
            check_language_model(lm, max_length=self.max_length)
        if self.max_length < 1:
            raise UserError(f"model.max_length is {self.max_length}; expected at least 1")
        if lm and vit and sam:
            self.check_image_token_len(num_tower_tokens(vit), num_vocabulary_tokens(sam))
        elif self.is_tiny and self.image_token_len != num_vocabulary_tokens(sam):
            raise UserError(
                f"model.image_token_len is {self.image_token_len} but the vision vocabulary gives "
                f"{num_vocabulary_tokens(sam)} tokens an image; set it to {num_vocabulary_tokens(sam)}"
            )

    @property
    def is_tiny(self) -> bool:
        """Whether the parts are those of Vary-tiny."""
        return bool(self.language_model and self.vision_vocabulary and not self.vision_tower)

    def check_image_token_len(self, num_tower: int, num_vocabulary: int) -> None:
        """The features of both towers stand side by side in one row for each placeholder."""
        if num_tower != num_vocabulary:
            raise UserError(
                f"model.vision_tower gives {num_tower} tokens an image but model.vision_vocabulary {num_vocabulary}; "
                "change an image_size or patch_size so that the two are equal"
            )
        if self.image_token_len != num_tower:
            raise UserError(
                f"model.image_token_len is {self.image_token_len} but both towers give {num_tower} tokens an image; "
                f"set it to {num_tower}"
            )


def num_tower_tokens(vit: VitConfig) -> int:
    """Patches of an image, without the class token."""
    rows, columns = grid_size(vit.image_size, vit.patch_size)
    return rows * columns


def num_vocabulary_tokens(sam: VisionVocabularyConfig) -> int:
    """Cells that two convolutions of stride 2 leave of the patches."""
    rows, columns = grid_size(sam.image_size, sam.patch_size)
    return math.ceil(rows / 4) * math.ceil(columns / 4)


def check_vision_vocabulary(sam: VisionVocabularyConfig) -> None:
    """Raises UserError where the vision vocabulary cannot be built."""
    check_positive("vision_vocabulary", sam)
    check_divides("vision_vocabulary", sam.embed_dim, sam.num_heads)
    check_image_size("vision_vocabulary", sam.image_size, sam.patch_size)
    if sam.window_size < 0:
        raise UserError(f"model.vision_vocabulary.window_size is {sam.window_size}; expected 0 (none) or more")
    for index in sam.global_attn_indexes:
        if not 0 <= index < sam.depth:
            raise UserError(
                f"model.vision_vocabulary.global_attn_indexes names block {index}; "
                f"expected 0..{sam.depth - 1}, as depth is {sam.depth}"
            )
