"""A Hugging Face checkpoint folder read as a run config: its config.json says the family and everything else."""

import dataclasses
from pathlib import Path
from typing import Any

from mindvlm.convert.model_config import named_types, read_config, read_config_file, shown_name
from mindvlm.convert.models import MODELS
from mindvlm.convert.tinyllava_tower import find_tower_config
from mindvlm.errors import UserError
from mindvlm.models.tinyllava.config import TinyLlavaConfig
from mindvlm.models.tinyllava.hf_run import run_config


def folder_config(
    folder: Path, overrides: dict[str, Any] | None = None, *, tower: str | Path | None = None
) -> TinyLlavaConfig:
    """The typed config of a checkpoint folder.

    Args:
        folder: with config.json, weights and tokenizer files.
        overrides: runtime keys that replace the defaults.
        tower: folder of the tower's repository, or its config.json, where the checkpoint does not say what it is.

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
    config = run_config(data, folder, vision_config=tower_config(data, folder, tower))
    known = {field.name for field in dataclasses.fields(config)} - {"family", "model", "processor", "generation"}
    for key, value in (overrides or {}).items():
        if key not in known:
            raise UserError(f"config key {key!r} cannot replace what {folder} says; expected one of {sorted(known)}")
        setattr(config, key, value)
    return config


def tower_config(data: dict[str, Any], folder: Path, tower: str | Path | None) -> dict[str, Any] | None:
    """The tower's config.json from where `tower` says, or from where the checkpoint's own does; None if it is in it."""
    if tower is not None:
        path = Path(tower)
        return read_config_file(path / "config.json" if path.is_dir() else path, remedy="give a tower's config.json")
    if "vision_config" in data or not data.get("mm_vision_tower"):
        return None
    return find_tower_config(folder, data["mm_vision_tower"])
