"""Reads a run config from a YAML or from a published checkpoint folder."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

from mindvlm.core.config import Scope, build_config, convert_value, kind_of_config, read_yaml, with_file
from mindvlm.core.errors import UserError
from mindvlm.models.base import Family
from mindvlm.models.hf.tower_folder import require_model
from mindvlm.models.registry import FAMILIES, convertible_models, get_family, require_downloaded
from mindvlm.weights import config_json

SCOPE_KEY = "scope"
"""Our own key in the config.json of a model that was trained with a YAML that has this section."""


def read_config(config_path: str | Path, overrides: dict[str, Any] | None = None) -> Any:
    """Returns the run config of a file or folder.

    Args:
        config_path: a YAML, a checkpoint folder with a config.json, or that config.json.
        overrides: top-level keys that replace those of the file; `vision_tower` is the folder of a separate tower.

    Raises:
        UserError: the file cannot be read, belongs to no family, or has a wrong key or value.
    """
    path = Path(os.path.expanduser(config_path))
    path = path.parent if path.name == "config.json" else path
    overrides = {
        key: os.path.expanduser(str(value)) if isinstance(value, str | Path) else value
        for key, value in (overrides or {}).items()
    }
    require_downloaded(path)
    if path.is_dir():
        return read_folder(path, overrides)
    data = read_yaml(path)
    if (kind := kind_of_config(data)) in ("a training job", "a registry of data sets"):
        named = f", here {data['model_config']}" if "model_config" in data else ""
        raise UserError(
            f"config {path} is {kind}; give the YAML of a model (model_config of a job{named}), or a folder"
        )
    data |= overrides
    try:
        return family_of_yaml(data).parse_config(data, path)
    except UserError as error:
        raise with_file(error, [path], parse_yaml) from None


def parse_yaml(path: Path) -> Any:
    """Returns the run config of a YAML alone. Raises UserError for a wrong key or value, without naming the file."""
    data = read_yaml(path)
    return family_of_yaml(data).parse_config(data, path)


def find_family(config_path: str | Path) -> Family:
    """Returns the family of a model's YAML or folder, without reading its sizes.

    Raises:
        UserError: see `read_config`.
    """
    path = Path(os.path.expanduser(config_path))
    path = path.parent if path.name == "config.json" else path
    require_downloaded(path)
    if path.is_dir():
        return family_of_folder(path)
    data = read_yaml(path)
    try:
        return family_of_yaml(data)
    except UserError as error:
        raise with_file(error, [path], parse_yaml) from None


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


def family_of_folder(folder: Path) -> Family:
    """Returns the family that reads a published checkpoint folder.

    Raises:
        UserError: config.json is missing, or no family reads folders of its model type.
    """
    data = config_json.read_config(folder)
    if data is None:
        readers = filter(None, (model.other_config for model in convertible_models()))
        data = next((found for read in readers if (found := read(folder)) is not None), None)
    if data is None:
        raise UserError(
            f"{folder}: has no config.json; give the folder of a checkpoint, or a YAML with this checkpoint"
        )
    types = config_json.named_types(data)
    names = dict.fromkeys(model.family for model in convertible_models() if set(types) & set(model.model_types))
    families = [family for name in names if (family := get_family(name)).read_folder]
    if len(families) > 1:
        claiming = [family for family in families if family.reads and family.reads(data)]
        families = claiming or [family for family in families if not family.reads]
    if len(families) != 1:
        if not types:
            what = "names no model_type" if data else "is an empty table"
            raise UserError(f"{folder}/config.json: {what}; take the config.json of the model, or give a YAML")
        shown = ", ".join(map(config_json.shown_name, types[:3]))
        raise UserError(f"{folder}/config.json: model type {shown} is not read from a folder; give a YAML for it")
    return families[0]


def read_folder(folder: Path, overrides: dict[str, Any]) -> Any:
    """Returns the run config of a published checkpoint folder. Raises UserError if no family can read it."""
    family = family_of_folder(folder)
    try:
        return family.read_folder(folder, overrides)
    except UserError:
        # what a training saves beside a connector or an adapter lacks other files of a model, such as the tokenizer
        require_model(folder)
        raise


def read_scope(table: config_json.ConfigTable) -> Scope | None:
    """Returns what the model of a config.json is for; None without our own key for it.

    Raises:
        UserError: the key has a wrong value.
    """
    values = table.values.get(SCOPE_KEY)
    with table.keys_for({}):
        return None if values is None else build_config(Scope, values, SCOPE_KEY)


def replace_keys(config: Any, overrides: dict[str, Any], folder: Path) -> None:
    """Replaces runtime keys in the run config of a folder.

    Raises:
        UserError: a key is unknown or belongs to the model, or its value is wrong.
    """
    known = {field.name for field in dataclasses.fields(config)} - {"family", "model", "processor", "generation"}
    for key, value in overrides.items():
        if key not in known:
            raise UserError(f"config key {key!r} cannot replace a value of {folder}; expected one of {sorted(known)}")
        setattr(config, key, convert_value(typing.get_type_hints(type(config))[key], value, key))
    # checks the new values as it does those of a YAML
    config.__post_init__()
