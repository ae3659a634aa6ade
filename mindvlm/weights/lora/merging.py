"""Merges a LoRA adapter into its base model, tensor by tensor while they are read (Hu et al. 2021, arXiv 2106.09685).

Only requested elements are computed: memory is the two factors of one tensor and one block of its rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import CastSource, SourceView, TensorInfo, TensorSource
from mindvlm.checkpoint.dtypes import cast_storage, is_float, overflows, storage_dtype
from mindvlm.core.errors import UserError
from mindvlm.weights.lora.adapter import Adapter, LowRank, open_adapter
from mindvlm.weights.recognise import ConvertibleModel, native_model
from mindvlm.weights.rules.findings import ConversionError, Finding, fold_name
from mindvlm.weights.rules.planning import make_plan

_BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class _Factors:
    """The change of one weight as left @ right, (rows, rank) and (rank, columns), without the scaling."""

    target: str
    left: np.ndarray
    right: np.ndarray


class MergedSource(SourceView):
    """The tensors of a base model with an adapter merged in; names, dtypes and shapes are those of the base.

    A weight W becomes W + scaling * B @ A, computed in float32 (float64 where W, A or B is) and rounded once to the
    dtype of W. Blocks of rows have fixed borders, so an element does not depend on the range it was read in. Tensors
    that the adapter replaces are cast to the base's dtype. `close()` closes the base and not the adapter.

    Attributes:
        merged: the changed tensors, each with the names of the adapter's tensors that it was changed with.

    Raises:
        ConversionError: the adapter changes tensors that the base has not, has another shape, or leaves out layers
            that its config targets; every key is named.
        UserError: while reading, if a finite sum does not fit into the dtype of the base.
    """

    def __init__(self, base: TensorSource, adapter: Adapter):
        findings = [*_misfits(base.infos, adapter), *_left_out(base.infos, adapter)]
        if findings:
            raise ConversionError(f"{adapter.path} does not fit {base.path}", findings)
        super().__init__(base)
        self.merged: Mapping[str, tuple[str, ...]] = dict(adapter.targets)
        self._adapter = adapter
        self._factors: _Factors | None = None
        self._block: tuple[str, int, np.ndarray] | None = None

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        pair = self._adapter.low_rank.get(name)
        if pair is None:
            return self._read_plain(name, start, stop)
        info = self.infos[name]
        result = np.empty(stop - start, dtype=storage_dtype(info.dtype))
        size = _block_elements(info)
        for first in range(start - start % size, stop, size):
            block = self._merged_block(info, pair, first, min(first + size, info.num_elements))
            begin, end = max(start, first), min(stop, first + size)
            result[begin - start : end - start] = block[begin - first : end - first]
        return result

    def _read_plain(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements without the low-rank change: of the base or of the tensor that replaces it, with a bias's shift."""
        info = self.infos[name]
        key = self._adapter.replaced.get(name)
        source, source_name = (self._source, name) if key is None else (self._adapter.checkpoint, key)
        data, dtype = source.read_range(source_name, start, stop), source.infos[source_name].dtype
        shift = self._adapter.shifts.get(name)
        if shift is None:
            return data if dtype == info.dtype else self._rounded(info, data, dtype)
        stored = self._adapter.checkpoint
        shift_dtype = stored.infos[shift.key].dtype
        compute = _compute_dtype(dtype, shift_dtype)
        added = cast_storage(stored.read_range(shift.key, start, stop), shift_dtype, compute)
        values = cast_storage(data, dtype, compute) + added * shift.scaling
        return self._rounded(info, values, compute)

    def _merged_block(self, info: TensorInfo, pair: LowRank, first: int, last: int) -> np.ndarray:
        if self._block is None or self._block[:2] != (info.name, first):
            factors = self._factors_of(info, pair)
            base = self._read_plain(info.name, first, last)
            columns = info.num_elements // info.shape[0]
            rows = slice(first // columns, last // columns)
            compute = factors.left.dtype.name
            with np.errstate(over="ignore", invalid="ignore"):
                values = (factors.left[rows] @ factors.right).reshape(-1)
                values *= pair.scaling
                values += cast_storage(base, info.dtype, compute)
            self._block = (info.name, first, self._rounded(info, values, compute))
        return self._block[2]

    def _factors_of(self, info: TensorInfo, pair: LowRank) -> _Factors:
        if self._factors is None or self._factors.target != info.name:
            self._factors = None
            a, b = (self._adapter.checkpoint.read(key) for key in (pair.key_a, pair.key_b))
            compute = _compute_dtype(info.dtype, a.dtype, b.dtype)
            a, b = (tensor.cast(compute).data.reshape(tensor.shape[0], -1) for tensor in (a, b))
            left, right = (a.T, b.T) if _is_transposed(pair, info, self._adapter) else (b, a)
            self._factors = _Factors(info.name, left, right)
        return self._factors

    def _rounded(self, info: TensorInfo, values: np.ndarray, dtype: str) -> np.ndarray:
        result = cast_storage(values, dtype, info.dtype)
        if overflows(values, dtype, result, info.dtype):
            raise UserError(
                f"{self.path}: tensor {info.name} with {self._adapter.path} merged in goes beyond the range of "
                f"{info.dtype}; convert the base to bfloat16 or float32 first, then merge"
            )
        return result


def merge_adapter(
    model: ConvertibleModel, source: TensorSource, adapter: Adapter
) -> tuple[TensorSource, Mapping[str, Sequence[str]]]:
    """Merges an adapter whose names are native, or those of one of the model's Hugging Face namings.

    Args:
        model: the base.
        source: the tensors of the base, or of whole parts of it, under native names.
        adapter: the adapter.

    Returns:
        The merged tensors under native names, and for each changed one the adapter's tensors that change it.

    Raises:
        ConversionError: the adapter does not fit the shapes of the model.
        UserError: its names are of another model.
    """
    if adapter.fits(source.infos):
        merged = MergedSource(source, adapter)
        return merged, merged.merged
    for table in model.hf_tables:
        if any(not table.part_of(name) for name in source.infos):
            continue
        # a tied tensor has one name here: changed under only one of two names it would differ from itself
        single = table.without(table.aliases)
        foreign = make_plan(single.reverse(), source.infos, partial=True, origin=str(source.path)).view(source)
        if adapter.fits(foreign.infos):
            merged = MergedSource(foreign, adapter)
            plan = make_plan(single, merged.infos, partial=True, origin=str(source.path))
            modified: dict[str, list[str]] = {}
            for name, keys in merged.merged.items():
                for target in plan.targets_of(name):
                    modified.setdefault(target, []).extend(keys)
            return plan.view(merged), modified
    known = {name for table in model.tables for native in source.infos for name in table.sources_of(native)}
    stranger = next((name for name in adapter.targets if name not in known), next(iter(adapter.targets), None))
    raise UserError(
        f"{adapter.path}: changes tensors that {model.name} has under none of its names, the first is {stranger}; "
        "give an adapter of this model"
    )


@contextlib.contextmanager
def adapted_view(
    source: TensorSource, folder: str | Path, models: Sequence[ConvertibleModel]
) -> Iterator[TensorSource]:
    """Yields the tensors of a whole model under native names with an adapter merged in, in float32.

    Args:
        source: the tensors of the model.
        folder: of the adapter.
        models: the models that `source` may belong to.

    Raises:
        ConversionError: the adapter does not fit the shapes of the model.
        UserError: it cannot be read, or its names are of another model.
    """
    with open_adapter(folder) as adapter:
        merged, _ = merge_adapter(native_model(source.infos, models), CastSource(source, "float32"), adapter)
        yield merged


def _compute_dtype(*dtypes: str) -> str:
    return "float64" if "float64" in dtypes else "float32"


def _block_elements(info: TensorInfo) -> int:
    """Elements of the blocks that a weight is merged in: whole rows, at least one."""
    columns = info.num_elements // info.shape[0] if info.num_elements else 1
    return columns * max(1, _BLOCK_BYTES // 4 // columns)


def _is_transposed(pair: LowRank, info: TensorInfo, adapter: Adapter) -> bool:
    return pair.is_embedding or adapter.config.fan_in_fan_out and len(info.shape) == 2


def _misfits(infos: Mapping[str, TensorInfo], adapter: Adapter) -> list[Finding]:
    """What of the adapter finds no place among the tensors of the base."""
    stored = adapter.checkpoint.infos
    findings = []
    for target, keys in adapter.targets.items():
        info = infos.get(target)
        if info is None:
            findings += [Finding("unexpected", key, f"the base has no tensor {fold_name(target)}") for key in keys]
            continue
        if not is_float(info.dtype):
            findings.append(Finding("dtype", keys[0], f"changes {fold_name(target)}, which is {info.dtype}"))
        shapes = {key: stored[key].shape for key in keys}
        pair = adapter.low_rank.get(target)
        if pair is not None:
            wanted = _shape_of_change(pair, info, adapter)
            if wanted != info.shape:
                findings.append(_misshapen(pair.key_a, wanted, info, adapter))
            shapes = {key: shape for key, shape in shapes.items() if key not in (pair.key_a, pair.key_b)}
        findings += [_misshapen(key, shape, info, adapter) for key, shape in shapes.items() if shape != info.shape]
    return findings


def _shape_of_change(pair: LowRank, info: TensorInfo, adapter: Adapter) -> tuple[int, ...] | None:
    """The shape of the weight that the factors change; None if they are no factors of a weight with as many axes.

    For a convolution A is (rank, in, kernel...) and B is (out, rank, 1...), which makes B @ A a product of matrices.
    """
    a, b = (adapter.checkpoint.infos[key].shape for key in (pair.key_a, pair.key_b))
    if len(a) != len(info.shape) or len(b) != len(a) or any(axis != 1 for axis in b[2:]):
        return None
    return (a[1], b[0]) if _is_transposed(pair, info, adapter) else (b[0], *a[1:])


def _misshapen(key: str, shape: tuple[int, ...] | None, info: TensorInfo, adapter: Adapter) -> Finding:
    changes = "changes a weight of another kind" if shape is None else f"changes a tensor of shape {list(shape)}"
    hint = ""
    if shape is not None and len(shape) == 2 and shape[::-1] == info.shape:
        hint = f"; is fan_in_fan_out in {adapter.config.path.name} right"
    return Finding("shape", key, f"{changes}, the base has {list(info.shape)}{hint}")


def _left_out(infos: Mapping[str, TensorInfo], adapter: Adapter) -> list[Finding]:
    """Modules that the config targets by name, and that are adapted in other layers but not in this one."""
    names = adapter.config.target_modules or ()
    adapted = {fold_name(pair.module) for pair in adapter.low_rank.values()}
    findings = []
    for target in infos:
        module, _, ending = target.rpartition(".")
        if ending != "weight" or target in adapter.low_rank or fold_name(module) not in adapted:
            continue
        if any(f".{module}".endswith(f".{name}") for name in names):
            findings.append(Finding("missing", target, "the config targets it, but the adapter has nothing for it"))
    return findings
