"""The config.json beside the weights: which model it names, and which tensors that model has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo
from mindvlm.checkpoint.json_table import parse_json_table
from mindvlm.core.errors import UserError

Config = Mapping[str, Any]
MAX_NUM_LAYERS = 1000
_MAX_BYTES = 1024 * 1024
_MAX_SIZE = 2**31 - 1
_MAX_SHOWN = 80


@dataclass(frozen=True)
class Kind:
    """What a value of a config may be; `expected` says it in words."""

    expected: str
    accepts: Callable[[Any], bool]


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_image_size(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(_is_whole(side, 1, _MAX_SIZE) for side in sides)


def _are_layers(value: Any) -> bool:
    is_short = isinstance(value, list) and len(value) <= MAX_NUM_LAYERS
    return is_short and all(_is_whole(layer, 0, MAX_NUM_LAYERS - 1) for layer in value)


SIZE = Kind(f"a whole number from 1 to {_MAX_SIZE}", lambda value: _is_whole(value, 1, _MAX_SIZE))
NUM_LAYERS = Kind(f"a whole number from 0 to {MAX_NUM_LAYERS}", lambda value: _is_whole(value, 0, MAX_NUM_LAYERS))
IMAGE_SIZE = Kind(f"a whole number from 1 to {_MAX_SIZE}, or a pair of such", _is_image_size)
LAYER_NUMBERS = Kind(f"a list of numbers from 0 to {MAX_NUM_LAYERS - 1}", _are_layers)
RATIO = Kind("a number above 0, at most 1000", lambda value: type(value) in (int, float) and 0 < value <= 1000)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


@dataclass(frozen=True)
class Layout:
    """What the config.json of a model holds.

    Attributes:
        model: what to call the model in messages.
        model_types: what the model is called in a config.json.
        fields: the keys that must be there.
        optional: keys that may be there.
        towers: keys that may be there and hold tables, whose keys may be there.
    """

    model: str
    model_types: Sequence[str]
    fields: Mapping[str, Kind]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    towers: Mapping[str, Mapping[str, Kind]] = field(default_factory=dict)

    def check(self, config: Config) -> None:
        """Raise ValueError, which says what is wrong, unless every key has a value of its kind."""
        for name in self.fields:
            if name not in config:
                raise ValueError(f"{name} is missing")
        check_kinds(config, {**self.fields, **self.optional}, prefix="")
        for name, kinds in self.towers.items():
            tower = config.get(name, {})
            if not isinstance(tower, dict):
                raise ValueError(f"{name} is {shown(tower)}, expected a table")
            check_kinds(tower, kinds, prefix=f"{name}.")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config.json in `folder`, or None if there is no such file.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        return None
    return read_config_file(path, remedy="repair it or move it away")


def read_config_file(path: Path, *, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file of at most 1 MiB, in memory of a few times that.

    Args:
        path: the file.
        remedy: what the user should do about a file that is damaged, for the message.

    Raises:
        UserError: not a regular file, unreadable, too large, or no JSON object.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: not a regular file; {remedy}")
        with open(path, "rb") as file:
            encoded = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check path and permissions") from error
    if len(encoded) > _MAX_BYTES:
        raise UserError(f"{path}: larger than {_MAX_BYTES:,} bytes, not a config; {remedy}")
    return parse_json_table(path, encoded, what="the config", remedy=remedy)


def shown(value: Any) -> str:
    """Return a value of a JSON file for messages: one line of at most 80 characters, as JSON calls it."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def shown_name(name: str) -> str:
    """Return a name from a JSON file for messages: as it is if it is a short word, else as `shown`."""
    return name if name.isidentifier() and len(name) <= _MAX_SHOWN else shown(name)


def named_types(config: Config) -> tuple[str, ...]:
    """Return what a config calls its model: the architectures and the `model_type`."""
    architectures = config.get("architectures")
    found = [*architectures] if isinstance(architectures, list) else []
    return tuple(name for name in (*found, config.get("model_type")) if isinstance(name, str))


def infos_of_folder(
    folder: Path, infos_of: Callable[[Config], dict[str, TensorInfo]], layout: Layout
) -> dict[str, TensorInfo] | None:
    """Return the native tensors that the config.json in `folder` describes.

    None if there is no such file, if it names another model, as beside a tower that was published alone, or if it
    describes nothing but towers.

    Args:
        folder: where the weights are.
        infos_of: the native tensors of a config that passed `layout.check`.
        layout: what the config.json of the model holds.

    Raises:
        UserError: config.json names this model, or none, and does not describe it.
    """
    config = read_config(folder)
    if config is None:
        return None
    types = named_types(config)
    if types and not set(types) & set(layout.model_types):
        return None
    if not types and any(isinstance(tower, Mapping) for tower in config.values()) and "hidden_size" not in config:
        return None
    try:
        layout.check(config)
        return infos_of(config)
    except ValueError as error:
        path, what = folder / "config.json", layout.model
        raise UserError(f"{path}: is no {what} config ({error}); move it away or give the folder of {what}") from None


def check_kinds(values: Config, kinds: Mapping[str, Kind], *, prefix: str) -> None:
    """Raise ValueError, which says what is wrong, unless every key that is there has a value of its kind."""
    for name, kind in kinds.items():
        if name in values and not kind.accepts(values[name]):
            raise ValueError(f"{prefix}{name} is {shown(values[name])}, expected {kind.expected}")
