"""Reading of a config.json with checked values."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.checkpoint.untrusted import parse_json_table
from mindvlm.core.errors import UserError

Config = Mapping[str, Any]
MAX_NUM_LAYERS = 1000
_MAX_BYTES = 1024 * 1024
_MAX_SIZE = 2**31 - 1
_MAX_SHOWN = 80
_REMEDY = "; correct it, or take the file of the published model"


@dataclass(frozen=True)
class Kind:
    """The values that a key accepts; `expected` describes them in messages."""

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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_same(value: Any, other: Any) -> bool:
    # 0 is 0.0, but neither is False
    return value == other and isinstance(value, bool) == isinstance(other, bool)


SIZE = Kind(f"a whole number from 1 to {_MAX_SIZE}", lambda value: _is_whole(value, 1, _MAX_SIZE))
COUNT = Kind(f"a whole number from 0 to {_MAX_SIZE}", lambda value: _is_whole(value, 0, _MAX_SIZE))
NUM_LAYERS = Kind(f"a whole number from 1 to {MAX_NUM_LAYERS}", lambda value: _is_whole(value, 1, MAX_NUM_LAYERS))
WHOLE = Kind("a whole number", lambda value: type(value) is int)
IMAGE_SIZE = Kind(f"a whole number from 1 to {_MAX_SIZE}, or a pair of such", _is_image_size)
LAYER_NUMBERS = Kind(f"a list of numbers from 0 to {MAX_NUM_LAYERS - 1}", _are_layers)
RATIO = Kind("a number above 0, at most 1000", lambda value: type(value) in (int, float) and 0 < value <= 1000)
ABOVE_ZERO = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
TABLE = Kind("a table", lambda value: isinstance(value, Mapping))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


@dataclass(frozen=True)
class ConfigTable:
    """A table of a config.json, whose values are checked when they are read.

    Attributes:
        values: keys and values.
        path: name of the file in messages.
        prefix: prefix of a key in messages, the names of the enclosing tables.
        only_sizes: the shapes of the tensors are needed and no model is run: settings have their defaults.
    """

    values: Config
    path: str = "config.json"
    prefix: str = ""
    only_sizes: bool = False

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, kind: Kind, default: Any = None) -> Any:
        """Returns the value of a key, or `default` if it is absent. Raises UserError for a value of another kind."""
        if key not in self.values:
            return default
        value = self.values[key]
        if not kind.accepts(value):
            raise self.error(f"{self.prefix}{key} is {shown(value)}, expected {kind.expected}")
        return value

    def require(self, key: str, kind: Kind) -> Any:
        """Returns the value of a key. Raises UserError if it is absent or of another kind."""
        if key not in self.values:
            raise self.error(f"lacks {self.prefix + key!r}")
        return self.get(key, kind)

    def setting(self, key: str, kind: Kind, default: Any = None) -> Any:
        """Returns the value of a key that has no effect on the shapes of tensors; like `get` otherwise."""
        return default if self.only_sizes else self.get(key, kind, default)

    def table(self, key: str) -> ConfigTable | None:
        """Returns the table under a key, or None if it is absent. Raises UserError for another value."""
        values = self.get(key, TABLE)
        return None if values is None else ConfigTable(values, self.path, f"{self.prefix}{key}.", self.only_sizes)

    def refuse(self, key: str, *supported: Any) -> None:
        """Raises UserError if the key is present with an unsupported value."""
        if key in self.values and not any(_is_same(self.values[key], value) for value in supported):
            value, expected = shown(self.values[key]), shown(supported[-1])
            raise UserError(f"{self.path}: {self.prefix}{key} is {value}; only {expected} is supported")

    def refuse_setting(self, key: str, *supported: Any) -> None:
        """Calls `refuse` for a key that has no effect on the shapes of tensors, unless only these are needed."""
        if not self.only_sizes:
            self.refuse(key, *supported)

    def error(self, detail: str) -> UserError:
        return UserError(f"{self.path}: {detail}{_REMEDY}")

    @contextlib.contextmanager
    def keys_for(self, names: Mapping[str, str]) -> Iterator[None]:
        """Rewrites a UserError about a typed config as one about this file.

        Args:
            names: keys as the error names them -> as this file does, replaced in this order.
        """
        try:
            yield
        except UserError as error:
            message = str(error).removeprefix(f"{self.path}: ")
            for name, key in names.items():
                message = message.replace(name, key)
            raise UserError(f"{self.path}: {message}") from None

    def other_model(self, model: str, error: UserError) -> UserError:
        """Returns the error for a config.json that names `model` and cannot be read; `error` is the cause."""
        detail = str(error).removeprefix(f"{self.path}: ").removesuffix(_REMEDY)
        return UserError(
            f"{self.path}: is not a valid {model} config ({detail}); move it away or give the folder of {model}"
        )


def without_nulls(data: Config) -> dict[str, Any]:
    """Returns a config without null values, which mean the default, at any depth."""
    kept = {key: value for key, value in data.items() if value is not None}
    return {key: without_nulls(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def read_config(folder: Path) -> dict[str, Any] | None:
    """Returns the config.json in `folder`, or None if there is no such file.

    Raises:
        UserError: the file cannot be read or is not a JSON object.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        return None
    return read_config_file(path, remedy="repair it or move it away")


def read_config_file(path: Path, *, remedy: str) -> dict[str, Any]:
    """Returns the JSON object in a file of at most 1 MiB.

    Args:
        path: the file.
        remedy: advice of the message about a damaged file.

    Raises:
        UserError: the path is not a regular file, or it is unreadable, too large or not a JSON object.
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
    """Returns a JSON value for messages, in one line of at most 80 characters."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def shown_name(name: str) -> str:
    """Returns a name from a JSON file for messages: unchanged if it is a short word, else as `shown` does."""
    return name if name.isidentifier() and len(name) <= _MAX_SHOWN else shown(name)


def named_types(config: Config) -> tuple[str, ...]:
    """Returns the model names in a config: the architectures and the `model_type`."""
    architectures = config.get("architectures")
    found = [*architectures] if isinstance(architectures, list) else []
    return tuple(name for name in (*found, config.get("model_type")) if isinstance(name, str))
