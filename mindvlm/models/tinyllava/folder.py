"""Opens a Hugging Face checkpoint folder: the run config follows from its config.json, and the vision tower may come
from a separate repository."""

import json
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.opening import part_folders
from mindvlm.core.config import convert_value
from mindvlm.core.errors import UserError
from mindvlm.models.hf.tower_folder import tower_config, tower_weights
from mindvlm.models.run_config import read_scope, replace_keys
from mindvlm.models.tinyllava.config import TinyLlavaConfig, check_processor
from mindvlm.models.tinyllava.hf_config import dialect_of, from_hf_config
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.processor import TinyLlavaProcessorConfig, clip_branch, make_tokenizer, siglip_branch
from mindvlm.nn.config import height_and_width
from mindvlm.processing.images.tiling import TilingConfig
from mindvlm.weights.config_json import FLAG, TEXT, ConfigTable, read_config, without_nulls

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
        raise UserError(
            f"{folder}: has no config.json; give the folder of a checkpoint, or a YAML with this checkpoint"
        )
    table = ConfigTable(without_nulls(data), f"{folder}/config.json")
    model = from_hf_config(data, vision_config=tower_config(table, folder, tower), path=table.path)
    if model.language_model is None or model.vision_tower is None:
        above = folder.absolute().parent
        if folder.absolute() in part_folders(above):
            remedy = f"give {above}, which holds the model in parts"
        else:
            remedy = (
                "give the folder of a whole TinyLLaVA, or join the parts: mindvlm-convert --torch_ckpt_path DECODER "
                "TOWER CONNECTOR --to hf --mindspore_ckpt_path FOLDER"
            )
        raise UserError(f"{folder}: config.json describes only a part of a model; {remedy}")
    processor = processor_config(table, folder, model)
    model.language_model.vocab_size = min(model.language_model.vocab_size, make_tokenizer(processor).vocab_size)
    processor.vocab_size = model.language_model.vocab_size
    check_processor(model, processor)
    config = TinyLlavaConfig(name=folder.name, checkpoint=str(folder), model=model, processor=processor)
    config.scope = read_scope(table)
    config.vision_tower = tower_weights(table, folder, tower)
    replace_keys(config, overrides, folder)
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
