"""Tower configs from the config.json of SigLIP or CLIP, or from the name of a published tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.nn.vit import VitConfig

Config = Mapping[str, Any]

SIGLIP_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
CLIP_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def published_tower(name: str) -> dict[str, Any]:
    """Config of the published tower of that name.

    Raises:
        UserError: no such tower is known.
    """
    low = name.lower()
    if "siglip" in low:
        return {**SIGLIP_384, "model_type": "siglip_vision_model"}
    if "clip" in low and "336" in low:
        return {**CLIP_336, "model_type": "clip_vision_model"}
    if "clip" in low and "large" in low and "14" in low:
        return {**CLIP_336, "image_size": 224, "model_type": "clip_vision_model"}
    raise UserError(
        f"config.json: mm_vision_tower is {name!r}, which is no tower that is known here; give the folder of the tower "
        "with its config.json"
    )


def vit_config(data: Config, *, keeps_last_layer: bool = False) -> VitConfig:
    """Config of a tower from a tower repository's config.json, or from the whole SigLIP's or CLIP's.

    Args:
        keeps_last_layer: SigLIP has all its layers. TinyLLaVABench deletes the last one when it builds the tower, so
            that its checkpoints lack it, while the number in config.json counts it.
    """
    data = data.get("vision_config", data)
    known = {f.name for f in dataclasses.fields(VitConfig)}
    is_siglip = "siglip" in str(data.get("model_type", "")).lower()
    defaults = SIGLIP_384 if is_siglip else CLIP_336
    sizes = {key: value for key, value in {**defaults, **data}.items() if key in known}
    if is_siglip and not keeps_last_layer:
        sizes["num_hidden_layers"] -= 1
    return VitConfig(**sizes | {"dialect": "siglip" if is_siglip else "clip"})


def feature_of(vit: VitConfig | None, select_layer: int, select_feature: str) -> tuple[int, int]:
    """Which state of the tower is the feature, and how many tokens in front are none. SigLIP's tower ignores both
    keys: its feature is the last state, all of it."""
    check_feature(select_feature)
    if vit is None or vit.dialect == "siglip":
        return -1, 0
    return select_layer, int(select_feature == "patch")


def check_feature(select_feature: str) -> None:
    """Raises UserError unless it names the patches, or all tokens."""
    if select_feature not in ("patch", "cls_patch"):
        raise UserError(f"config.json: the vision feature is {select_feature!r}; expected 'patch' or 'cls_patch'")
