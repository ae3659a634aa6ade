"""Processor configs from the config.json of a checkpoint: which template, which picture, which marks around images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.errors import UserError
from mindvlm.models.common.patches import height_and_width
from mindvlm.models.tinyllava.hf_decoder import dialect_of
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.processing import TinyLlavaProcessorConfig, clip_branch, siglip_branch

TEMPLATES_OF_DIALECTS = {"phi": "phi", "stablelm": "phi", "llama": "v1"}
"""What the published models were trained with. Another template gives nonsense."""

LEGACY_TEMPLATE = "llava_hf"


def processor_config(
    data: Mapping[str, Any], folder: str | Path, model: TinyLlavaModelConfig
) -> TinyLlavaProcessorConfig:
    """Processor config of a checkpoint.

    Args:
        data: the contents of config.json.
        folder: has the tokenizer's files.
        model: what `from_hf_config` makes of `data`.

    Raises:
        UserError: the language model is unknown, or pictures are cut into tiles.
    """
    is_legacy = data.get("model_type") == "llava"
    tower = model.vision_tower
    # a language model alone has not been given the token
    has_patch_token = "mm_vision_tower" in data and not is_legacy and "text_config" not in data
    make_branch = siglip_branch if tower is None or tower.dialect == "siglip" else clip_branch
    height, width = height_and_width(tower.image_size) if tower else (384, 384)
    if height != width:
        raise UserError(f"config.json: the tower's image_size is {tower.image_size}; expected a square")
    return TinyLlavaProcessorConfig(
        tokenizer=str(folder),
        vocab_size=model.language_model.vocab_size if model.language_model else None,
        template=LEGACY_TEMPLATE if is_legacy else template_of(data),
        num_image_tokens=model.image_token_len,
        use_im_start_end=bool(data.get("mm_use_im_start_end", False)),
        use_im_patch_token=has_patch_token and bool(data.get("mm_use_im_patch_token", True)),
        image=make_branch(height, aspect_ratio=data.get("image_aspect_ratio") or "square"),
    )


def template_of(data: Mapping[str, Any]) -> str:
    """Name of the template that a checkpoint of that config.json was trained with."""
    text = data.get("text_config")
    return TEMPLATES_OF_DIALECTS[dialect_of(text if isinstance(text, Mapping) else data)]
