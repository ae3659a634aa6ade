"""Reads the `adapter_config.json` of a PEFT adapter and refuses kinds of adapters that cannot be merged.

The fields and their meaning are those of peft/tuners/lora/config.py and layer.py (PEFT 0.3 to 0.21).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.weights.config_json import FLAG, SIZE, TABLE, ConfigTable, Kind, read_config_file, shown, shown_name

CONFIG_NAME = "adapter_config.json"
_MAX_PATTERN_CHARACTERS = 512
_MAX_REPETITIONS = 3
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "layers_pattern",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_UNDERSTOOD = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
_ALPHA = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < 1e30)
_BIAS = Kind("'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only"))
_MODULES = Kind(
    "a list of module names",
    lambda value: isinstance(value, list) and all(isinstance(name, str) and name for name in value),
)
_MERGE_WITH_PEFT = "merge it with peft's merge_and_unload and convert the result"


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that affect merging.

    Attributes:
        path: the file.
        rank, alpha: of modules that match no pattern.
        rank_pattern, alpha_pattern: values by regular expression, which matches the end of a module's name.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        fan_in_fan_out: the weights of targeted linear modules are stored (in, out), as in Conv1D of GPT-2.
        modules_to_save: modules whose tensors the adapter replaces.
        target_modules: names of the adapted modules, or None if the config does not list all of them by name.
    """

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    target_modules: tuple[str, ...] | None

    def rank_of(self, module: str) -> int:
        """Returns the rank of the adapter of a module, by its full name."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Returns the factor that B @ A of a module is multiplied by."""
        rank = self.rank_of(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Reads an `adapter_config.json`.

    Raises:
        UserError: missing, unreadable, not a LoRA adapter, or of a kind whose merge is not a sum with B @ A.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; a PEFT adapter needs it beside its weights")
    fields = read_config_file(path, remedy="copy the adapter again")
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {shown(kind)}, only 'LORA' can be merged; {_MERGE_WITH_PEFT}")
    # null, false and empty values switch a setting off
    given = {name: value for name, value in fields.items() if value not in (None, {}, []) and value is not False}
    for name, value in given.items():
        if value != 0 and name not in _UNDERSTOOD | _WITHOUT_EFFECT:
            raise UserError(f"{path}: {shown_name(name)} is {shown(value)}, which cannot be merged; {_MERGE_WITH_PEFT}")
    start = given.get("init_lora_weights", True)
    if start not in _PLAIN_INITIALISATIONS:
        raise UserError(
            f"{path}: init_lora_weights is {shown(start)}, which changes the base weights before training; "
            f"save the adapter as plain LoRA (path_initial_model_for_weight_conversion) or {_MERGE_WITH_PEFT}"
        )
    table = ConfigTable(given, str(path))
    table.get("bias", _BIAS)
    return AdapterConfig(
        path=path,
        rank=table.require("r", SIZE),
        alpha=table.require("lora_alpha", _ALPHA),
        rank_pattern=_patterns(table, "rank_pattern", SIZE),
        alpha_pattern=_patterns(table, "alpha_pattern", _ALPHA),
        use_rslora=table.get("use_rslora", FLAG, False),
        fan_in_fan_out=table.get("fan_in_fan_out", FLAG, False),
        modules_to_save=tuple(table.get("modules_to_save", _MODULES, ())),
        target_modules=_listed_targets(table),
    )


def _listed_targets(table: ConfigTable) -> tuple[str, ...] | None:
    """Returns the targeted names if they alone decide which modules are adapted."""
    value = table.values.get("target_modules")
    if value is None or isinstance(value, str) or "exclude_modules" in table or "layers_to_transform" in table:
        return None
    return tuple(table.get("target_modules", _MODULES))


def _patterns(table: ConfigTable, name: str, kind: Kind) -> dict[str, Any]:
    patterns = table.get(name, TABLE, {})
    for pattern, value in patterns.items():
        _check_pattern(table.path, name, pattern)
        if not kind.accepts(value):
            raise table.error(f"{name} of {shown(pattern)} is {shown(value)}, expected {kind.expected}")
    return dict(patterns)


def _check_pattern(path: str, name: str, pattern: str) -> None:
    """Refuse regular expressions whose matching could take longer than polynomial time of a low degree."""
    repetitions = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > _MAX_PATTERN_CHARACTERS or repetitions > _MAX_REPETITIONS or re.search(r"\)[*+{?]", pattern):
        raise UserError(f"{path}: {name} has the pattern {shown(pattern)}, too involved to match; write module names")
    try:
        re.compile(_anchored(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: {name} has the pattern {shown(pattern)}, no regular expression") from error


def _first_match(table: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in table.items():
        if re.match(_anchored(pattern), module):
            return value
    return default


def _anchored(pattern: str) -> str:
    """Returns the expression that PEFT matches: of the whole name, or of its end behind a dot."""
    return rf"(.*\.)?({pattern})$"
