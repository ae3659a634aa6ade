"""A model of ours as TinyLLaVABench or TinyLLaVA Factory describes it: config.json, the way back of `hf_config` and
`hf_processor`, with the tokenizer's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.models.hf.towers import CLIP_336, SIGLIP_384
from mindvlm.models.tinyllava.config import TinyLlavaConfig
from mindvlm.models.tinyllava.connector import ConnectorConfig
from mindvlm.models.tinyllava.hf_processor import SYSTEM_KEY, TEMPLATE_KEY, TEMPLATES_OF_DIALECTS
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.processing import make_tokenizer
from mindvlm.nn.decoder import DecoderConfig
from mindvlm.nn.patches import height_and_width
from mindvlm.nn.vit import VitConfig
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.weights.companions import read_companions
from mindvlm.weights.config_json import read_config

TYPES = {
    "phi": ("TinyLlavaPhiForCausalLM", "tiny_llava_phi"),
    "stablelm": ("TinyLlavaStablelmForCausalLM", "tiny_llava_stablelm"),
    "llama": ("TinyLlavaLlamaForCausalLM", "tiny_llava"),
}
PUBLISHED_TOWERS = {"siglip": "google/siglip-so400m-patch14-384", "clip": "openai/clip-vit-large-patch14-336"}


def companions(config: TinyLlavaConfig) -> dict[str, bytes]:
    """The small files that stand beside trained weights and make a model folder of them, by name.

    Raises:
        UserError: the tokenizer's files cannot be read.
    """
    path = Path(config.processor.tokenizer)
    files = read_companions(path) if path.is_dir() else {path.name: path.read_bytes()}
    # what it says is part of the config.json that is written
    files.pop("vision_config.json", None)
    source = (read_config(path) or {}) if path.is_dir() else {}
    description = hf_config(config, make_tokenizer(config.processor), source=source)
    return {**files, "config.json": (json.dumps(description, indent=2) + "\n").encode()}


def hf_config(
    config: TinyLlavaConfig, tokenizer: Tokenizer, *, source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The contents of a config.json, from which `run_config` makes the same model again.

    Args:
        config: of a whole model.
        tokenizer: of the model.
        source: the config.json of the model, or of the decoder, that this one was trained from.

    Raises:
        UserError: it is a part of a model.
    """
    model = config.model
    decoder, tower = model.language_model, model.vision_tower
    if decoder is None or tower is None:
        raise UserError("config.json describes a whole TinyLLaVA; this is a part of one")
    dialect, end_id = dialect_of(decoder), tokenizer.special_id(tokenizer.end_token)
    text = (source or {}).get("text_config") or source or {}
    text_keys = {
        **decoder_keys(decoder, dialect),
        "max_position_embeddings": text.get("max_position_embeddings", model.max_length),
        "bos_token_id": (tokenizer.prefix_ids or [end_id])[0],
        "eos_token_id": end_id,
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": False,
    }
    both = {
        "tokenizer_model_max_length": model.max_length,
        "tokenizer_padding_side": "right",
        **picture_keys(config),
        **template_keys(config, dialect),
        "use_cache": True,
        "torch_dtype": config.dtype,
    }
    if is_factory(model):
        return {**factory_source(source or {}), **factory_keys(model, {**text_keys, "model_type": dialect}), **both}
    return {**bench_keys(config, dialect), **text_keys, **both}


def bench_keys(config: TinyLlavaConfig, dialect: str) -> dict[str, Any]:
    """What TinyLLaVABench calls itself, its tower, the feature and the connector."""
    model, processor = config.model, config.processor
    tower, connector = model.vision_tower, model.connector
    architecture, model_type = TYPES[dialect]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "mm_vision_tower": tower_name(tower),
        "vision_config": tower_keys(tower),
        "mm_hidden_size": tower.hidden_size,
        "mm_projector_type": connector.type,
        **resampler_keys(connector),
        "mm_vision_select_layer": -2 if tower.dialect == "siglip" else model.vision_select_layer,
        "mm_vision_select_feature": "patch" if tower.dialect == "siglip" or model.num_dropped_tokens else "cls_patch",
        "mm_use_im_start_end": processor.use_im_start_end,
        "mm_use_im_patch_token": processor.use_im_patch_token,
        "use_mm_proj": True,
    }


def is_factory(model: TinyLlavaModelConfig) -> bool:
    """Whether TinyLLaVABench cannot have this model and TinyLLaVA Factory can: the head has a bias, or the feature is
    not the last state of SigLIP, all of it."""
    feature = (model.vision_select_layer, model.num_dropped_tokens)
    return model.language_model.head_bias or (model.vision_tower.dialect == "siglip" and feature != (-1, 0))


def factory_keys(model: TinyLlavaModelConfig, text_config: dict[str, Any]) -> dict[str, Any]:
    """What TinyLLaVA Factory calls itself, its tower, the feature and the connector."""
    tower, connector = model.vision_tower, model.connector
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "text_config": text_config,
        "hidden_size": text_config["hidden_size"],
        "vocab_size": text_config["vocab_size"],
        "vision_config": tower_keys(tower, keeps_last_layer=True),
        "vision_hidden_size": tower.hidden_size,
        "vision_feature_layer": model.vision_select_layer,
        "vision_feature_select_strategy": "patch" if model.num_dropped_tokens else "cls_patch",
        "connector_type": connector.type,
        **resampler_keys(connector),
    }


def factory_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a Factory's config.json that say which published parts it was made of."""
    return {key: value for key, value in source.items() if key.endswith("_name_or_path")}


def resampler_keys(connector: ConnectorConfig) -> dict[str, Any]:
    """Sizes of a resampler; nothing of another connector."""
    return {key: value for key, value in vars(connector).items() if key != "type" and connector.type == "resampler"}


def template_keys(config: TinyLlavaConfig, dialect: str) -> dict[str, Any]:
    """Keys of ours, where the template is another one than the decoder's."""
    template, system = config.processor.template, config.processor.system
    keys = {} if template == TEMPLATES_OF_DIALECTS[dialect] else {TEMPLATE_KEY: template}
    return keys if system is None else {**keys, SYSTEM_KEY: system}


def picture_keys(config: TinyLlavaConfig) -> dict[str, Any]:
    """What becomes of a picture: padding, or tiles and the order of their feature rows."""
    tiling = config.processor.tiling
    if tiling:
        keys = {"image_grid_pinpoints": tiling.resolutions, "mm_patch_merge_type": tiling.merge}
        return {"image_aspect_ratio": "anyres", **keys}
    # without tiles the row is of no use, but it is among the weights
    merge = "spatial_unpad" if config.model.image_newline else "flat"
    is_padded = config.processor.image.padding == "centre"
    return {"image_aspect_ratio": "pad" if is_padded else "square", "mm_patch_merge_type": merge}


def dialect_of(decoder: DecoderConfig) -> str:
    """ "phi", "stablelm" or "llama"."""
    if decoder.residual == "parallel":
        return "phi"
    return "stablelm" if decoder.norm == "layer_norm" else "llama"


def decoder_keys(decoder: DecoderConfig, dialect: str) -> dict[str, Any]:
    """What transformers calls the sizes of a decoder."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "hidden_act", "rope_theta", "initializer_range")
    own = {
        "phi": {
            "layer_norm_eps": decoder.layer_norm_eps,
            "partial_rotary_factor": decoder.partial_rotary_factor,
            "resid_pdrop": decoder.residual_dropout,
        },
        "stablelm": {
            "norm_eps": decoder.layer_norm_eps,
            "rope_pct": decoder.partial_rotary_factor,
            "use_qkv_bias": decoder.qkv_bias,
        },
        "llama": {"rms_norm_eps": decoder.rms_norm_eps},
    }
    return {**{key: getattr(decoder, key) for key in same}, **own[dialect]}


def tower_keys(tower: VitConfig, *, keeps_last_layer: bool = False) -> dict[str, Any]:
    """The config.json of a tower; that of SigLIP counts the layer that TinyLLaVABench deletes, and Factory keeps."""
    is_deleted = tower.dialect == "siglip" and not keeps_last_layer
    height, width = height_and_width(tower.image_size)
    return {
        **{key: value for key, value in vars(tower).items() if key != "dialect"},
        "model_type": f"{tower.dialect}_vision_model",
        "image_size": height if height == width else [height, width],
        "num_hidden_layers": tower.num_hidden_layers + is_deleted,
    }


def tower_name(tower: VitConfig) -> str:
    """The published tower of these sizes, or its kind: the original chooses its class by the name."""
    published = SIGLIP_384 if tower.dialect == "siglip" else CLIP_336
    keys = tower_keys(tower)
    is_published = all(keys[key] == value for key, value in published.items())
    return PUBLISHED_TOWERS[tower.dialect] if is_published else tower.dialect
