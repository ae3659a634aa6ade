"""Merges a LoRA adapter into its base model, tensor by tensor while they are read (Hu et al. 2021, arXiv 2106.09685).

Only requested elements are computed: memory is the two factors of one tensor and one block of its rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import SourceView, TensorInfo, TensorSource
from mindvlm.checkpoint.dtypes import cast_storage, is_float, overflows, storage_dtype
from mindvlm.core.errors import UserError
from mindvlm.weights.lora.adapter import Adapter
from mindvlm.weights.lora.keys import LowRank
from mindvlm.weights.rules.findings import ConversionError, Finding, fold_name

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 4 * 1024 * 1024
_NUM_COMPARED = 64 * 1024


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

    Args:
        base: the tensors of the base model.
        adapter: the adapter.
        beside: the same base with what was trained completely beside the adapter; see `holds_adapter`.

    Attributes:
        merged: the changed tensors, each with the names of the adapter's tensors that it was changed with.

    Raises:
        ConversionError: the adapter changes tensors that the base has not, has another shape, or leaves out layers
            that its config targets; every key is named.
        UserError: while reading, if the base holds the adapter already, or a finite sum does not fit into its dtype.
    """

    def __init__(self, base: TensorSource, adapter: Adapter, beside: Sequence[MergedSource] = ()):
        findings = [*_misfits(base.infos, adapter), *_left_out(base.infos, adapter)]
        if findings:
            no_base = adapter.low_rank and not adapter.low_rank.keys() & base.infos.keys()
            remedy = "give the weights on which it was trained" if no_base else ""
            raise ConversionError(f"{adapter.path} does not fit {base.path}", findings, remedy)
        super().__init__(base)
        self.merged: Mapping[str, tuple[str, ...]] = dict(adapter.targets)
        self._adapter = adapter
        self._beside = tuple(beside)
        self._factors: _Factors | None = None
        self._block: tuple[str, int, np.ndarray] | None = None
        self._is_unchecked = True

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        pair = self._adapter.low_rank.get(name)
        if pair is None:
            return self._read_plain(name, start, stop)
        if self._is_unchecked:
            self._is_unchecked = False
            holds = self.holds_adapter()
            if holds:
                raise merged_already(self.path, self._adapter)
            if holds is None:
                logger.info(
                    f"note: {self.path} may hold the adapter {self._adapter.path} already; its weights have the values "
                    "that the adapter replaces, and the other changes are too small to tell"
                )
        info = self.infos[name]
        result = np.empty(stop - start, dtype=storage_dtype(info.dtype))
        size = _block_elements(info)
        for first in range(start - start % size, stop, size):
            block = self._merged_block(info, pair, first, min(first + size, info.num_elements))
            begin, end = max(start, first), min(stop, first + size)
            result[begin - start : end - start] = block[begin - first : end - first]
        return result

    def _read_plain(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns elements before the low-rank change: of the base or its replacement, with the shift of a bias."""
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

    def holds_adapter(self) -> bool | None:
        """Returns whether the base contains the adapter's changes already; None if it may.

        The share of the change D = scaling * B @ A in a weight W is <W, D> / <D, D>. It is about 0 for unrelated
        weights, with the standard deviation |W| / (|D| sqrt(size)), and 1 more where D was added. The base holds the
        adapter if the share is 1 within 4 deviations in each of the compared weights and in all of them together, where
        the deviation is below 0.1. Few large weights or many small ones suffice. It may hold a smaller change if it
        has, bit by bit, the weights that the adapter replaces. An adapter may also hold weights that it did not change.
        """
        added = total = variance = 0.0
        for count, pair in enumerate(self._adapter.low_rank.values()):
            inner, change, weight = self._products(pair)
            if change > 0 and np.isfinite([inner, change, weight]).all():
                if abs(inner - change) > 4 * np.sqrt(change * weight):
                    return False
                added, total, variance = added + inner, total + change, variance + change * weight
            if count >= 3 and np.sqrt(variance) < 0.03 * total:
                break
        deviation = np.sqrt(variance)
        if deviation < 0.1 * total:
            return abs(added - total) < 4 * deviation
        is_open = total > 0 and (deviation > 0.5 * total or added > 0.5 * total)
        return None if is_open and self._has_replaced() else False

    def _has_replaced(self) -> bool:
        """Returns whether the base has the values of all weights that the adapter replaces, and there are any."""
        weights = [
            (one, name, key)
            for one in (self, *self._beside)
            for name, key in one._adapter.replaced.items()
            if len(one.infos[name].shape) > 1
        ]
        return bool(weights) and all(one._is_equal(name, key) for one, name, key in weights)

    def _is_equal(self, name: str, key: str) -> bool:
        """Returns whether the first elements of a tensor are those of the adapter, in any dtype it was merged in."""
        stored, size = self._adapter.checkpoint, min(self.infos[name].num_elements, _NUM_COMPARED)
        dtype = stored.infos[key].dtype
        base = cast_storage(self._source.read_range(name, 0, size), self.infos[name].dtype, "float64")
        data = stored.read_range(key, 0, size)
        with np.errstate(over="ignore"):
            return any(
                np.array_equal(cast_storage(cast_storage(data, dtype, cast), cast, "float64"), base)
                for cast in dict.fromkeys((dtype, "float32", "float16", "bfloat16"))
            )

    def _products(self, pair: LowRank) -> tuple[float, float, float]:
        """Returns <W, D>, <D, D> and <W, W> / size of a weight and its change; see `holds_adapter`."""
        info = self.infos[pair.target]
        factors = self._factors_of(info, pair)
        left, right = factors.left.astype(np.float64) * pair.scaling, factors.right.astype(np.float64)
        change = float(np.sum((left.T @ left) * (right @ right.T)))
        columns, size = right.shape[1], _block_elements(info)
        inner = weight = 0.0
        for first in range(0, info.num_elements, size):
            data = self._read_plain(info.name, first, min(first + size, info.num_elements))
            rows = cast_storage(data, info.dtype, "float64").reshape(-1, columns)
            begin = first // columns
            with np.errstate(over="ignore", invalid="ignore"):
                inner += float(np.sum((rows @ right.T) * left[begin : begin + len(rows)]))
                weight += float(np.sum(rows * rows))
        return inner, change, weight / max(1, info.num_elements)

    def _rounded(self, info: TensorInfo, values: np.ndarray, dtype: str) -> np.ndarray:
        result = cast_storage(values, dtype, info.dtype)
        if overflows(values, dtype, result, info.dtype):
            raise UserError(
                f"{self.path}: tensor {info.name} with {self._adapter.path} merged in goes beyond the range of "
                f"{info.dtype}; convert the base to bfloat16 or float32 first, then merge"
            )
        return result


def merged_already(path: Path, adapter: Adapter) -> UserError:
    """Returns the error for a base, read from `path`, that holds the adapter."""
    return UserError(
        f"{path}: holds the adapter {adapter.path} already, and merging would apply it twice; use these weights "
        "without the adapter, or give the base that it was trained on"
    )


def _compute_dtype(*dtypes: str) -> str:
    return "float64" if "float64" in dtypes else "float32"


def _block_elements(info: TensorInfo) -> int:
    """Returns the number of elements of a block of a weight: whole rows, at least one."""
    columns = info.num_elements // info.shape[0] if info.num_elements else 1
    return columns * max(1, _BLOCK_BYTES // 4 // columns)


def _is_transposed(pair: LowRank, info: TensorInfo, adapter: Adapter) -> bool:
    return pair.is_embedding or adapter.config.fan_in_fan_out and len(info.shape) == 2


def _misfits(infos: Mapping[str, TensorInfo], adapter: Adapter) -> list[Finding]:
    """Returns findings about tensors of the adapter that do not fit the base."""
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
    """Returns the shape of the weight that the factors change; None if they have another number of axes.

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
    """Returns findings about modules that the config targets and that are adapted only in other layers."""
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
