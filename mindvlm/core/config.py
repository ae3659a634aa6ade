"""Typed configs from YAML. Unknown keys, wrong types and invalid values are errors that name the key."""

import codecs
import contextlib
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mindvlm.core.errors import UserError


def build_config(cls: type, data: Any, where: str = ""):
    """Builds an instance of the dataclass `cls` from a mapping, recursively.

    Args:
        cls: a dataclass; fields may be scalars, lists, unions with None, and dataclasses. Its class variable `RETIRED`
            may map keys to the one value that is still accepted for each; they are not kept.
        data: a mapping read from YAML or JSON.
        where: dotted name of the section, used in messages.

    Raises:
        UserError: a key is unknown (the message names the nearest known key) or missing, or a value has the wrong type.
    """
    if not isinstance(data, dict):
        raise UserError(f"config section '{where or 'top level'}' is {data!r}; expected a mapping of keys to values")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    retired = getattr(cls, "RETIRED", {})
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}".lstrip(".")
        if key in fields:
            values[key] = convert_value(hints[key], value, path)
        elif key not in retired:
            raise unknown_key(key, fields, where)
        elif value != retired[key]:
            raise wrong_type(path, value, repr(retired[key]))
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"config section '{where or 'top level'}' lacks the key '{missing[0]}'; add it")
    return cls(**values)


def unknown_key(key: Any, known: typing.Iterable[str], where: str) -> UserError:
    """Returns the error for an unknown key; the message names the nearest known key."""
    return UserError(f"unknown config key '{f'{where}.{key}'.lstrip('.')}'; {nearest(key, known, 'keys')}")


def nearest(name: Any, known: typing.Iterable[str], kind: str) -> str:
    """Returns the hint for an unknown name: the nearest known one, or all if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known {kind}: {', '.join(known)}"


def convert_value(hint: Any, value: Any, where: str):
    """Checks a value against a type hint and converts it (numbers that YAML reads as text, nested sections)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is type(None):
                continue
            try:
                return convert_value(option, value, where)
            except UserError as error:
                errors.append(error)
        raise errors[-1]
    if dataclasses.is_dataclass(hint):
        return build_config(hint, value, where)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise wrong_type(where, value, "a list")
        (item_hint,) = typing.get_args(hint)
        return [convert_value(item_hint, item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong_type(where, value, "a mapping")
        return dict(value)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise wrong_type(where, value, " or ".join(map(repr, typing.get_args(hint))))
        return value
    return convert_scalar(hint, value, where)


_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def convert_scalar(hint: type, value: Any, where: str):
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int | str) and not is_bool:
        # YAML 1.1 reads 1e-6 (no dot) as text
        with contextlib.suppress(ValueError):
            return float(value)
    if hint in _SCALARS and (not isinstance(value, hint) or is_bool and hint is not bool):
        raise wrong_type(where, value, _SCALARS[hint])
    return value


def wrong_type(where: str, value: Any, expected: str) -> UserError:
    return UserError(f"config key '{where}' is {value!r}; expected {expected}")


def read_yaml(path: Path) -> dict:
    """Reads one YAML file. Editors of Windows may begin it with a byte order mark.

    Raises:
        UserError: the file is missing or unreadable, is not valid YAML, or contains no mapping.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b":" in content
        data = yaml.safe_load(content.decode("utf-16" if is_utf16 else "utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist; check the path, nothing is downloaded") from None
    except IsADirectoryError:
        raise UserError(f"config {path} is a folder; give a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path} is no text; give a YAML file, or the folder of a checkpoint") from None
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}; check its permissions") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"config file {path} is not valid YAML{line}: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"config file {path} holds no mapping; expected sections such as 'model:' and 'processor:'")
    return data


def with_file(error: UserError, files: Sequence[Path], parse: Callable[[Path], Any]) -> UserError:
    """Returns an error about a key with the path of the first file that alone has the same error.

    The error is returned as it is if no file has it, because its key comes from the command line.

    Args:
        parse: parses a file alone.
    """
    for file in files:
        try:
            parse(file)
        except UserError as same:
            if str(same) == str(error):
                return UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}")
    return error


def kind_of_config(data: dict) -> str:
    """Returns what a mapping read from a file configures, "" if unknown: for messages about a wrong file."""
    if "model_config" in data or "base" in data:
        return "a training job"
    if "model_type" in data or "architectures" in data:
        return "the config.json of a checkpoint"
    if "model" in data or "processor" in data:
        return "the config of a model"
    is_registry = data and all(isinstance(value, dict) and "annotations" in value for value in data.values())
    return "a registry of data sets" if is_registry else ""


def resolve_path(value: str | None, config_path: Path) -> str | None:
    """Returns the absolute path of a path in a config file.

    The path is relative to the config file, or to the working folder if it exists only there; `~` is the home folder.
    """
    if not value:
        return value
    value = os.path.expanduser(value)
    beside = (config_path.resolve().parent / value).resolve()
    return str(beside if beside.exists() or not Path(value).exists() else Path(value).resolve())


MAX_NGRAM_SIZE = 64
NUM_REPETITIONS = 4
"""Number of times that the tail of an answer repeats a sequence before it may end the answer."""


LENGTH_KEYS = ("max_new_tokens", "max_repeated_tokens", "stop_strings")
"""Options that decide where a text ends. They have no effect on pictures."""


@dataclass(kw_only=True)
class GenerationConfig:
    """Options of text generation; the default is greedy decoding.

    `top_k` 0 keeps all tokens and `top_p` 1 all probability mass. `repetition_penalty` 1 and `no_repeat_ngram_size` 0
    are off; both rules consider the tokens of the prompt and the answer, never padding. `stop_strings` end the answer
    and are not part of it; the template's end mark always stops, as a token and as text. An answer ends if its last
    `max_repeated_tokens` tokens, or more, repeat one sequence of up to 250 tokens at least four times, 0 for off; the
    default is longer than the equal cells of a table. `seed` None uses the run's seed.
    """

    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    max_repeated_tokens: int = 1000
    stop_strings: list[str] = field(default_factory=list)
    seed: int | None = None

    def __post_init__(self):
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        check(self.temperature > 0, "temperature", self.temperature, "more than 0 (for greedy set do_sample false)")
        check(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1")
        check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")
        # each token of the n-gram adds an operator to the graph
        size = self.no_repeat_ngram_size
        check(0 <= size <= MAX_NGRAM_SIZE, "no_repeat_ngram_size", size, f"0 (off) to {MAX_NGRAM_SIZE}")
        tail = self.max_repeated_tokens
        expected = f"0 (off) or at least {NUM_REPETITIONS}"
        check(tail == 0 or tail >= NUM_REPETITIONS, "max_repeated_tokens", tail, expected)
        check(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")
        check(all(self.stop_strings), "stop_strings", self.stop_strings, "no empty text")


def check(holds: bool, key: str, value, expected: str) -> None:
    if not holds:
        raise UserError(f"generation.{key} is {value!r}; expected {expected}")


@dataclass(kw_only=True)
class Scope:
    """What a model is for: words for people, and questions that fit.

    Attributes:
        note: what it can do and what it cannot; "" if that needs no words.
        note_zh: the same in Chinese; "" for `note`.
        questions: questions to offer. The first one is asked about a picture that comes without a question.
        page_question: the question that makes it read a page of a document; None for a model that reads none.
        one_picture: whether every question needs a picture of its own, without other pictures and earlier turns.
    """

    note: str = ""
    note_zh: str = ""
    questions: list[str] = field(default_factory=lambda: ["Describe the image.", "What is written in the image?"])
    page_question: str | None = None
    one_picture: bool = False

    def __post_init__(self):
        if not self.questions or not all(self.questions):
            raise wrong_type("scope.questions", self.questions, "one question or more, none empty")
