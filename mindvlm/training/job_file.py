"""The YAML file of a training job: what it is based on, what the command line replaces, where its paths lead."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mindvlm.core.config import build_config, read_yaml, resolve_path
from mindvlm.core.errors import UserError
from mindvlm.training.config import TrainConfig


@dataclass(frozen=True)
class Job:
    """A job as it was written and as it runs.

    Attributes:
        config: with paths made absolute.
        written: the same as plain data with its paths as written, to compare runs by.
    """

    config: TrainConfig
    written: dict[str, Any]


def read_job(path: str | Path, overrides: dict[str, Any] | None = None) -> Job:
    """Reads a job's YAML.

    Args:
        overrides: values by dotted key ("parallel.dp": 8), in place of those of the file.

    Raises:
        UserError: the file is missing or malformed, or a key or value is impossible.
    """
    path = Path(path)
    data = read_with_base(path)
    for key, value in (overrides or {}).items():
        set_dotted(data, key, value)
    config = build_config(TrainConfig, data)
    config.num_passes  # noqa: B018 (refuses rows that cannot be divided before anything is built)
    written = asdict(config)
    config.model_config = resolve_path(config.model_config, path)
    if isinstance(tower := config.model_changes.get("vision_tower"), str):
        config.model_changes = {**config.model_changes, "vision_tower": resolve_path(tower, path)}
    config.init.weights = [resolve_path(weights, path) for weights in config.init.weights]
    if config.data:
        config.data.resolve_paths(path)
    if config.evaluation:
        config.evaluation.registry = (
            resolve_path(config.evaluation.registry, path) if config.evaluation.registry else config.data.registry
        )
    return Job(config, written)


def read_with_base(path: Path) -> dict[str, Any]:
    """The mapping of a job's file, laid over that of the file beside it which its key `base` names.

    Raises:
        UserError: a file cannot be read; the base has a base of its own or is in another folder, where its paths would
            lead elsewhere.
    """
    data = read_yaml(path)
    name = data.pop("base", None)
    if name is None:
        return data
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"base in {path} is {name!r}; expected the name of a file in the same folder")
    base = read_yaml(path.with_name(name))
    if "base" in base:
        raise UserError(f"base in {path}: {name} has a base itself; base it on {base['base']!r} directly")
    return lay_over(base, data)


def lay_over(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `data` in place of its own, section by section."""
    merged = dict(base)
    for key, value in data.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = lay_over(base[key], value) if both else value
    return merged


def set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets `data["a"]["b"]` for the key "a.b"; sections that are missing or null are made."""
    *sections, last = key.split(".")
    for name in sections:
        section = data.get(name)
        if section is None:
            section = data[name] = {}
        if not isinstance(section, dict):
            raise UserError(f"--set {key}: {name} is {section!r} and no section; correct the key")
        data = section
    data[last] = value


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """`key=value` texts of the command line; values are YAML ("null", "[1, 2]", "0.1").

    Raises:
        UserError: a text has no "=" or its value is no YAML.
    """
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f"--set {text!r}; expected KEY=VALUE, such as parallel.dp=8")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {key}: {value!r} is not valid YAML; quote it") from None
    return overrides
