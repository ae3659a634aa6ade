"""The config.json beside the weights: which model it names, and which tensors that model has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo
from mindvlm.errors import UserError

Config = Mapping[str, Any]
_MAX_BYTES = 16 * 1024 * 1024
_MAX_NUM_LAYERS = 1000


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config.json in `folder`, or None if there is no such file.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); repair it or move it away") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds a {type(config).__name__}, expected an object; repair it or move it away")
    return config


def named_types(config: Config) -> tuple[str, ...]:
    """Return what a config calls its model: the architectures and the `model_type`."""
    architectures = config.get("architectures")
    found = [*architectures] if isinstance(architectures, list) else []
    return tuple(name for name in (*found, config.get("model_type")) if isinstance(name, str))


def infos_of_folder(
    folder: Path, infos_of: Callable[[Config], dict[str, TensorInfo]], *, model_types: Sequence[str], what: str
) -> dict[str, TensorInfo] | None:
    """Return the native tensors that the config.json in `folder` describes.

    None if there is no such file, if it names another model, as beside a tower that was published alone, or if it
    describes nothing but towers.

    Args:
        folder: where the weights are.
        infos_of: the native tensors of a config.
        model_types: what the model is called in a config.json.
        what: what to call the model in messages.

    Raises:
        UserError: config.json names this model, or none, and does not describe it.
    """
    config = read_config(folder)
    if config is None:
        return None
    types = named_types(config)
    if types and not set(types) & set(model_types):
        return None
    if not types and any(isinstance(tower, Mapping) for tower in config.values()) and "hidden_size" not in config:
        return None
    try:
        _check_num_layers(config)
        return infos_of(config)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'}: is no {what} config ({error!r}); move it away or give the folder of {what}"
        ) from None


def _check_num_layers(config: Config) -> None:
    towers = [tower for tower in config.values() if isinstance(tower, Mapping)]
    for sizes in (config, *towers):
        for key in ("num_hidden_layers", "depth"):
            if sizes.get(key, 0) > _MAX_NUM_LAYERS:
                raise ValueError(f"{key} {sizes[key]}, at most {_MAX_NUM_LAYERS} are supported")
