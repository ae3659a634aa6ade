"""Opens a Hugging Face checkpoint folder: the run config follows from its config.json, and the vision tower may come
from a separate repository."""

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.core.config import convert_value
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.config import TinyLlavaConfig, check_processor
from mindvlm.models.tinyllava.hf_config import dialect_of, from_hf_config
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.names import MODELS
from mindvlm.models.tinyllava.processor import TinyLlavaProcessorConfig, clip_branch, make_tokenizer, siglip_branch
from mindvlm.models.tinyllava.tower_folder import (
    BESIDE,
    deleted_layer,
    in_tower,
    tower_config,
    tower_folders,
    tower_weights,
)
from mindvlm.nn.config import height_and_width
from mindvlm.processing.images.tiling import TilingConfig
from mindvlm.weights.config_json import FLAG, TEXT, ConfigTable, read_config, without_nulls
from mindvlm.weights.recognise import native_model, native_view
from mindvlm.weights.rules.findings import Finding
from mindvlm.weights.rules.overlaid import OverlaidSource, SelectedSource
from mindvlm.weights.rules.planning import make_plan

Infos = Mapping[str, TensorInfo]

TEMPLATES_OF_DIALECTS = {"phi": "phi", "stablelm": "phi", "llama": "v1"}
"""The templates of the published models. Other templates produce nonsense."""

LEGACY_TEMPLATE = "llava_hf"

TEMPLATE_KEY, SYSTEM_KEY = "conversation_template", "conversation_system"
"""Our own keys in the config.json of a model that was trained with another template or system message."""


def folder_config(folder: Path, overrides: dict[str, Any] | None = None) -> TinyLlavaConfig:
    """Returns the run config of a checkpoint folder.

    The vocabulary is cut to the length of the tokenizer, as in the original loader.

    Args:
        folder: folder with config.json, weights and tokenizer files.
        overrides: runtime keys that replace the defaults. `vision_tower` is the folder of a separate tower; its weights
            replace the tower in the checkpoint. A config.json, or a folder without weights, only describes the tower.

    Raises:
        UserError: config.json is missing or cannot be used, or an override is not a runtime key.
    """
    overrides = dict(overrides or {})
    tower = overrides.pop("vision_tower", None)
    data = read_config(folder)
    if data is None:
        raise UserError(f"{folder}: has no config.json; give the folder of a checkpoint, or a YAML")
    table = ConfigTable(without_nulls(data), f"{folder}/config.json")
    model = from_hf_config(data, vision_config=tower_config(table, folder, tower), path=table.path)
    if model.language_model is None or model.vision_tower is None:
        raise UserError(f"{folder}: config.json describes only a part of a model; give the folder of a whole TinyLLaVA")
    processor = processor_config(table, folder, model)
    model.language_model.vocab_size = min(model.language_model.vocab_size, make_tokenizer(processor).vocab_size)
    processor.vocab_size = model.language_model.vocab_size
    check_processor(model, processor)
    config = TinyLlavaConfig(name=folder.name, checkpoint=str(folder), model=model, processor=processor)
    config.vision_tower = tower_weights(table, folder, tower)
    known = {field.name for field in dataclasses.fields(config)} - {"family", "model", "processor", "generation"}
    for key, value in overrides.items():
        if key not in known:
            raise UserError(f"config key {key!r} cannot replace a value of {folder}; expected one of {sorted(known)}")
        setattr(config, key, convert_value(typing.get_type_hints(type(config))[key], value, key))
    return config


def processor_config(table: ConfigTable, folder: str | Path, model: TinyLlavaModelConfig) -> TinyLlavaProcessorConfig:
    """Returns the processor config of a checkpoint: template, picture size, image tokens.

    Args:
        table: contents of config.json, without nulls.
        folder: folder of the tokenizer's files.
        model: result of `from_hf_config` for the same file.

    Raises:
        UserError: the language model is unknown, the tower is not square, or a key of the tiles is wrong.
    """
    is_legacy = table.get("model_type", TEXT) == "llava"
    tower = model.vision_tower
    # a language model alone lacks the token
    has_patch_token = "mm_vision_tower" in table and not is_legacy and "text_config" not in table
    make_branch = siglip_branch if tower is None or tower.dialect == "siglip" else clip_branch
    height, width = height_and_width(tower.image_size) if tower else (384, 384)
    if height != width:
        raise UserError(f"{table.path}: the tower's image_size is {tower.image_size}; expected a square")
    aspect_ratio = table.get("image_aspect_ratio", TEXT) or "square"
    template = table.get(TEMPLATE_KEY, TEXT)
    return TinyLlavaProcessorConfig(
        tokenizer=str(folder),
        vocab_size=model.language_model.vocab_size if model.language_model else None,
        template=template or (LEGACY_TEMPLATE if is_legacy else template_of(table)),
        system=table.get(SYSTEM_KEY, TEXT),
        num_image_tokens=model.image_token_len,
        use_im_start_end=table.get("mm_use_im_start_end", FLAG, False),
        use_im_patch_token=table.get("mm_use_im_patch_token", FLAG, True) and has_patch_token,
        image=make_branch(height, aspect_ratio=aspect_ratio),
        tiling=tiling_of(table) if aspect_ratio == "anyres" else None,
    )


def tiling_of(table: ConfigTable) -> TilingConfig:
    """Returns the tiling of pictures.

    Raises:
        UserError: `mm_patch_merge_type` is wrong, or `image_grid_pinpoints` is neither a list nor the text of one.
    """
    pinpoints = table.values.get("image_grid_pinpoints")
    try:
        if isinstance(pinpoints, str):
            pinpoints = json.loads(pinpoints.replace("(", "[").replace(")", "]"))
    except ValueError:
        raise UserError(f"{table.path}: image_grid_pinpoints is {pinpoints!r}; expected a list") from None
    resolutions = convert_value(list[list[int]], pinpoints or [], "image_grid_pinpoints")
    return TilingConfig(resolutions=resolutions, merge=table.get("mm_patch_merge_type", TEXT) or "flat")


def template_of(table: ConfigTable) -> str:
    """Returns the name of the template of a checkpoint."""
    return TEMPLATES_OF_DIALECTS[dialect_of(table.table("text_config") or table)]


def sizes_remedy(config: TinyLlavaConfig, findings: Iterable[Finding]) -> str:
    """Returns a remedy for a folder whose weights contradict the sizes in its config.json."""
    folder, tower = Path(config.checkpoint), config.vision_tower
    data = read_config(folder) or {}
    name, is_described = data.get("mm_vision_tower"), "vision_config" in data or (folder / BESIDE).exists()
    is_assumed = name and tower is None and not is_described and not tower_folders(folder, name)
    if is_assumed and any(in_tower(finding.name) for finding in findings):
        return (
            f"the tower {name} was assumed to be the published one; if it is not, put its config.json beside the "
            f"weights as {BESIDE}, or give its folder as vision_tower"
        )
    return f"correct the sizes in {folder}/config.json, or use the weights that match it"


def view_with_parts(
    source: TensorSource, *, target_infos: Infos | None = None, vision_tower: TensorSource | None = None
) -> TensorSource:
    """Returns the tensors of a TinyLLaVA under native names; see `native_view`.

    Args:
        source: the checkpoint.
        target_infos: the tensors of the model.
        vision_tower: a checkpoint of the tower, of a whole CLIP or SigLIP as openai and google publish them, or of a
            TinyLLaVA. Its tower replaces the tower in `source`. The last layer of SigLIP, which TinyLLaVABench
            deletes, is dropped.

    Raises:
        ConversionError: the tensors do not match the model.
        UserError: there is no tower, or `native_view` raises it.
    """
    if vision_tower is None:
        wants_tower = any(map(in_tower, target_infos or ()))
        if wants_tower and not any(map(in_tower, source.infos)):
            raise UserError(
                f"{source.path}: holds no vision tower; give the folder of the tower's weights as vision_tower"
            )
        return native_view(source, MODELS, target_infos=target_infos)
    if target_infos is None:
        raise ValueError("a separate tower requires target_infos")
    rest = SelectedSource(source, [name for name in source.infos if not in_tower(name)])
    lower = native_view(rest, MODELS, target_infos=target_infos, partial=True)
    layers = [(str(source.path), lower), (str(vision_tower.path), _tower_of(vision_tower, target_infos))]
    whole = OverlaidSource(layers)
    table = native_model(target_infos, MODELS).native
    return make_plan(table, whole.infos, target_infos, origin=f"{source.path} with {vision_tower.path}").view(whole)


def _tower_of(source: TensorSource, target_infos: Infos) -> TensorSource:
    """Returns the tensors of the tower in a checkpoint, without the layer that TinyLLaVABench deletes."""
    native = native_view(source, MODELS, left_out=deleted_layer(target_infos))
    names = [name for name in native.infos if in_tower(name)]
    if not names:
        raise UserError(f"{source.path}: holds no vision tower; give the folder of a tower as vision_tower")
    return SelectedSource(native, names)
