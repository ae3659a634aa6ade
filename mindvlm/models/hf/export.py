"""Writes the files of a published folder beside trained weights: config.json and the tokenizer's files."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RunConfig
from mindvlm.models.hf.towers import CLIP_336, SIGLIP_384, tower_keys
from mindvlm.models.run_config import SCOPE_KEY
from mindvlm.nn.config import VitConfig
from mindvlm.weights.companions import read_companions
from mindvlm.weights.config_json import Config, read_config, shown

PUBLISHED_TOWERS = {"siglip": "google/siglip-so400m-patch14-384", "clip": "openai/clip-vit-large-patch14-336"}


def source_config(tokenizer: str) -> Config:
    """Returns the config.json beside the tokenizer's files, that of the model that training started from, or {}."""
    path = Path(tokenizer)
    return (read_config(path) or {}) if path.is_dir() else {}


def folder_files(tokenizer: str, description: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns name -> content of the files that turn weights into a model folder.

    Args:
        tokenizer: folder of the tokenizer's files, or one of them.
        description: the config.json.

    Raises:
        UserError: a file of the tokenizer cannot be read.
    """
    path = Path(tokenizer)
    files = read_companions(path) if path.is_dir() else {path.name: path.read_bytes()}
    return {**files, "config.json": (json.dumps(description, indent=2) + "\n").encode()}


def scope_keys(config: RunConfig) -> dict[str, Any]:
    """Returns our own key for what a model is for; empty if the YAML of the model has no such section."""
    return {SCOPE_KEY: asdict(config.scope)} if config.scope else {}


def require_described(
    model: Any,
    description: dict[str, Any],
    *,
    read: Callable[[dict[str, Any]], Any],
    parts: Collection[str],
    others: Collection[str] = (),
) -> None:
    """Raises UserError if a config.json does not describe the model, so that its checkpoints would be another model.

    Args:
        model: the model config.
        description: the config.json.
        read: returns the model config of a config.json.
        parts: fields of the model config that are configs themselves.
        others: fields that do not say what the model computes.
    """
    try:
        found = read(description)
    except UserError as error:
        raise UserError(
            f"checkpoints of this model could not be loaded, because no config.json describes it ({error}); correct "
            "the section model, or model_changes.model"
        ) from None
    expected, described = flat(model, parts, others), flat(found, parts, others)
    for key, value in expected.items():
        if described[key] != value:
            raise not_described(key, value, described[key])


def flat(config: Any, parts: Collection[str], others: Collection[str]) -> dict[str, Any]:
    """Returns the values of a model config by dotted key; see `require_described`."""
    values = {key: value for key, value in asdict(config).items() if key not in others}
    for part in parts:
        values |= {f"{part}.{key}": value for key, value in values.pop(part).items() if f"{part}.{key}" not in others}
    return values


def not_described(key: str, value: Any, described: Any) -> UserError:
    """Returns the error for a field whose value no config.json can have."""
    return UserError(
        f"model.{key} is {shown(value)}, but the config.json of a checkpoint can only say {shown(described)}, so "
        f"checkpoints of this model could not be loaded; set it to {shown(described)}"
    )


def tower_name(tower: VitConfig) -> str:
    """Returns the name of the published tower of these sizes, or its kind; the originals pick the class by it."""
    published = SIGLIP_384 if tower.dialect == "siglip" else CLIP_336
    keys = tower_keys(tower, deletes_last_layer=True)
    is_published = all(keys[key] == value for key, value in published.items())
    return PUBLISHED_TOWERS[tower.dialect] if is_published else tower.dialect
