"""The registry of model families. A new family adds one row to `FAMILIES`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mindvlm.core.errors import UserError
from mindvlm.processing.samples.made_data import MadeData
from mindvlm.processing.samples.public_data import PublicData
from mindvlm.processing.samples.record_formats import RecordFormat
from mindvlm.weights.recognise import ConvertibleModel

if TYPE_CHECKING:
    from mindvlm.models.base import Family

FAMILIES = {
    "vary": "mindvlm.models.vary",
    "tinyllava": "mindvlm.models.tinyllava",
    "slime": "mindvlm.models.slime",
    "delvm": "mindvlm.models.delvm",
}
"""Family name -> package. `<package>.family` defines FAMILY, `<package>.names` defines MODELS. Optional modules:
`<package>.records` defines RECORD_FORMATS, `<package>.public_data` defines PUBLIC_DATA, `<package>.made_data` defines
MADE_DATA."""


def get_family(name: str) -> Family:
    """Returns the family of that name. The first call imports its modules and MindSpore.

    Raises:
        UserError: the name is unknown; the message lists the known names.
    """
    if name not in FAMILIES:
        raise UserError(f"config key 'family' is {name!r}; expected one of {', '.join(FAMILIES)}")
    return import_module(f"{FAMILIES[name]}.family").FAMILY


def separate_parts() -> dict[str, str]:
    """Returns key -> help text of the run config keys that name separate checkpoints of parts, of all families."""
    return {key: text for model in convertible_models() for key, text in model.separate_parts.items()}


def record_formats() -> dict[str, RecordFormat]:
    """Returns name -> format of training records, of all families. Any model may train on any of them.

    Does not import MindSpore.
    """
    return {name: format for module in _optional("records").values() for name, format in module.RECORD_FORMATS.items()}


def public_data() -> dict[tuple[str, str], PublicData]:
    """Returns (family, name) -> public data set that a family trains on. Does not import MindSpore."""
    modules = _optional("public_data").items()
    return {(family, name): data for family, module in modules for name, data in module.PUBLIC_DATA.items()}


def made_data() -> dict[tuple[str, str], MadeData]:
    """Returns (family, name) -> data that a family makes itself. Does not import MindSpore."""
    modules = _optional("made_data").items()
    return {(family, name): data for family, module in modules for name, data in module.MADE_DATA.items()}


def _optional(name: str) -> dict[str, ModuleType]:
    """Returns family -> its module of this name, for the families that have one."""
    modules = {family: f"{package}.{name}" for family, package in FAMILIES.items()}
    return {family: import_module(module) for family, module in modules.items() if find_spec(module)}


def require_downloaded(path: Path) -> None:
    """Raises UserError if there is no folder, or its config.json, at a path that is named after a published checkpoint.

    The message says how to get it. Does not import MindSpore.
    """
    folder = path.parent if path.name == "config.json" else path
    if folder.exists():
        return
    for model in convertible_models():
        for repository in model.published:
            if repository.rpartition("/")[2].lower() == folder.name.lower():
                raise UserError(
                    f"{folder} does not exist, and nothing is downloaded; run: hf download {repository} --local-dir "
                    f"{folder} (docs/{model.family}.md shows its use)"
                )


def convertible_models() -> tuple[ConvertibleModel, ...]:
    """Returns the convertible models of all families. Does not import MindSpore."""
    return tuple(model for package in FAMILIES.values() for model in import_module(f"{package}.names").MODELS)
