"""Where the sizes of a TinyLLaVA's tower stand: its config.json is in a repository of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo
from mindvlm.convert.reference.tinyllava_layout import CLIP_DEFAULTS, SIGLIP_DEFAULTS
from mindvlm.weights.config_json import read_config, read_config_file

BESIDE = "vision_config.json"
_LAYERS = "vision_tower.encoder.layers."
_SIGLIP_ONLY = "vision_tower.embeddings.patch_embedding.bias"
_DELETED = "SigLIP's last layer, which TinyLLaVABench deletes"


def in_tower(name: str) -> bool:
    """Whether a tensor of a whole TinyLLaVA is one of the tower, in whichever naming."""
    return name.startswith(("vision_tower.", "model.vision_tower."))


def deleted_layer(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return how the native names of the layer begin that the published SigLIP has behind the last one of a model with
    these native tensors, with the reason why it is left out; nothing for another tower or none."""
    if _SIGLIP_ONLY not in infos:
        return {}
    numbers = [int(name.removeprefix(_LAYERS).split(".")[0]) for name in infos if name.startswith(_LAYERS)]
    return {f"{_LAYERS}{max(numbers, default=-1) + 1}.": _DELETED}


def tower_folders(folder: Path, name: str) -> list[Path]:
    """Return the folders here that a tower's name may stand for: relative to the weights, and as it stands."""
    # unlike Path's, this is_dir says no to a name that no file can have
    return [place for place in (folder / name, Path(name)) if os.path.isdir(place)]


def with_tower_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the config.json in `folder` with that of its tower under `vision_config`, wherever this stands; as it is
    where no file says it.

    Raises:
        UserError: a file that is there is no JSON object.
    """
    name = config.get("mm_vision_tower")
    if "vision_config" in config or not name:
        return dict(config)
    tower = find_tower_config(folder, name)
    return dict(config) if tower is None else {**config, "vision_config": tower}


def find_tower_config(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the config of the tower that a checkpoint calls `name`.

    The first of these that is there: vision_config.json beside the weights; config.json of the folder that the name
    is, relative to the weights or as it stands; the published tower of that name.

    Raises:
        UserError: a file that is there is no JSON object.
    """
    beside = folder / BESIDE
    if beside.exists():
        return read_config_file(beside, remedy="repair it or move it away")
    for place in tower_folders(folder, name):
        if (config := read_config(place)) is not None:
            return config.get("vision_config", config)
    low = name.lower()
    if "siglip" in low:
        return dict(SIGLIP_DEFAULTS)
    if "clip" in low and "336" in low:
        return dict(CLIP_DEFAULTS)
    return None
