"""Configs of the Vary family: from our YAML, from MindOCR's YAML and from the released config.json."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mindvlm.config import GenerationConfig, build_config, resolve_path
from mindvlm.errors import UserError
from mindvlm.models.common.activation import ACTIVATIONS
from mindvlm.models.common.decoder import DecoderConfig
from mindvlm.models.common.patches import grid_size, height_and_width
from mindvlm.models.common.vit import VitConfig
from mindvlm.models.vary.mindocr_config import from_mindocr, released_clip
from mindvlm.models.vary.processing import VaryProcessorConfig
from mindvlm.models.vary.vision_vocabulary import VisionVocabularyConfig
from mindvlm.runtime import RuntimeConfig


@dataclass(kw_only=True)
class VaryModelConfig:
    """The parts of a Vary model; a part that is None is left out.

    `image_token_len` is the number of feature rows (and placeholders) per image, `max_length` the longest prompt plus
    answer in tokens.
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
            check_positive("vision_tower", vit)
            check_divides("vision_tower", vit.hidden_size, vit.num_attention_heads)
            check_image_size("vision_tower", vit.image_size, vit.patch_size)
            if vit.hidden_act not in ACTIVATIONS:
                raise UserError(
                    f"model.vision_tower.hidden_act is {vit.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}"
                )
            if not -vit.num_hidden_layers - 1 <= self.vision_select_layer <= vit.num_hidden_layers:
                raise UserError(
                    f"model.vision_select_layer is {self.vision_select_layer}; the tower has "
                    f"{vit.num_hidden_layers} layers, so expected -{vit.num_hidden_layers + 1}..{vit.num_hidden_layers}"
                )
        if sam:
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
        if lm:
            check_positive("language_model", lm)
            if lm.hidden_size % 2:
                raise UserError(f"model.language_model.hidden_size is {lm.hidden_size}; expected an even number")
            if lm.head_dim % 2:
                raise UserError(f"model.language_model.head_dim is {lm.head_dim}; rotary positions need an even number")
            if lm.use_logn_attn and self.max_length > 32767:
                raise UserError(f"model.max_length is {self.max_length}; LogN attention is defined up to 32767 tokens")
        if self.max_length < 1:
            raise UserError(f"model.max_length is {self.max_length}; expected at least 1")
        if lm and vit and sam:
            self.check_image_token_len(num_tower_tokens(vit), num_vocabulary_tokens(sam))

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


def check_positive(section: str, config) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type in (int, "int") and value < 1 and f.name != "window_size":
            raise UserError(f"model.{section}.{f.name} is {value}; expected at least 1")
        if f.type in (float, "float") and not 0 < value < math.inf:
            raise UserError(f"model.{section}.{f.name} is {value}; expected a finite number above 0")


def check_image_size(section: str, image_size: int | list[int], patch_size: int) -> None:
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    if len(sides) != 2 or min(sides) < patch_size:
        raise UserError(
            f"model.{section}.image_size is {image_size}; expected one number or [height, width], each at least the "
            f"patch_size of {patch_size}"
        )


def check_divides(section: str, width: int, num_heads: int) -> None:
    if width % num_heads:
        raise UserError(f"model.{section}: width {width} is not a multiple of {num_heads} attention heads")


@dataclass(kw_only=True)
class VaryConfig(RuntimeConfig):
    """Everything that `mindvlm.load` needs: the runtime keys of `RuntimeConfig` and these sections."""

    family: Literal["vary"] = "vary"
    name: str = "vary"
    checkpoint: str | None = None
    model: VaryModelConfig
    processor: VaryProcessorConfig
    generation: GenerationConfig = field(default_factory=GenerationConfig)


def parse_config(data: dict, path: Path) -> VaryConfig:
    """Typed config from the YAML's mapping; MindOCR's own file is understood too."""
    data = from_mindocr(data)
    config = build_config(VaryConfig, data)
    config.checkpoint = resolve_path(config.checkpoint, path)
    config.processor.vocab_file = resolve_path(config.processor.vocab_file, path)
    if config.model.language_model and config.processor.vocab_size is None:
        config.processor.vocab_size = config.model.language_model.vocab_size
    check_processor(config.model, config.processor)
    return config


def check_processor(model: VaryModelConfig, processor: VaryProcessorConfig) -> None:
    """Raises UserError where the processor would make something else than the model takes."""
    if processor.num_image_tokens != model.image_token_len:
        raise UserError(
            f"processor.num_image_tokens is {processor.num_image_tokens} but model.image_token_len is "
            f"{model.image_token_len}; the two must be equal"
        )
    if model.language_model and processor.vocab_size != model.language_model.vocab_size:
        raise UserError(
            f"processor.vocab_size is {processor.vocab_size} but model.language_model.vocab_size is "
            f"{model.language_model.vocab_size}; the two must be equal"
        )
    for name, branch, section, tower in (
        ("clip", processor.clip, "vision_tower", model.vision_tower),
        ("high", processor.high, "vision_vocabulary", model.vision_vocabulary),
    ):
        if branch.resize == "keep":
            raise UserError(f"processor.{name}.resize is 'keep'; the model takes pictures of one size, choose another")
        if tower and branch.height_width != height_and_width(tower.image_size):
            raise UserError(
                f"processor.{name}.size is {branch.size} but model.{section}.image_size is {tower.image_size}; "
                "the two must be equal"
            )


def from_hf_config(data: dict) -> VaryModelConfig:
    """Model config from a Vary-toy config.json (Hugging Face layout).

    `vision_config` (a CLIP vision config) and `vision_high_config` may be present; a released Vary-toy has neither and
    gets CLIP ViT-L/14 and SAM ViT-B. A file that only describes one part gives a model of that part. The towers are
    frozen whatever `freeze_vision_tower` says: the original program never lets a gradient into them.
    """
    lm = None
    if "num_hidden_layers" in data:
        lm = DecoderConfig(
            vocab_size=data["vocab_size"],
            hidden_size=data["hidden_size"],
            num_hidden_layers=data["num_hidden_layers"],
            num_attention_heads=data["num_attention_heads"],
            head_dim=data["kv_channels"],
            # the released file counts both MLP branches
            intermediate_size=data["intermediate_size"] // 2,
            rms_norm_eps=data["layer_norm_epsilon"],
            rope_theta=data["rotary_emb_base"],
            training_length=data["seq_length"],
            use_dynamic_ntk=data["use_dynamic_ntk"],
            use_logn_attn=data["use_logn_attn"],
            initializer_range=data.get("initializer_range", 0.02),
        )
    has_images = "im_patch_token" in data
    vit = vit_config(data.get("vision_config") or released_clip()) if has_images or "vision_config" in data else None
    sam = None
    if has_images or "vision_high_config" in data:
        sam = VisionVocabularyConfig(**data.get("vision_high_config", {}))
    return VaryModelConfig(
        language_model=lm,
        vision_tower=vit,
        vision_vocabulary=sam,
        vision_select_layer=data.get("vision_select_layer", -2),
        image_token_len=data.get("image_token_len", num_tower_tokens(vit) if vit else 256),
        max_length=min(data.get("max_position_embeddings", 2048), 32767),
    )


def vit_config(data: dict) -> VitConfig:
    known = {f.name for f in dataclasses.fields(VitConfig)}
    return VitConfig(**{key: value for key, value in data.items() if key in known})
