"""Reads the YAML of a training job: its base, the overrides of the command line, its paths."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mindvlm.core.config import build_config, kind_of_config, read_yaml, resolve_path, with_file
from mindvlm.core.errors import UserError
from mindvlm.models.own_training import OwnTraining
from mindvlm.models.registry import separate_parts
from mindvlm.models.run_config import find_family
from mindvlm.training.config import EvaluationConfig, TrainConfig
from mindvlm.training.datasets.config import DatasetsConfig


@dataclass(frozen=True)
class Job:
    """A training job.

    Attributes:
        config: the typed config, with absolute paths.
        written: the same as plain data with the paths as written, for comparing runs.
    """

    config: TrainConfig
    written: dict[str, Any]


def read_job(path: str | Path, overrides: dict[str, Any] | None = None) -> Job:
    """Reads a job's YAML.

    Args:
        overrides: values by dotted key ("parallel.dp": 8) that replace those of the file.

    Raises:
        UserError: the file is missing or malformed, or a key or value is invalid. The message begins with the path of
            the file, or of its base, in which the key stands.
    """
    path = Path(path).expanduser()
    data = read_with_base(path)
    for key, value in (overrides or {}).items():
        set_dotted(data, key, value)
    try:
        return parse_job(data, path)
    except UserError as error:
        base = read_yaml(path).get("base")
        files = [path.with_name(base), path] if base else [path]
        raise with_file(error, files, lambda file: parse_job(read_with_base(file), file)) from None


def parse_job(data: dict[str, Any], path: Path) -> Job:
    """Returns the job of a mapping. Relative paths start at the folder of the file.

    Raises:
        UserError: a key or value is invalid.
    """
    if "weights" in data:
        raise UserError(
            f"{path}: weights is {data['weights']!r}, but a training job holds all weights in dtype; remove the key"
        )
    own_sections = build_sections(data, path)
    config = build_config(TrainConfig, data)
    config.own_sections = own_sections
    config.num_passes  # noqa: B018 (refuses rows that cannot be divided before anything is built)
    written = asdict(config)
    config.output_dir = os.path.expanduser(config.output_dir)
    config.model_config = resolve_path(config.model_config, path)
    parts = {key: value for key in separate_parts() if isinstance(value := config.model_changes.get(key), str)}
    config.model_changes = config.model_changes | {key: resolve_path(part, path) for key, part in parts.items()}
    config.init.weights = [resolve_path(weights, path) for weights in config.init.weights]
    for section in (config.data, config.evaluation, *own_sections.values()):
        if hasattr(section, "resolve_paths"):
            section.resolve_paths(path)
    if isinstance(config.evaluation, EvaluationConfig) and not config.evaluation.registry:
        config.evaluation.registry = config.data.registry
    return Job(config, written)


TEXT_SECTIONS: Mapping[str, type] = {"data": DatasetsConfig, "evaluation": EvaluationConfig}


def build_sections(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Builds the sections that depend on the family, in place; returns those that `TrainConfig` does not name.

    Raises:
        UserError: the model's config does not exist, or a section has a wrong key or value.
    """
    training = own_training(data, path)
    kinds = training.sections(data) if training else TEXT_SECTIONS
    for name in TEXT_SECTIONS.keys() - kinds.keys():
        if data.get(name) is not None:
            raise UserError(f"{name}: this model has no such section; remove it")
    given = {name: (kind, data.pop(name, None)) for name, kind in kinds.items()}
    built = {name: build_config(kind, value, name) for name, (kind, value) in given.items() if value is not None}
    data |= {name: built.pop(name) for name in TEXT_SECTIONS if name in built}
    return built


def own_training(data: dict[str, Any], path: Path) -> OwnTraining | None:
    """Returns the training of the family of a job's model; None if it trains on questions and answers.

    Raises:
        UserError: the job names no model, or its config does not exist.
    """
    if not isinstance(data.get("model_config"), str):
        # raises the error about this key
        build_config(TrainConfig, {key: data[key] for key in ("model_config", "output_dir") if key in data})
    return find_family(resolve_path(data["model_config"], path)).training


def read_with_base(path: Path) -> dict[str, Any]:
    """Reads a job's file and merges it over the file that its key `base` names.

    Raises:
        UserError: a file cannot be read, or the base has a base itself or is in another folder, which would change the
            meaning of its paths.
    """
    data = read_yaml(path)
    if (kind := kind_of_config(data)) not in ("", "a training job"):
        key = "data.registry" if kind == "a registry of data sets" else "model_config"
        raise UserError(
            f"config {path} is {kind}; give a training job that names it as {key}, see configs/*/train_*.yaml"
        )
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
    """Returns `base` with its values replaced by those of `data`, section by section."""
    merged = dict(base)
    for key, value in data.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = lay_over(base[key], value) if both else value
    return merged


def set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets `data["a"]["b"]` for the key "a.b"; creates sections that are missing or null."""
    *sections, last = key.split(".")
    for name in sections:
        section = data.get(name)
        if section is None:
            section = data[name] = {}
        if not isinstance(section, dict):
            raise UserError(f"--set {key}: {name} is {section!r}, not a section; correct the key")
        data = section
    data[last] = value


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """Parses `key=value` arguments of the command line; values are YAML ("null", "[1, 2]", "0.1").

    Raises:
        UserError: an argument has no "=", or its value is not valid YAML.
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
