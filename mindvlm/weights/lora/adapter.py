"""A LoRA adapter in the layout of PEFT: which tensors of the base model it changes, and by which of its own.

The keys of an adapter file, with M for the name of a module in the base model:

- base_model.model.M.lora_A.weight (rank, in) and .lora_B.weight (out, rank): M.weight gets scaling * B @ A.
- base_model.model.M.lora_B.bias (out): M.bias gets scaling times it (`lora_bias`).
- base_model.model.M.lora_embedding_A (rank, rows) and .lora_embedding_B (columns, rank): M.weight gets its transpose.
- anything else, base_model.model.M.weight: replaces that tensor (`modules_to_save`, trained biases).

Names in files of a whole training state also contain `default`, `modules_to_save` or `base_layer`. The LLaVA programs
save parts that were trained completely, such as a connector, in a second file beside the adapter.
Source: peft/utils/save_and_load.py and peft/tuners/lora/layer.py; llava/train/train.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mindvlm.checkpoint import TensorInfo, TensorSource, open_checkpoint
from mindvlm.checkpoint.dtypes import is_float
from mindvlm.core.errors import UserError
from mindvlm.weights.lora.config import CONFIG_NAME, AdapterConfig, read_adapter_config
from mindvlm.weights.rules.findings import ConversionError, Finding
from mindvlm.weights.rules.overlaid import OverlaidSource

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED_WHOLE = "non_lora_trainables.bin"
_PREFIX = "base_model.model."
_MAX_CHARACTERS = 256
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.(weight|bias)")
_EMBEDDING_FACTOR = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")
_SAVED_MODULE = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
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


@dataclass(frozen=True)
class Adapter:
    """An opened adapter; `open_adapter` makes one. A context manager, closed by `close()`.

    Attributes:
        config: its settings.
        checkpoint: its tensors.
        weight_files: the files of the tensors.
        low_rank, shifts, replaced: the changes, by the name of the changed tensor in the base model; the values of
            `replaced` are names in `checkpoint`.
    """

    config: AdapterConfig
    checkpoint: TensorSource
    weight_files: tuple[Path, ...]
    low_rank: Mapping[str, LowRank]
    shifts: Mapping[str, BiasShift]
    replaced: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.config.path.parent

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights and the config."""
        return (*self.weight_files, self.config.path)

    @property
    def targets(self) -> Mapping[str, tuple[str, ...]]:
        """The changed tensors of the base model, each with the adapter's tensors that change it."""
        targets = {target: (key,) for target, key in self.replaced.items()}
        for target, shift in self.shifts.items():
            targets[target] = (*targets.get(target, ()), shift.key)
        for target, pair in self.low_rank.items():
            targets[target] = (*targets.get(target, ()), pair.key_a, pair.key_b)
        return targets

    def fits(self, infos: Mapping[str, TensorInfo]) -> bool:
        """Tells whether all tensors that it changes are in `infos`, whatever their shapes."""
        return all(target in infos for target in self.targets)

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_adapter(path: str | Path) -> Adapter:
    """Opens a PEFT LoRA adapter by its folder or its weights file, with `adapter_config.json` beside the weights.

    `non_lora_trainables.bin` in the folder belongs to the adapter. Only headers and the config are read.

    Raises:
        UserError: a missing or damaged file, or an adapter of a kind that cannot be merged.
        ConversionError: keys of an unknown kind, a factor without its partner, or ranks that are not the config's.
    """
    weights = _find_weights(Path(path))
    config = read_adapter_config(weights.parent / CONFIG_NAME)
    whole = weights.with_name(_TRAINED_WHOLE)
    files = (weights, whole) if weights.name in _WEIGHTS and whole.is_file() else (weights,)
    checkpoint = OverlaidSource([(str(file), open_checkpoint(file)) for file in files])
    draft = _Draft(config, checkpoint.infos)
    for key in checkpoint.infos:
        draft.sort_key(key)
    low_rank = draft.pairs()
    draft.check_saved_modules()
    if draft.findings:
        checkpoint.close()
        raise ConversionError(f"{weights} is not a complete LoRA adapter", draft.findings)
    return Adapter(config, checkpoint, files, low_rank, draft.shifts, draft.replaced)


def _find_weights(path: Path) -> Path:
    if path.is_file():
        if path.name == CONFIG_NAME:
            return _find_weights(path.parent)
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give the folder of a PEFT adapter")
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: holds no adapter; expected {' or '.join(_WEIGHTS)} with {CONFIG_NAME} beside it")


@dataclass
class _Draft:
    """The keys of an adapter file, sorted by their effect, and the problems found."""

    config: AdapterConfig
    infos: Mapping[str, TensorInfo]
    factors: dict[tuple[str, bool], dict[str, str]] = field(default_factory=dict)
    shifts: dict[str, BiasShift] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def sort_key(self, key: str) -> None:
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        factor, embedding = _FACTOR.fullmatch(name), _EMBEDDING_FACTOR.fullmatch(name)
        if not key.startswith(_PREFIX):
            self._add("unexpected", key, f"keys of a PEFT adapter start with {_PREFIX}")
        elif len(key) > _MAX_CHARACTERS:
            self._add("unexpected", key[:_MAX_CHARACTERS], f"a name of {len(key)} characters")
        elif embedding:
            self._put(self.factors.setdefault((embedding[1], True), {}), embedding[2], key)
        elif factor and factor[3] == "weight":
            self._put(self.factors.setdefault((factor[1], False), {}), factor[2], key)
        elif factor and factor[2] == "B":
            self._put(self.shifts, f"{factor[1]}.bias", BiasShift(key, self.config.scaling_of(factor[1])))
        elif _UNKNOWN_KIND.search(f".{name}"):
            self._add("unexpected", key, "a kind of adapter tensor that cannot be merged")
        else:
            self._put(self.replaced, _SAVED_MODULE.sub("", name), key)
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

    def check_saved_modules(self) -> None:
        for module in self.config.modules_to_save:
            if not any(f".{module}." in f".{target}" for target in self.replaced):
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
