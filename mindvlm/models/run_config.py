"""Reads a run config from a YAML or from a published checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindvlm.core.config import read_yaml
from mindvlm.core.errors import UserError
from mindvlm.models.base import Family
from mindvlm.models.registry import FAMILIES, convertible_models, get_family
from mindvlm.weights import config_json


def read_config(config_path: str | Path, overrides: dict[str, Any] | None = None) -> Any:
    """Returns the run config of a file or folder.

    Args:
        config_path: a YAML, a checkpoint folder with a config.json, or that config.json.
        overrides: top-level keys that replace those of the file; `vision_tower` is the folder of a separate tower.

    Raises:
        UserError: the file cannot be read, belongs to no family, or has a wrong key or value.
    """
    path = Path(config_path)
    path = path.parent if path.name == "config.json" else path
    overrides = {key: str(value) if isinstance(value, Path) else value for key, value in (overrides or {}).items()}
    if path.is_dir():
        return read_folder(path, overrides)
    data = {**read_yaml(path), **overrides}
    return family_of_yaml(data).parse_config(data, path)


def family_of_yaml(data: dict[str, Any]) -> Family:
    """Returns the family that the key `family` names, or else the family that recognizes the file.

    Raises:
        UserError: the family is unknown.
    """
    if "family" not in data:
        for family in map(get_family, FAMILIES):
            if family.owns_yaml and family.owns_yaml(data):
                return family
    return get_family(data.get("family"))


def read_folder(folder: Path, overrides: dict[str, Any]) -> Any:
    """Returns the run config of a published checkpoint folder.

    Raises:
        UserError: config.json is missing, or no family reads folders of its model type.
    """
    data = config_json.read_config(folder)
    if data is None:
        raise UserError(f"{folder}: has no config.json; give the folder of a checkpoint, or a YAML")
    types = config_json.named_types(data)
    names = dict.fromkeys(model.family for model in convertible_models() if set(types) & set(model.model_types))
    families = [family for name in names if (family := get_family(name)).read_folder]
    if len(families) > 1:
        claiming = [family for family in families if family.reads and family.reads(data)]
        families = claiming or [family for family in families if not family.reads]
    if len(families) != 1:
        shown = ", ".join(map(config_json.shown_name, types[:3])) or "nothing"
        raise UserError(f"{folder}/config.json: model type {shown} is not read from a folder; give a YAML for it")
    return families[0].read_folder(folder, overrides)
