"""Saves a trained adapter in the layout of PEFT, with the names of the Hugging Face files of its base.

Where a published tensor consists of several native ones, stacked by rows (Qwen's `c_attn` of query, key and value),
their factors become one pair that computes the same: the A are stacked, the B form a block diagonal, and rank and alpha
are multiplied by their number, as `rank_pattern` and `alpha_pattern` of `adapter_config.json` record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindvlm.checkpoint import MemorySource, RawTensor, TensorInfo, atomic_file, write_safetensors
from mindvlm.core.errors import UserError
from mindvlm.weights.lora.config import CONFIG_NAME
from mindvlm.weights.recognise import ConvertibleModel
from mindvlm.weights.rules.planning import make_plan

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Fused:
    """The published weight of adapted Linears: its module, and the native modules whose rows it stacks, in order."""

    module: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]


class AdapterFiles:
    """Writes `adapter_model.safetensors` and `adapter_config.json` of a model whose Linears are adapted.

    Args:
        model: the base.
        infos: its tensors under native names, whole.
        adapted: names of the adapted Linears; `NAME.lora_A` and `NAME.lora_B` are their factors.
        whole: native names of the base's tensors that train without an adapter.
        rank, alpha, dropout: of every adapted Linear.

    Attributes:
        needed: native names of the tensors that `write` needs.
        modules: the published modules that contain such tensors; PEFT needs them complete.

    Raises:
        UserError: such a module is adapted too, or contains an adapted one.
    """

    def __init__(
        self,
        model: ConvertibleModel,
        infos: Mapping[str, TensorInfo],
        adapted: Sequence[str],
        whole: Sequence[str],
        *,
        rank: int,
        alpha: float,
        dropout: float,
    ):
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.adapted = frozenset(adapted)
        # a tied tensor has one name here
        table = model.hf.without(model.hf.aliases).reverse()
        self.plan = make_plan(table, infos, partial=True, origin="the model")
        targets = [target for name in adapted for target in self.plan.targets_of(f"{name}.weight")]
        self.fused = [self._fused(target, infos) for target in dict.fromkeys(targets)]
        trained = dict.fromkeys(target for name in whole for target in self.plan.targets_of(name))
        modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in trained))
        # PEFT cannot save a module inside another one that it saves
        self.modules = tuple(m for m in modules if not any(m.startswith(f"{other}.") for other in modules))
        self.saved = tuple(name for name in self.plan.infos if any(name.startswith(f"{m}.") for m in self.modules))
        for module in self.modules:
            inside = [fused.module for fused in self.fused if f"{fused.module}.".startswith(f"{module}.")]
            if inside:
                raise UserError(
                    f"lora: something of {module} trains whole and {inside[0]} is adapted, as the published files name "
                    "them, which PEFT cannot hold; take one of them out of lora.targets or out of what trains whole"
                )
        factors = [f"{name}.lora_{factor}" for name in adapted for factor in "AB"]
        pieces = [name for target in self.saved for name in self.plan.sources_of(target)]
        self.needed = (*factors, *dict.fromkeys(pieces))

    def _fused(self, target: str, infos: Mapping[str, TensorInfo]) -> _Fused:
        parts = self.plan.sources_of(target)
        modules = tuple(name.removesuffix(".weight") for name in parts)
        return _Fused(target.removesuffix(".weight"), modules, tuple(infos[name].shape[0] for name in parts))

    def write(self, folder: Path, tensors: Mapping[str, RawTensor]) -> None:
        """Writes both files from the tensors of `needed`. Raises UserError if a file cannot be written."""
        source = MemorySource(self.tensors(tensors))
        write_safetensors(folder / WEIGHTS_NAME, source, metadata={"format": "pt"})
        with atomic_file(folder / CONFIG_NAME) as file:
            file.write((json.dumps(self.config(), indent=2) + "\n").encode())

    def tensors(self, native: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
        """Returns the adapter's tensors under PEFT's names."""
        made = {}
        for fused in self.fused:
            a, b = self._factors(fused, native)
            made[f"{_PREFIX}{fused.module}.lora_A.weight"] = a
            made[f"{_PREFIX}{fused.module}.lora_B.weight"] = b
        for target in self.saved:
            parts = [native[name] for name in self.plan.sources_of(target)]
            info = self.plan.infos[target]
            data = np.concatenate([part.data.reshape(-1) for part in parts]).reshape(info.shape)
            made[f"{_PREFIX}{target}"] = RawTensor(parts[0].dtype, info.shape, data)
        return made

    def _factors(self, fused: _Fused, native: Mapping[str, RawTensor]) -> tuple[RawTensor, RawTensor]:
        present = [part for part in fused.parts if part in self.adapted]
        factors = {part: (native[f"{part}.lora_A"], native[f"{part}.lora_B"]) for part in present}
        stacked = np.concatenate([factors[part][0].data for part in present])
        first_b = factors[present[0]][1]
        # zero has the same bits in every dtype
        diagonal = np.zeros((sum(fused.rows), len(stacked)), first_b.data.dtype)
        row = column = 0
        for part, num_rows in zip(fused.parts, fused.rows, strict=True):
            if part in factors:
                diagonal[row : row + num_rows, column : column + self.rank] = factors[part][1].data
                column += self.rank
            row += num_rows
        dtype = first_b.dtype
        return RawTensor(dtype, stacked.shape, stacked), RawTensor(dtype, diagonal.shape, diagonal)

    def config(self) -> dict[str, Any]:
        """Returns the content of `adapter_config.json`."""
        counts = {fused.module: sum(part in self.adapted for part in fused.parts) for fused in self.fused}
        several = {module: count for module, count in counts.items() if count > 1}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "rank_pattern": {module: count * self.rank for module, count in several.items()},
            "alpha_pattern": {module: count * self.alpha for module, count in several.items()},
            "target_modules": list(counts),
            "modules_to_save": list(self.modules) or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "init_lora_weights": True,
        }
