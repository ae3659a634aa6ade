"""The registry of training data: a YAML with the name, images, annotation file and weight of each data set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mindvlm.core.config import build_config, kind_of_config, read_yaml, unknown_key
from mindvlm.core.errors import UserError
from mindvlm.models.registry import record_formats


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One data set.

    Attributes:
        annotations: JSON list, or one JSON record a line; relative to the registry file, like `images`.
        images: folder of the image names in the records; None for text alone.
        format: name in `record_formats`.
        weight: passes over the data set in an epoch; 0.5 takes one half, and the other half in the next epoch.
        name: the key in the registry.
    """

    annotations: str
    images: str | None = None
    format: str = "vary"
    weight: float = 1.0
    name: str = ""


def read_registry(path: str | Path) -> dict[str, DatasetEntry]:
    """Reads `name: {images: FOLDER, annotations: FILE, format: vary, weight: 1.0}` entries, and resolves their paths.

    Raises:
        UserError: the file is missing or not YAML, or an entry has an unknown key or an invalid value.
    """
    path = Path(path).expanduser()
    folder = path.resolve().parent
    entries = {}
    data = read_yaml(path)
    if (kind := kind_of_config(data)) not in ("", "a registry of data sets"):
        raise UserError(
            f"data.registry {path} is {kind}; give a YAML of {{NAME: {{images: FOLDER, annotations: FILE}}}}"
        )
    for name, values in data.items():
        where = f"{path}, data set {name!r}"
        if not isinstance(values, dict):
            raise UserError(f"{where}: is {values!r}; expected {{images: FOLDER, annotations: FILE}}")
        try:
            entry = build_config(DatasetEntry, {**values, "name": str(name)})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        _check_weight(entry.weight, where)
        if entry.format not in (known := record_formats()):
            raise UserError(f"{where}: format is {entry.format!r}; expected {' or '.join(map(repr, known))}")
        annotations = folder / os.path.expanduser(entry.annotations)
        images = str(folder / os.path.expanduser(entry.images)) if entry.images is not None else None
        entries[str(name)] = replace(entry, annotations=str(annotations), images=images)
    return entries


def choose_datasets(
    registry: dict[str, DatasetEntry], names: str | Sequence[str], *, weights: dict[str, float] | None = None
) -> list[DatasetEntry]:
    """Returns the entries of a job in the given order.

    Args:
        names: list of names, or names joined by "+".
        weights: override those of the registry.

    Raises:
        UserError: a name is unknown, given twice, or none is given; its annotation file or images folder is missing.
    """
    chosen = [name.strip() for name in (names.split("+") if isinstance(names, str) else names)]
    weights = weights or {}
    if not any(chosen):
        raise UserError(f"data.datasets is {names!r}; name at least one of {', '.join(registry)}")
    for name in chosen:
        if name not in registry:
            raise UserError(f"data.datasets: {_hint(unknown_key(name, registry, ''))}")
    for name, weight in weights.items():
        if name not in chosen:
            raise UserError(f"data.weights names {name!r}, which is not one of data.datasets ({', '.join(chosen)})")
        _check_weight(weight, f"data.weights.{name}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"data.datasets is {names!r}; name each once and give it a weight instead")
    entries = [replace(registry[name], weight=float(weights.get(name, registry[name].weight))) for name in chosen]
    for entry in entries:
        _check_paths(entry)
    return entries


def _hint(error: UserError) -> str:
    return str(error).replace("unknown config key", "unknown data set").replace("known keys", "the registry has")


def _check_weight(weight: object, where: str) -> None:
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
        raise UserError(f"{where}: weight is {weight!r}; expected a number above 0, or leave the data set out")


def _check_paths(entry: DatasetEntry) -> None:
    if not Path(entry.annotations).is_file():
        raise UserError(f"data set {entry.name!r}: annotation file {entry.annotations} not found; correct the registry")
    if entry.images is not None and not Path(entry.images).is_dir():
        raise UserError(f"data set {entry.name!r}: images folder {entry.images} not found; correct the registry")
