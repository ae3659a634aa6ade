"""Writes what other programs read beside trained weights: a config.json in the form of TinyLLaVABench or TinyLLaVA
Factory, the tokenizer's files, and files of single parts."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.hf.decoders import decoder_keys, dialect_of_decoder
from mindvlm.models.hf.towers import CLIP_336, SIGLIP_384, tower_keys
from mindvlm.models.tinyllava.config import TinyLlavaConfig
from mindvlm.models.tinyllava.folder import SYSTEM_KEY, TEMPLATE_KEY, TEMPLATES_OF_DIALECTS
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model_config import ConnectorConfig, TinyLlavaModelConfig
from mindvlm.models.tinyllava.names import MODELS
from mindvlm.models.tinyllava.processor import make_tokenizer
from mindvlm.nn.config import VitConfig
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.weights.companions import read_companions
from mindvlm.weights.config_json import read_config, shown
from mindvlm.weights.recognise import native_model
from mindvlm.weights.rules.overlaid import SelectedSource
from mindvlm.weights.rules.planning import make_plan

TYPES = {
    "phi": ("TinyLlavaPhiForCausalLM", "tiny_llava_phi"),
    "stablelm": ("TinyLlavaStablelmForCausalLM", "tiny_llava_stablelm"),
    "llama": ("TinyLlavaLlamaForCausalLM", "tiny_llava"),
}
PUBLISHED_TOWERS = {"siglip": "google/siglip-so400m-patch14-384", "clip": "openai/clip-vit-large-patch14-336"}
CONNECTOR_FILE, TRAINED_WHOLE_FILE = "mm_projector.bin", "non_lora_trainables.bin"
# parameters that a run of the connector alone may train
_STAGE_ONE = ("mm_projector.", "image_newline", "language_model.embed_tokens.")


def companions(config: TinyLlavaConfig) -> dict[str, bytes]:
    """Returns name -> content of the files that turn trained weights into a model folder.

    Raises:
        UserError: the tokenizer's files cannot be read, or no config.json can describe the model.
    """
    path = Path(config.processor.tokenizer)
    files = read_companions(path) if path.is_dir() else {path.name: path.read_bytes()}
    source = (read_config(path) or {}) if path.is_dir() else {}
    description = hf_config(config, make_tokenizer(config.processor), source=source)
    require_described(config.model, description)
    return {**files, "config.json": (json.dumps(description, indent=2) + "\n").encode()}


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
        raise _not_described("language_model.qkv_bias", decoder.qkv_bias, not decoder.qkv_bias)
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
        "use_cache": True,
        "torch_dtype": config.dtype,
    }
    if is_factory(model):
        return {**factory_source(source or {}), **factory_keys(model, {**text_keys, "model_type": dialect}), **both}
    return {**bench_keys(config, dialect), **text_keys, **both}


def require_described(model: TinyLlavaModelConfig, description: dict[str, Any]) -> None:
    """Raises UserError if a config.json does not describe the model, so that its checkpoints would be another model."""
    try:
        found = from_hf_config(description)
    except UserError as error:
        raise UserError(
            f"checkpoints of this model could not be loaded, because no config.json describes it ({error}); correct "
            "the section model, or model_changes.model"
        ) from None
    expected, described = _flat(asdict(model)), _flat(asdict(found))
    for key, value in expected.items():
        if described[key] != value:
            raise _not_described(key, value, described[key])


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that make a model by dotted key, without those of training and of the tokenizer."""
    flat = {key: value for key, value in config.items() if key not in ("tune", "padding_token_id")}
    for part in ("language_model", "vision_tower", "connector"):
        flat |= {f"{part}.{key}": value for key, value in flat.pop(part).items()}
    return flat


def _not_described(key: str, value: Any, described: Any) -> UserError:
    return UserError(
        f"model.{key} is {shown(value)}, but the config.json of a checkpoint can only say {shown(described)}, so "
        f"checkpoints of this model could not be loaded; set it to {shown(described)}"
    )


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


def tower_name(tower: VitConfig) -> str:
    """Returns the name of the published tower of these sizes, or its kind; the original picks the class by it."""
    published = SIGLIP_384 if tower.dialect == "siglip" else CLIP_336
    keys = tower_keys(tower, deletes_last_layer=True)
    is_published = all(keys[key] == value for key, value in published.items())
    return PUBLISHED_TOWERS[tower.dialect] if is_published else tower.dialect


def write_trained_parts(folder: Path, trained: Collection[str]) -> None:
    """Writes the files of single parts that TinyLLaVABench reads, from the weights in a checkpoint folder.

    A run that trains only the connector gets `mm_projector.bin`, for `pretrain_mm_mlp_adapter`. A run with adapters
    gets `non_lora_trainables.bin`, which TinyLLaVABench loads with the adapter.

    Args:
        folder: folder of the trained weights.
        trained: native names of the trained parameters.

    Raises:
        UserError: a file cannot be written.
    """
    adapter = folder / "adapter_model.safetensors"
    if adapter.exists():
        with open_checkpoint(adapter) as checkpoint:
            whole = [name for name in checkpoint.infos if ".lora_" not in name]
            if whole:
                write_checkpoint(folder / TRAINED_WHOLE_FILE, SelectedSource(checkpoint, whole))
    elif any(name.startswith("mm_projector.") for name in trained) and all(n.startswith(_STAGE_ONE) for n in trained):
        with open_checkpoint(folder / "weights.safetensors") as checkpoint:
            table = native_model(checkpoint.infos, MODELS).hf_tables_for(checkpoint.infos)[0].reverse()
            plan = make_plan(table, checkpoint.infos, origin=str(checkpoint.path))
            part = [name for name in plan.infos if set(plan.sources_of(name)) <= set(trained)]
            write_checkpoint(folder / CONNECTOR_FILE, SelectedSource(plan.view(checkpoint), part))
