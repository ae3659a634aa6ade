"""The keys of a LoRA adapter in the layout of PEFT: which tensors of the base model it changes, and how.

The keys of an adapter file, with M for the name of a module in the base model:

- base_model.model.M.lora_A.weight (rank, in) and .lora_B.weight (out, rank): M.weight gets scaling * B @ A.
- base_model.model.M.lora_B.bias (out): M.bias gets scaling times it (`lora_bias`).
- base_model.model.M.lora_embedding_A (rank, rows) and .lora_embedding_B (columns, rank): M.weight gets its transpose.
- anything else, base_model.model.M.weight: replaces that tensor (`modules_to_save`, trained biases).

Names in files of a whole training state also contain the adapter's name (often `default`), `modules_to_save` or
`base_layer`, and may begin with the prefix of a wrapper. The LLaVA programs save parts that were trained completely,
such as a connector, in a second file beside the adapter, with or without PEFT's prefix.
Source: peft/utils/save_and_load.py and peft/tuners/lora/layer.py; llava/train/train.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mindvlm.checkpoint import TensorInfo
from mindvlm.checkpoint.dtypes import is_float
from mindvlm.weights.lora.config import AdapterConfig
from mindvlm.weights.rules.findings import Finding
from mindvlm.weights.wrappers import WORDS_INSIDE

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|_forward_module|base_model\.model)\.)*")
_MAX_CHARACTERS = 256
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.(weight|bias)")
_EMBEDDING_FACTOR = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
_UNKNOWN_KIND = re.compile(r"\.(lora_[^.]+|token_adapter|trainable_tokens[^.]*|original_module)(\.|$)")


@dataclass(frozen=True)
class LowRank:
    """A weight of the base model that gets scaling * B @ A added, or the transpose of that.

    Attributes:
        module: name of the module in the base model; its tensor is `module.weight`.
        key_a, key_b: the adapter's tensors, (rank, in, ...) and (out, rank, ...).
        scaling: alpha / rank or alpha / sqrt(rank).
        is_embedding: whether the factors are those of an embedding, whose weight is (in, out).
    """

    module: str
    key_a: str
    key_b: str
    scaling: float
    is_embedding: bool

    @property
    def target(self) -> str:
        return f"{self.module}.weight"


@dataclass(frozen=True)
class BiasShift:
    """A bias of the base model that gets scaling * tensor added."""

    key: str
    scaling: float


@dataclass
class Draft:
    """The keys of an adapter's file, sorted by their effect, and the problems found.

    `is_adapter` is False for the second file, whose tensors replace others and need no prefix.
    """

    config: AdapterConfig
    infos: Mapping[str, TensorInfo]
    is_adapter: bool = True
    factors: dict[tuple[str, bool], dict[str, str]] = field(default_factory=dict)
    shifts: dict[str, BiasShift] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    name: str = "default"

    def sort_keys(self) -> None:
        """Sorts all keys. Those of a second adapter, under another name, are unexpected."""
        found = (_FACTOR.fullmatch(key) or _EMBEDDING_FACTOR.fullmatch(key) for key in self.infos)
        names = Counter(factor[3] or self.name for factor in found if factor)
        if names:
            self.name = names.most_common(1)[0][0]
        for key in self.infos:
            self._sort_key(key)

    def _sort_key(self, key: str) -> None:
        start = _WRAPPERS.match(key)[0]
        name = WORDS_INSIDE.sub("", key.removeprefix(start))
        factor, embedding = _FACTOR.fullmatch(name), _EMBEDDING_FACTOR.fullmatch(name)
        found = factor or embedding
        if self.is_adapter and _PREFIX not in start:
            self._add("unexpected", key, f"keys of a PEFT adapter start with {_PREFIX}")
        elif len(key) > _MAX_CHARACTERS:
            self._add("unexpected", key[:_MAX_CHARACTERS], f"a name of {len(key)} characters")
        elif found and not self.is_adapter:
            self._add("unexpected", key, "a factor of an adapter; it belongs into the adapter's own file")
        elif found and (found[3] or "default") != self.name:
            self._add("unexpected", key, f"of another adapter than {self.name!r}; save one adapter alone")
        elif embedding:
            self._put(self.factors.setdefault((embedding[1], True), {}), embedding[2], key)
        elif factor and factor[4] == "weight":
            self._put(self.factors.setdefault((factor[1], False), {}), factor[2], key)
        elif factor and factor[2] == "B":
            self._put(self.shifts, f"{factor[1]}.bias", BiasShift(key, self.config.scaling_of(factor[1])))
        elif _UNKNOWN_KIND.search(f".{name}"):
            self._add("unexpected", key, "a kind of adapter tensor that cannot be merged")
        else:
            module, saved, rest = name.partition(".modules_to_save.")
            first, _, inner = rest.partition(".")
            # the second file has the names of the model in memory, always with that of the adapter
            is_named = first in (self.name, "default") or not self.is_adapter and not first.isdigit()
            rest = inner if is_named and inner else rest
            self._put(self.replaced, f"{module}.{rest}" if saved else name, key)
        if not is_float(self.infos[key].dtype):
            self._add("dtype", key, f"{self.infos[key].dtype}, expected a floating-point type")

    def pairs(self) -> dict[str, LowRank]:
        """Joins each A with its B."""
        low_rank: dict[str, LowRank] = {}
        for (module, is_embedding), keys in self.factors.items():
            present = next(iter(keys.values()))
            for here, absent in (("A", "B"), ("B", "A")):
                if absent not in keys:
                    partner = present.replace(f".lora_{here}", f".lora_{absent}")
                    partner = partner.replace(f".lora_embedding_{here}", f".lora_embedding_{absent}")
                    self._add("missing", partner, f"the partner of {here}")
            if len(keys) == 2:
                self._check_rank(module, keys["A"], keys["B"])
                pair = LowRank(module, keys["A"], keys["B"], self.config.scaling_of(module), is_embedding)
                if pair.target in low_rank:
                    self._add("duplicate", pair.key_a, f"{pair.target} has other factors as well")
                low_rank[pair.target] = pair
        return low_rank

    def check_saved_modules(self, elsewhere: Iterable[str]) -> None:
        """Finds modules of the config that neither this file nor the tensors `elsewhere` replace."""
        targets = [*self.replaced, *elsewhere]
        for module in self.config.modules_to_save:
            if not any(f".{module}." in f".{target}" for target in targets):
                self._add("missing", module, "the config lists it in modules_to_save")

    def _check_rank(self, module: str, key_a: str, key_b: str) -> None:
        shape_a, shape_b = self.infos[key_a].shape, self.infos[key_b].shape
        if len(shape_a) < 2 or len(shape_b) < 2 or shape_a[0] != shape_b[1]:
            self._add("shape", key_a, f"{list(shape_a)} does not multiply with B of {list(shape_b)}")
        elif shape_a[0] != self.config.rank_of(module):
            self._add("shape", key_a, f"rank {shape_a[0]}, the config says {self.config.rank_of(module)}")

    def _put(self, table: dict, name: str, value: object) -> None:
        if name in table:
            key = value.key if isinstance(value, BiasShift) else str(value)
            self._add("duplicate", key, "another key has the same meaning")
        table[name] = value

    def _add(self, status: str, name: str, detail: str) -> None:
        self.findings.append(Finding(status, name, detail))
