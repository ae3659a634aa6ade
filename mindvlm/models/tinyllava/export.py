"""The config.json of a trained model, in the form of TinyLLaVABench or TinyLLaVA Factory."""

from collections.abc import Mapping
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.models.hf.decoders import decoder_keys, dialect_of_decoder
from mindvlm.models.hf.export import (
    folder_files,
    not_described,
    require_described,
    scope_keys,
    source_config,
    tower_name,
)
from mindvlm.models.hf.towers import tower_keys
from mindvlm.models.tinyllava.config import TinyLlavaConfig
from mindvlm.models.tinyllava.folder import SYSTEM_KEY, TEMPLATE_KEY, TEMPLATES_OF_DIALECTS
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model_config import ConnectorConfig, TinyLlavaModelConfig
from mindvlm.models.tinyllava.processor import make_tokenizer
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.weights.trained_parts import PartFiles

TYPES = {
    "phi": ("TinyLlavaPhiForCausalLM", "tiny_llava_phi"),
    "stablelm": ("TinyLlavaStablelmForCausalLM", "tiny_llava_stablelm"),
    "llama": ("TinyLlavaLlamaForCausalLM", "tiny_llava"),
}
PART_FILES = PartFiles({"mm_projector.bin": ("mm_projector.", "image_newline", "language_model.embed_tokens.")})
"""The file of a run of the connector alone, for TinyLLaVABench's `pretrain_mm_mlp_adapter`."""


def companions(config: TinyLlavaConfig) -> dict[str, bytes]:
    """Returns name -> content of the files that turn trained weights into a model folder.

    Raises:
        UserError: the tokenizer's files cannot be read, or no config.json can describe the model.
    """
    tokenizer = config.processor.tokenizer
    description = hf_config(config, make_tokenizer(config.processor), source=source_config(tokenizer))
    parts, others = ("language_model", "vision_tower", "connector"), ("tune", "padding_token_id")
    require_described(config.model, description, read=from_hf_config, parts=parts, others=others)
    return folder_files(tokenizer, description)


def hf_config(
    config: TinyLlavaConfig, tokenizer: Tokenizer, *, source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the config.json of a model; the reverse of `folder_config`.

    Args:
        config: run config of a whole model.
        tokenizer: tokenizer of the model.
        source: config.json of the model, or of the decoder, that training started from.

    Raises:
        UserError: the model has no decoder or no tower, or a decoder that no TinyLLaVA has.
    """
    model = config.model
    decoder, tower = model.language_model, model.vision_tower
    if decoder is None or tower is None:
        raise UserError("config.json describes a whole TinyLLaVA; the model lacks a decoder or a tower")
    dialect, end_id = dialect_of_decoder(decoder), tokenizer.special_id(tokenizer.end_token)
    if dialect not in TYPES:
        raise not_described("language_model.qkv_bias", decoder.qkv_bias, not decoder.qkv_bias)
    text = (source or {}).get("text_config") or source or {}
    text_keys = {
        **decoder_keys(decoder),
        "max_position_embeddings": text.get("max_position_embeddings", model.max_length),
        "bos_token_id": (tokenizer.prefix_ids or [end_id])[0],
        "eos_token_id": end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    both = {
        "tokenizer_model_max_length": model.max_length,
        "tokenizer_padding_side": "right",
        **picture_keys(config),
        **template_keys(config, dialect),
        **scope_keys(config),
        "use_cache": True,
        "torch_dtype": config.dtype,
    }
    if is_factory(model):
        return {**factory_source(source or {}), **factory_keys(model, {**text_keys, "model_type": dialect}), **both}
    return {**bench_keys(config, dialect), **text_keys, **both}


def bench_keys(config: TinyLlavaConfig, dialect: str) -> dict[str, Any]:
    """Returns TinyLLaVABench's keys for the model type, the tower, its features and the connector."""
    model, processor = config.model, config.processor
    tower, connector = model.vision_tower, model.connector
    architecture, model_type = TYPES[dialect]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "mm_vision_tower": tower_name(tower),
        "vision_config": tower_keys(tower, deletes_last_layer=True),
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
    """Returns whether only TinyLLaVA Factory's layout can describe this model.

    That is the case if the head has a bias, or if SigLIP's features are not the whole last state.
    """
    feature = (model.vision_select_layer, model.num_dropped_tokens)
    return model.language_model.head_bias or (model.vision_tower.dialect == "siglip" and feature != (-1, 0))


def factory_keys(model: TinyLlavaModelConfig, text_config: dict[str, Any]) -> dict[str, Any]:
    """Returns TinyLLaVA Factory's keys for the model type, the tower, its features and the connector."""
    tower, connector = model.vision_tower, model.connector
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "text_config": text_config,
        "hidden_size": text_config["hidden_size"],
        "vocab_size": text_config["vocab_size"],
        "vision_config": tower_keys(tower),
        "vision_hidden_size": tower.hidden_size,
        "vision_feature_layer": model.vision_select_layer,
        "vision_feature_select_strategy": "patch" if model.num_dropped_tokens else "cls_patch",
        "connector_type": connector.type,
        **resampler_keys(connector),
    }


def factory_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a Factory config.json that name the published parts of the model."""
    return {key: value for key, value in source.items() if key.endswith("_name_or_path")}


def resampler_keys(connector: ConnectorConfig) -> dict[str, Any]:
    """Returns the sizes of a resampler; empty for another connector."""
    return {key: value for key, value in vars(connector).items() if key != "type" and connector.type == "resampler"}


def template_keys(config: TinyLlavaConfig, dialect: str) -> dict[str, Any]:
    """Returns our own keys for a template or system message other than the decoder's default."""
    template, system = config.processor.template, config.processor.system
    keys = {} if template == TEMPLATES_OF_DIALECTS[dialect] else {TEMPLATE_KEY: template}
    return keys if system is None else {**keys, SYSTEM_KEY: system}


def picture_keys(config: TinyLlavaConfig) -> dict[str, Any]:
    """Returns the keys for padding a picture, or for its tiles and the order of their feature rows."""
    tiling = config.processor.tiling
    if tiling:
        keys = {"image_grid_pinpoints": tiling.resolutions, "mm_patch_merge_type": tiling.merge}
        return {"image_aspect_ratio": "anyres", **keys}
    # the row has no effect without tiles, but the weights contain it
    merge = "spatial_unpad" if config.model.image_newline else "flat"
    is_padded = config.processor.image.padding == "centre"
    return {"image_aspect_ratio": "pad" if is_padded else "square", "mm_patch_merge_type": merge}
