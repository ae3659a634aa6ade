"""Typed reading of the fields of a JSON object. Null counts as absent; unknown fields are ignored."""

import json
import math
from typing import Any

from mindvlm.serving.errors import ApiError, bad_field, shown


class Fields:
    """The fields of an object.

    Args:
        values: the object.
        name: its place in the request, for messages.

    Raises:
        ApiError: it is no object.
    """

    def __init__(self, values: Any, name: str = ""):
        if not isinstance(values, dict):
            raise bad_field(name or "the request", f"{shown(values)}; expected an object")
        self.values, self.name = values, name

    def path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """Returns the value of a field, None if it is absent. Raises ApiError if it has another type."""
        value = self.values.get(key)
        is_wrong_bool = isinstance(value, bool) and kind is not bool
        if value is not None and (is_wrong_bool or not isinstance(value, kind)):
            raise bad_field(self.path(key), f"{shown(value)}; expected {expected}")
        return value

    def flag(self, key: str) -> bool:
        return bool(self.get(key, bool, "true or false"))

    def text(self, key: str) -> str | None:
        return self.get(key, str, "text")

    def number(self, key: str, low: float, high: float = math.inf) -> float | None:
        """Returns a number. Raises ApiError if it is not between the limits."""
        expected = f"a number from {low:g}" + (f" to {high:g}" if high < math.inf else " on")
        value = self.get(key, (int, float), expected)
        if value is not None and not low <= value <= high:
            raise bad_field(self.path(key), f"{shown(value)}; expected {expected}")
        return value

    def whole(self, key: str, low: float, high: float = math.inf) -> int | None:
        """Returns a whole number; 16.0 is one. Raises ApiError if it is not between the limits."""
        value = self.number(key, low, high)
        if value is not None and value != int(value):
            raise bad_field(self.path(key), f"{shown(value)}; expected a whole number")
        return None if value is None else int(value)

    def refuse(self, key: str, *accepted: Any, remedy: str = "leave it out") -> None:
        """Raises ApiError if a field that is not supported has another value than null and the accepted ones."""
        value = self.values.get(key)
        if value is not None and not any(type(value) is type(one) and value == one for one in accepted):
            raise bad_field(self.path(key), f"{shown(value)} is not supported by this server; {remedy}")


def parse_json(content: bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ApiError: it is no JSON, nested too deeply, or contains a number that is not finite.
    """
    try:
        return json.loads(content, parse_constant=not_finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise ApiError(400, f"the body is not valid JSON: {problem}", code="invalid_json") from None


def finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else not_finite(text)


def not_finite(text: str) -> float:
    raise ValueError(f"{text[:40]} is not a finite number")
