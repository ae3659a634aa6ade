"""Configs of the Vary family: from our YAML, from MindOCR's YAML and from the released config.json."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mindvlm.config import GenerationConfig, build_config, resolve_path
from mindvlm.errors import UserError
from mindvlm.models.common.decoder import DecoderConfig
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
            if not -vit.num_hidden_layers - 1 <= self.vision_select_layer <= vit.num_hidden_layers:
                raise UserError(
                    f"model.vision_select_layer is {self.vision_select_layer}; the tower has "
                    f"{vit.num_hidden_layers} layers, so expected -{vit.num_hidden_layers + 1}..{vit.num_hidden_layers}"
                )
        if sam:
            check_positive("vision_vocabulary", sam)
            check_divides("vision_vocabulary", sam.embed_dim, sam.num_heads)
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


def check_positive(section: str, config) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type in (int, "int") and value < 1 and f.name != "window_size":
            raise UserError(f"model.{section}.{f.name} is {value}; expected at least 1")


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
    if config.processor.num_image_tokens != config.model.image_token_len:
        raise UserError(
            f"processor.num_image_tokens is {config.processor.num_image_tokens} but model.image_token_len is "
            f"{config.model.image_token_len}; the two must be equal"
        )
    return config


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
        image_token_len=data.get("image_token_len", 256),
        max_length=min(data.get("max_position_embeddings", 2048), 32767),
    )


def vit_config(data: dict) -> VitConfig:
    known = {f.name for f in dataclasses.fields(VitConfig)}
    return VitConfig(**{key: value for key, value in data.items() if key in known})
