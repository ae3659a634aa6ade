"""Reads the config.json of a vision tower (CLIP, SigLIP) and writes it back."""

import os
from pathlib import Path
from typing import Any

from mindvlm.nn.config import VitConfig, height_and_width
from mindvlm.weights.config_json import ABOVE_ZERO, IMAGE_SIZE, NUM_LAYERS, SIZE, TEXT, Config, ConfigTable

SIGLIP_384: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""google/siglip-so400m-patch14-384."""

CLIP_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""openai/clip-vit-large-patch14-336."""

CLIP_224 = {**CLIP_336, "image_size": 224}
"""openai/clip-vit-large-patch14."""


def published_tower(name: str) -> dict[str, Any] | None:
    """Returns the config.json of the published tower of that name, or None if the name is unknown."""
    low = name.lower()
    if "siglip" in low:
        return SIGLIP_384
    if "clip" in low and "336" in low:
        return CLIP_336
    if "clip" in low and "large" in low and "14" in low:
        return CLIP_224
    return None


def tower_places(folder: Path, name: str) -> list[Path]:
    """Returns where a tower's folder is searched: relative to the weights and to the working directory."""
    path = Path(os.path.expanduser(name))
    return list(dict.fromkeys((folder / path, path.absolute())))


def is_tower(config: Config) -> bool:
    """Returns whether a config.json describes a CLIP or SigLIP model, or the vision tower of one."""
    return str(config.get("model_type", "")).startswith(("siglip", "clip"))


def read_tower(
    table: ConfigTable, *, deletes_last_layer: bool = False, defaults: dict[str, Any] | None = None
) -> VitConfig:
    """Returns the tower config of a config.json that describes a tower, or a whole CLIP or SigLIP model.

    Args:
        table: the contents of the file; any `model_type` other than SigLIP is read as CLIP.
        deletes_last_layer: whether a SigLIP has one layer fewer than the file says.
        defaults: values of missing keys; `SIGLIP_384` or `CLIP_336` if not given.

    Raises:
        UserError: a key has a wrong value.
    """
    kind = table.get("model_type", TEXT, "")
    table = table.table("vision_config") or table
    is_siglip = "siglip" in table.get("model_type", TEXT, kind).lower()
    defaults = defaults or (SIGLIP_384 if is_siglip else CLIP_336)
    table.refuse("num_channels", 3)
    kinds = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "patch_size"), SIZE),
        "num_hidden_layers": NUM_LAYERS,
        "image_size": IMAGE_SIZE,
    }
    sizes = {key: table.get(key, kind, defaults[key]) for key, kind in kinds.items()}
    if is_siglip and deletes_last_layer:
        sizes["num_hidden_layers"] -= 1
    return VitConfig(
        **sizes,
        hidden_act=table.setting("hidden_act", TEXT, defaults["hidden_act"]),
        layer_norm_eps=table.setting("layer_norm_eps", ABOVE_ZERO, defaults["layer_norm_eps"]),
        dialect="siglip" if is_siglip else "clip",
    )


def tower_keys(tower: VitConfig, *, deletes_last_layer: bool = False) -> dict[str, Any]:
    """Returns the config.json of a tower; the reverse of `read_tower`."""
    is_deleted = tower.dialect == "siglip" and deletes_last_layer
    height, width = height_and_width(tower.image_size)
    return {
        **{key: value for key, value in vars(tower).items() if key != "dialect"},
        "model_type": f"{tower.dialect}_vision_model",
        "image_size": height if height == width else [height, width],
        "num_hidden_layers": tower.num_hidden_layers + is_deleted,
    }
