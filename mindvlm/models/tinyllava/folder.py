"""A Hugging Face checkpoint folder read as a run config: its config.json says the family and everything else."""

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import holds_weights, open_checkpoint
from mindvlm.core.config import convert_value
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.config import TinyLlavaConfig
from mindvlm.models.tinyllava.hf_checks import checked
from mindvlm.models.tinyllava.hf_run import run_config
from mindvlm.models.tinyllava.tower_folder import BESIDE, find_tower_config, in_tower, tower_folders
from mindvlm.weights.config_json import named_types, read_config, read_config_file, shown_name
from mindvlm.weights.recognise import MODELS
from mindvlm.weights.rules.findings import Finding


def folder_config(
    folder: Path, overrides: dict[str, Any] | None = None, *, tower: str | Path | None = None
) -> TinyLlavaConfig:
    """The typed config of a checkpoint folder.

    Args:
        folder: with config.json, weights and tokenizer files.
        overrides: runtime keys that replace the defaults.
        tower: folder of the tower's repository. Its weights, if it has any, replace the tower in the checkpoint. A
            config.json, or a folder with nothing but that, only describes the tower.

    Raises:
        UserError: no config.json, of a model that has no such folder, or an override that is no runtime key.
    """
    data = read_config(folder)
    if data is None:
        raise UserError(f"{folder}: has no config.json; give the folder of a checkpoint, or a YAML")
    families = {MODELS[name].family for name in MODELS if set(named_types(data)) & set(MODELS[name].model_types)}
    if families != {"tinyllava"}:
        types = ", ".join(map(shown_name, named_types(data)[:3])) or "nothing"
        raise UserError(f"{folder}/config.json: model type {types} is not read from a folder; give a YAML for it")
    data = checked(data, f"{folder}/config.json")
    try:
        config = run_config(data, folder, vision_config=tower_config(data, folder, tower))
    except UserError as error:
        raise UserError(f"{folder}/{error}" if str(error).startswith("config.json") else str(error)) from None
    config.vision_tower = tower_weights(data, folder, tower)
    known = {field.name for field in dataclasses.fields(config)} - {"family", "model", "processor", "generation"}
    for key, value in (overrides or {}).items():
        if key not in known:
            raise UserError(f"config key {key!r} cannot replace what {folder} says; expected one of {sorted(known)}")
        setattr(config, key, convert_value(typing.get_type_hints(type(config))[key], value, key))
    return config


def sizes_remedy(folder: Path, tower: str | Path | None, findings: Iterable[Finding]) -> str:
    """What to do where the weights in a folder are not of the sizes that its config.json describes, in words."""
    data = read_config(folder) or {}
    name, is_described = data.get("mm_vision_tower"), "vision_config" in data or (folder / BESIDE).exists()
    is_assumed = name and tower is None and not is_described and not tower_folders(folder, name)
    if is_assumed and any(in_tower(finding.name) for finding in findings):
        return (
            f"the tower was taken for the published one of the name {name}; if it is another, put its config.json "
            f"beside the weights as {BESIDE}, or give its folder as vision_tower"
        )
    return f"correct the sizes in {folder}/config.json, or take the weights that belong to it"


def tower_config(data: dict[str, Any], folder: Path, tower: str | Path | None) -> dict[str, Any] | None:
    """The tower's config.json from where `tower` says, or from where the checkpoint's own does; None if it is in it."""
    if tower is not None:
        path = Path(tower)
        if not path.exists():
            raise UserError(f"vision_tower {path}: no such file or folder; give a tower's folder")
        if path.is_file() and path.suffix != ".json":
            raise UserError(f"vision_tower {path}: is no folder; give the one that it lies in, with its config.json")
        file = path / "config.json" if path.is_dir() else path
        described = read_config_file(file, remedy="give a tower's folder")
        # of a whole TinyLLaVA, whose tower is described elsewhere
        is_elsewhere = "vision_config" not in described and described.get("mm_vision_tower")
        return find_tower_config(file.parent, described["mm_vision_tower"]) if is_elsewhere else described
    if "vision_config" in data or not data.get("mm_vision_tower"):
        return None
    return find_tower_config(folder, data["mm_vision_tower"])


def tower_weights(data: dict[str, Any], folder: Path, tower: str | Path | None) -> str | None:
    """Where the tower's weights are, if not in the checkpoint: in the folder that `tower` says. Or, of a checkpoint
    without a tower, in the folder that its config.json names, if there is such a folder."""
    if tower is not None:
        return str(tower) if Path(tower).is_dir() and holds_weights(Path(tower)) else None
    name = data.get("mm_vision_tower")
    places = [place for place in tower_folders(folder, name) if holds_weights(place)] if name else []
    if not places or not holds_weights(folder):
        return None
    with open_checkpoint(folder) as checkpoint:
        return None if any(map(in_tower, checkpoint.infos)) else str(places[0])
