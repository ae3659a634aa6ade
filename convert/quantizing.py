"""Quantized weights: the formats of a model's tensors, the tensors rounded to them, and the proof of the result."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mindvlm.checkpoint import SourceView, TensorInfo, TensorSource, open_checkpoint
from mindvlm.checkpoint.blocks import blocks_of
from mindvlm.checkpoint.dtypes import cast_storage, has_nonfinite, overflows
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import BLOCK_FORMATS, blocks_for, find_block, parse_weights, part_of
from mindvlm.native.library import Library
from mindvlm.weights.opened import Opened
from mindvlm.weights.rules.findings import fold_name, format_table

QUANTIZED_FROM_KEY = "mindvlm_quantized_from"
_GROUP_VALUES = 1 << 22
"""Values of the rows that are rounded at a time."""
_LARGEST_ERROR = {"q8_0": 0.03, "q8_c": 0.004, "q4_0": 0.35, "q4_K": 0.35}
"""Norm of a block's error over that of the block. Half a step for 31 values beside a full one gives 0.022 and 0.33.

In q8_c the largest error of a row over its largest value, because a norm would hide a wrong value in a long row."""
_LARGEST_OFFSET = {"q8_0": 127 * 2**-25, "q8_c": 127 * 2**-126, "q4_0": 8 * 2**-25, "q4_K": 63 * 16 * 2**-25}
"""Error of the largest value of a block from the rounding of a subnormal scale."""


@dataclass(frozen=True)
class QuantizationPlan:
    """The stored dtype of each tensor.

    Attributes:
        weights: the value of `--quant`.
        dtypes: name -> dtype, for the tensors whose dtype changes.
        kept: matrices that keep 16 bits because their width is no multiple of the block.
    """

    weights: str
    dtypes: Mapping[str, str]
    kept: tuple[str, ...]


def plan_quantization(weights: str, source: TensorSource, *, reads: bool = True) -> QuantizationPlan:
    """Chooses the dtype of each tensor of a model.

    Matrices have the format of their part, see `mindvlm.core.weight_formats`. All other tensors keep their dtype.

    Args:
        weights: the value of `--quant`.
        source: the tensors under native names.
        reads: whether float32 values are read to choose between float16 and bfloat16; if not, they become float16.

    Raises:
        UserError: no part or no tensor is quantized.
    """
    formats = parse_weights(weights, "--quant")
    if not set(formats.values()) & set(BLOCK_FORMATS):
        raise UserError(f"--quant {weights} quantizes nothing; give {' or '.join(BLOCK_FORMATS)}, or PART=FORMAT")
    dtypes: dict[str, str] = {}
    kept = []
    for name, info in source.infos.items():
        wanted = formats.get(part_of(name, info.shape), "auto")
        if wanted in BLOCK_FORMATS:
            if block := blocks_for(wanted, info.shape[1]):
                dtypes[name] = block
                continue
            kept.append(name)
        if wanted == "float32" and info.dtype != "float32":
            dtypes[name] = "float32"
        elif wanted not in ("auto", "float32") and info.dtype not in ("float16", "bfloat16"):
            dtypes[name] = _narrow_dtype(source, name) if reads else "float16"
    if not any(map(find_block, dtypes.values())):
        raise UserError(f"--quant {weights}: {source.path} has no matrix to quantize; leave --quant out")
    return QuantizationPlan(weights, dtypes, tuple(kept))


def _narrow_dtype(source: TensorSource, name: str) -> str:
    """Returns float16, or bfloat16 if a value exceeds its range."""
    dtype = source.infos[name].dtype
    fits = (not overflows(part, dtype, cast_storage(part, dtype, "float16"), "float16") for part in source.chunks(name))
    return "float16" if all(fits) else "bfloat16"


class QuantizedSource(SourceView):
    """Another source with tensors rounded to the dtypes of a plan. Memory: a group of rows.

    Args:
        source: the tensors.
        plan: their dtypes.
        library: the kernels that round to blocks.
        importance: for each matrix the weights of the squared errors of its columns, see `Library.quantize`.
    """

    def __init__(
        self,
        source: TensorSource,
        plan: QuantizationPlan,
        library: Library,
        importance: Mapping[str, np.ndarray] | None = None,
    ):
        infos = {name: replace(info, dtype=plan.dtypes.get(name, info.dtype)) for name, info in source.infos.items()}
        super().__init__(source, infos)
        self._library = library
        self._importance = importance or {}
        self._group: tuple[tuple[str, int], np.ndarray] | None = None

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        info, stored = self.infos[name], self._source.infos[name].dtype
        if not find_block(info.dtype):
            return cast_storage(super().read_range(name, start, stop), stored, info.dtype)
        step = max(1, _GROUP_VALUES // info.shape[1]) * info.shape[1]
        size = find_block(info.dtype).size
        parts = []
        for first in range(start // step * step, stop, step):
            group = self._rounded(info, first, min(first + step, info.num_elements))
            parts.append(group[max(start - first, 0) // size : (stop - first) // size])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [blocks_of(np.empty((0, 1)), info.dtype)])

    def _rounded(self, info: TensorInfo, first: int, last: int) -> np.ndarray:
        """Returns the blocks of elements [first, last), which are whole rows; keeps the last result."""
        if self._group is None or self._group[0] != (info.name, first):
            stored = self._source.infos[info.name].dtype
            rows = cast_storage(super().read_range(info.name, first, last), stored, "float32")
            if not np.isfinite(rows).all():
                raise UserError(f"{self.path}: tensor {info.name} holds NaN or infinity; it cannot be quantized")
            rows = rows.reshape(-1, info.shape[1])
            bits = self._library.quantize(rows, info.dtype, self._importance.get(info.name))
            blocks = blocks_of(bits, info.dtype).reshape(-1)
            if has_nonfinite(blocks, info.dtype):
                raise UserError(f"{self.path}: tensor {info.name} is beyond the range of {info.dtype}; keep its part")
            self._group = (info.name, first), blocks
        return self._group[1]


def quantized_from(opened: Opened, weights: str, *, is_calibrated: bool) -> str:
    """Returns a description of what was quantized, as JSON: model, formats, stored dtypes, digest of config.json."""
    dtypes = sorted({info.dtype for info in opened.source.infos.values()})
    record = {"model": opened.model.name, "weights": weights, "calibrated": is_calibrated, "dtypes": dtypes}
    if opened.config is not None:
        text = json.dumps(opened.config, sort_keys=True, default=str)
        record["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(record)


@dataclass(frozen=True)
class VerifiedBlocks:
    """The proof of a quantized file.

    Attributes:
        errors: for each matrix in blocks the norm of its error over the norm of the matrix.
        dtypes: their formats.
        num_equal: the other tensors, equal bit for bit to those of the source in their dtype.
    """

    errors: Mapping[str, float]
    dtypes: Mapping[str, str]
    num_equal: int

    def describe(self) -> str:
        """Returns a table of the errors, matrices folded whose names differ in numbers."""
        groups: dict[tuple[str, str], list[float]] = {}
        for name, error in self.errors.items():
            groups.setdefault((self.dtypes[name], fold_name(name)), []).append(error)
        rows = [("format", "matrices", "error", "largest", "name")]
        rows += [
            (dtype, str(len(found)), f"{min(found):.4f}", f"{max(found):.4f}" if len(found) > 1 else "", name)
            for (dtype, name), found in groups.items()
        ]
        table = format_table(rows, numbers=(1, 2, 3))
        return "\n".join(
            [
                f"{len(self.errors)} matrices are within the bounds of their formats, {self.num_equal} other tensors "
                "are those of the source, bit for bit in their dtype",
                "",
                *table,
            ]
        )


def verify_quantized(
    source: TensorSource,
    planned: TensorSource,
    written: str | Path,
    *,
    shown_as: str | Path,
    progress: Callable[[int], object],
) -> VerifiedBlocks:
    """Compares a quantized file with its source, without the kernels that wrote it.

    Args:
        source: the tensors that were quantized.
        planned: the same in the dtypes of the file.
        written: the file or folder.
        shown_as: its name in messages.
        progress: called with the number of bytes compared.

    Raises:
        UserError: a tensor is missing or superfluous, has another dtype or shape, a block has a larger error than its
            format allows, or another tensor differs.
    """
    errors: dict[str, float] = {}
    with open_checkpoint(written) as checkpoint:
        is_weighted = '"calibrated": true' in checkpoint.metadata.get(QUANTIZED_FROM_KEY, "")
        for name in {**planned.infos, **checkpoint.infos}:
            found, wanted = checkpoint.infos.get(name), planned.infos.get(name)
            if found != wanted:
                raise UserError(
                    f"{shown_as}: verification failed, tensor {name} is {_shown(found)}, expected {_shown(wanted)}; "
                    "quantize again"
                )
            if find_block(wanted.dtype):
                errors[name] = _error(source, checkpoint, name, shown_as, progress, is_weighted=is_weighted)
                continue
            for chunk, other in zip(checkpoint.chunks(name), planned.chunks(name), strict=True):
                if not np.array_equal(chunk.view(np.uint8), other.view(np.uint8)):
                    raise UserError(f"{shown_as}: verification failed, tensor {name} has other values; quantize again")
                progress(chunk.nbytes)
    dtypes = {name: planned.infos[name].dtype for name in errors}
    return VerifiedBlocks(errors, dtypes, len(planned.infos) - len(errors))


def _error(
    source: TensorSource,
    checkpoint: TensorSource,
    name: str,
    shown_as: str | Path,
    progress: Callable[[int], object],
    *,
    is_weighted: bool,
) -> float:
    """Returns the relative error of a matrix.

    Raises:
        UserError: the error of a block is too large; if columns were weighted, that of the matrix.
    """
    info, stored = checkpoint.infos[name], source.infos[name].dtype
    block = find_block(info.dtype)
    size, largest, is_by_value = block.size, _LARGEST_ERROR[block.format], block.format == "q8_c"
    offset = _LARGEST_OFFSET[block.format] * (1 if is_by_value else math.sqrt(size))
    step = size * max(1, (1 << 20) // size)
    error = square = 0.0
    for first in range(0, info.num_elements, step):
        last = min(first + step, info.num_elements)
        data = checkpoint.read_range(name, first, last)
        values = cast_storage(data, info.dtype, "float32").reshape(-1, size)
        wanted = cast_storage(source.read_range(name, first, last), stored, "float32").reshape(-1, size)
        errors, squares = (np.einsum("ij,ij->i", x, x, dtype=np.float64) for x in (values - wanted, wanted))
        found, allowed = np.sqrt(errors), np.sqrt(squares)
        if is_by_value:
            found, allowed = np.abs(values - wanted).max(1), np.abs(wanted).max(1)
        wrong = np.flatnonzero(~(found <= largest * allowed + offset))
        if len(wrong) and (is_by_value or not is_weighted):
            row, column = divmod(first + int(wrong[0]) * size, info.shape[1])
            raise _too_large(shown_as, info, f" in row {row} from column {column} on")
        error, square = error + float(errors.sum()), square + float(squares.sum())
        progress(data.nbytes)
    relative = math.sqrt(error / square) if square else 0.0
    if not (is_by_value or relative <= largest):
        raise _too_large(shown_as, info, "")
    return relative


def _too_large(shown_as: str | Path, info: TensorInfo, place: str) -> UserError:
    return UserError(
        f"{shown_as}: verification failed, {info.name} in {info.dtype} differs from the source by more than "
        f"{100 * _LARGEST_ERROR[find_block(info.dtype).format]:g}%{place}; quantize again"
    )


def _shown(info: TensorInfo | None) -> str:
    return f"{info.dtype} {list(info.shape)}" if info else "not in it"
