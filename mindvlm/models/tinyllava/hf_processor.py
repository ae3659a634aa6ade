"""Processor configs from the config.json of a checkpoint: which template, which picture, which marks around images."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.core.config import convert_value
from mindvlm.core.errors import UserError
from mindvlm.models.hf.decoders import dialect_of
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.processing import TinyLlavaProcessorConfig, clip_branch, siglip_branch
from mindvlm.nn.patches import height_and_width
from mindvlm.processing.images.tiling import TilingConfig

TEMPLATES_OF_DIALECTS = {"phi": "phi", "stablelm": "phi", "llama": "v1"}
"""What the published models were trained with. Another template gives nonsense."""

LEGACY_TEMPLATE = "llava_hf"

TEMPLATE_KEY, SYSTEM_KEY = "conversation_template", "conversation_system"
"""Keys of ours in the config.json of a model that was trained with another template or system message."""


def processor_config(
    data: Mapping[str, Any], folder: str | Path, model: TinyLlavaModelConfig
) -> TinyLlavaProcessorConfig:
    """Processor config of a checkpoint.

    Args:
        data: the contents of config.json.
        folder: has the tokenizer's files.
        model: what `from_hf_config` makes of `data`.

    Raises:
        UserError: the language model is unknown, or the tiles of pictures are described wrongly.
    """
    is_legacy = data.get("model_type") == "llava"
    tower = model.vision_tower
    # a language model alone has not been given the token
    has_patch_token = "mm_vision_tower" in data and not is_legacy and "text_config" not in data
    make_branch = siglip_branch if tower is None or tower.dialect == "siglip" else clip_branch
    height, width = height_and_width(tower.image_size) if tower else (384, 384)
    if height != width:
        raise UserError(f"config.json: the tower's image_size is {tower.image_size}; expected a square")
    aspect_ratio = data.get("image_aspect_ratio") or "square"
    return TinyLlavaProcessorConfig(
        tokenizer=str(folder),
        vocab_size=model.language_model.vocab_size if model.language_model else None,
        template=data.get(TEMPLATE_KEY) or (LEGACY_TEMPLATE if is_legacy else template_of(data)),
        system=data.get(SYSTEM_KEY),
        num_image_tokens=model.image_token_len,
        use_im_start_end=bool(data.get("mm_use_im_start_end", False)),
        use_im_patch_token=has_patch_token and bool(data.get("mm_use_im_patch_token", True)),
        image=make_branch(height, aspect_ratio=aspect_ratio),
        tiling=tiling_of(data) if aspect_ratio == "anyres" else None,
    )


def tiling_of(data: Mapping[str, Any]) -> TilingConfig:
    """How a checkpoint of that config.json cuts pictures into tiles.

    Raises:
        UserError: `image_grid_pinpoints`, a list or a text that is one, or `mm_patch_merge_type` is wrong.
    """
    pinpoints = data.get("image_grid_pinpoints")
    try:
        pinpoints = (
            json.loads(pinpoints.replace("(", "[").replace(")", "]")) if isinstance(pinpoints, str) else pinpoints
        )
    except ValueError:
        raise UserError(f"config.json: image_grid_pinpoints is {pinpoints!r}; expected a list") from None
    resolutions = convert_value(list[list[int]], pinpoints or [], "image_grid_pinpoints")
    return TilingConfig(resolutions=resolutions, merge=data.get("mm_patch_merge_type") or "flat")


def template_of(data: Mapping[str, Any]) -> str:
    """Name of the template that a checkpoint of that config.json was trained with."""
    text = data.get("text_config")
    return TEMPLATES_OF_DIALECTS[dialect_of(text if isinstance(text, Mapping) else data)]
