"""Finds the config.json and the weights of a TinyLLaVA's vision tower, which may be in a separate repository."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo, holds_weights, open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.hf.towers import published_tower
from mindvlm.weights.config_json import TEXT, Config, ConfigTable, read_config, read_config_file, without_nulls

BESIDE = "vision_config.json"
_LAYERS = "vision_tower.encoder.layers."
_SIGLIP_ONLY = "vision_tower.embeddings.patch_embedding.bias"
_DELETED = "SigLIP's last layer; TinyLLaVABench deletes it"


def in_tower(name: str) -> bool:
    """Returns whether a tensor of a whole TinyLLaVA belongs to the tower, in any naming."""
    return name.startswith(("vision_tower.", "model.vision_tower."))


def deleted_layer(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns the layer of the published SigLIP that a model with these native tensors lacks.

    The result maps the prefix of the layer's native names to the reason for its removal. It is empty if the tower is
    not SigLIP.
    """
    if _SIGLIP_ONLY not in infos:
        return {}
    numbers = [int(name.removeprefix(_LAYERS).split(".")[0]) for name in infos if name.startswith(_LAYERS)]
    return {f"{_LAYERS}{max(numbers, default=-1) + 1}.": _DELETED}


def tower_folders(folder: Path, name: str) -> list[Path]:
    """Returns the folders with a tower's name, relative to the weights and to the working directory."""
    # unlike Path.is_dir, this returns False for an invalid file name
    return [place for place in (folder / name, Path(name)) if os.path.isdir(place)]


def with_tower_config(config: Config, folder: Path) -> dict[str, Any]:
    """Returns the config.json in `folder` with the tower's config under `vision_config`, if a file describes the tower.

    Raises:
        UserError: a file is not a JSON object.
    """
    name = ConfigTable(without_nulls(config), str(folder / "config.json")).get("mm_vision_tower", TEXT)
    if "vision_config" in config or not name:
        return dict(config)
    tower = find_tower_config(folder, name)
    return dict(config) if tower is None else {**config, "vision_config": tower}


def find_tower_config(folder: Path, name: str) -> dict[str, Any] | None:
    """Returns the config.json of the tower `name`, or None if it is unknown.

    Uses the first of: vision_config.json beside the weights; the config.json in a folder of that name, relative to the
    weights or to the working directory; the published tower of that name.

    Raises:
        UserError: a file is not a JSON object.
    """
    beside = folder / BESIDE
    if beside.exists():
        return read_config_file(beside, remedy="repair it or move it away")
    for place in tower_folders(folder, name):
        if (config := read_config(place)) is not None:
            return config.get("vision_config", config)
    return published_tower(name)


def tower_config(table: ConfigTable, folder: Path, tower: str | Path | None) -> Config | None:
    """Returns the config.json of the tower, or None if the config.json of the checkpoint describes it.

    Args:
        table: config.json of the checkpoint.
        folder: folder of the checkpoint.
        tower: the user's folder or config.json of the tower.

    Raises:
        UserError: the file does not exist or is not a JSON object.
    """
    if tower is None:
        name = table.get("mm_vision_tower", TEXT)
        return find_tower_config(folder, name) if name and "vision_config" not in table else None
    path = Path(tower)
    if not path.exists():
        raise UserError(f"vision_tower {path}: no such file or folder; give a tower's folder")
    if path.is_file() and path.suffix != ".json":
        raise UserError(f"vision_tower {path}: is not a folder; give the folder that contains it and a config.json")
    file = path / "config.json" if path.is_dir() else path
    described = read_config_file(file, remedy="give a tower's folder")
    # a whole TinyLLaVA whose tower has a config.json elsewhere
    is_elsewhere = "vision_config" not in described and described.get("mm_vision_tower")
    return find_tower_config(file.parent, described["mm_vision_tower"]) if is_elsewhere else described


def tower_weights(table: ConfigTable, folder: Path, tower: str | Path | None) -> str | None:
    """Returns the folder of separate tower weights, or None if the checkpoint contains them; see `tower_config`.

    This is the user's folder or, for a checkpoint without a tower, the folder that its config.json names.
    """
    if tower is not None:
        return str(tower) if Path(tower).is_dir() and holds_weights(Path(tower)) else None
    name = table.get("mm_vision_tower", TEXT)
    places = [place for place in tower_folders(folder, name) if holds_weights(place)] if name else []
    if not places or not holds_weights(folder):
        return None
    with open_checkpoint(folder) as checkpoint:
        return None if any(map(in_tower, checkpoint.infos)) else str(places[0])
