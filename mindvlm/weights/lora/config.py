"""What `adapter_config.json` of a PEFT adapter says about merging it, and which kinds of adapter cannot be merged.

Source of the fields and of their meaning: peft/tuners/lora/config.py and layer.py (PEFT 0.3 to 0.21).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.weights.config_json import read_config_file, shown, shown_name

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
_MERGE_WITH_PEFT = "merge it with peft's merge_and_unload and convert the result"


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that decide what merging it does.

    Attributes:
        path: the file.
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: regular expressions over the end of a module's name, and what holds for it.
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
        """Return the rank of the adapter of a module, by its full name."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the factor that B @ A of a module is multiplied by."""
        rank = self.rank_of(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read an `adapter_config.json`.

    Raises:
        UserError: missing, unreadable, not a LoRA adapter, or one of a kind whose merge is not a sum with B @ A.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; a PEFT adapter needs it beside its weights")
    fields = read_config_file(path, remedy="copy the adapter again")
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {shown(kind)}, only 'LORA' can be merged; {_MERGE_WITH_PEFT}")
    for name, value in fields.items():
        if value in (None, False) or value == {} or value == []:
            continue
        if name not in _UNDERSTOOD | _WITHOUT_EFFECT:
            raise UserError(f"{path}: {shown_name(name)} is {shown(value)}, which cannot be merged; {_MERGE_WITH_PEFT}")
    start = fields.get("init_lora_weights", True)
    if start not in _PLAIN_INITIALISATIONS:
        raise UserError(
            f"{path}: init_lora_weights is {shown(start)}, which changes the base weights before training; "
            f"save the adapter as plain LoRA (path_initial_model_for_weight_conversion) or {_MERGE_WITH_PEFT}"
        )
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UserError(f"{path}: bias is {shown(fields['bias'])}; expected 'none', 'all' or 'lora_only'")
    return AdapterConfig(
        path=path,
        rank=_rank(path, "r", fields.get("r")),
        alpha=_alpha(path, "lora_alpha", fields.get("lora_alpha")),
        rank_pattern=_patterns(path, fields, "rank_pattern", _rank),
        alpha_pattern=_patterns(path, fields, "alpha_pattern", _alpha),
        use_rslora=_flag(path, fields, "use_rslora"),
        fan_in_fan_out=_flag(path, fields, "fan_in_fan_out"),
        modules_to_save=_names(path, "modules_to_save", fields.get("modules_to_save") or []),
        target_modules=_listed_targets(path, fields),
    )


def _rank(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise UserError(f"{path}: {name} is {shown(value)}; expected a positive whole number")
    return value


def _alpha(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise UserError(f"{path}: {name} is {shown(value)}; expected a number")
    return float(value)


def _flag(path: Path, fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {name} is {shown(value)}; expected true or false")
    return bool(value)


def _names(path: Path, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise UserError(f"{path}: {name} is {shown(value)}; expected a list of module names")
    return tuple(value)


def _listed_targets(path: Path, fields: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The targeted names, if they alone decide which modules are adapted."""
    value = fields.get("target_modules")
    limited = any(fields.get(name) not in (None, []) for name in ("exclude_modules", "layers_to_transform"))
    if value is None or isinstance(value, str) or limited:
        return None
    return _names(path, "target_modules", value)


def _patterns(path: Path, fields: Mapping[str, Any], name: str, read: Callable[..., Any]) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} is {shown(value)}; expected a table of module names")
    for pattern in value:
        _check_pattern(path, name, pattern)
    return {pattern: read(path, f"{name} of {shown(pattern)}", item) for pattern, item in value.items()}


def _check_pattern(path: Path, name: str, pattern: str) -> None:
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
    """As PEFT matches: the whole name, or its end behind a dot."""
    return rf"(.*\.)?({pattern})$"
