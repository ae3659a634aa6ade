"""A checkpoint at a glance: one line for all tensors whose names differ in numbers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mindvlm.checkpoint import Checkpoint, TensorInfo
from mindvlm.weights.rules.findings import Row, fold_name

_FORMATS = {
    ".safetensors": "safetensors",
    ".ckpt": "MindSpore checkpoint",
    ".bin": "PyTorch",
    ".pt": "PyTorch",
    ".pth": "PyTorch",
}
_MAX_FILES = 8
_MAX_ENTRIES = 16
_MAX_CHARACTERS = 96
_HEADING = ("dtype", "shape", "tensors", "parameters", "bytes", "name")
_NUMBERS = (2, 3, 4)


def describe_format(checkpoint: Checkpoint) -> str:
    """Return the format of the files that hold the tensors, in words."""
    formats = dict.fromkeys(_FORMATS.get(file.suffix, file.suffix) for file in checkpoint.files)
    return " + ".join(formats) + (" in shards" if checkpoint.path.name.endswith(".index.json") else "")


def inspect_table(source: Checkpoint) -> str:
    """Return a readable account of any checkpoint: format, files, metadata, tensors and totals per dtype.

    Tensors of equal dtype and shape whose names differ in numbers only share a line, which gives the numbers and the
    parameters and bytes of all of them together. Names stand last, so a long one does not break the columns.
    """
    infos = source.infos
    rows = [_HEADING, *(_row(group) for group in _fold(infos))]
    totals = _totals(infos.values())
    table = _aligned([*rows, *totals])
    split = len(table) - len(totals)
    shared = _shared_bytes(source)
    return "\n".join(
        [
            f"{source.path}: {describe_format(source)}, {_count(len(infos), 'tensor')}",
            *_list_files(source),
            *_list_metadata(source.metadata),
            "",
            *table[:split],
            "-" * max(map(len, table)),
            *table[split:],
            *shared,
        ]
    )


def _fold(infos: Mapping[str, TensorInfo]) -> list[list[TensorInfo]]:
    """Group tensors of one pattern, dtype and shape, in order of appearance.

    Where numbers at two places vary (an expert of a layer), the layers stay apart: a label gives one range.
    """
    groups: dict[tuple, list[TensorInfo]] = {}
    for info in infos.values():
        groups.setdefault((fold_name(info.name), info.dtype, info.shape), []).append(info)
    folded = []
    for group in groups.values():
        apart: dict[tuple[str, ...], list[TensorInfo]] = {}
        varying = _varying_places([info.name for info in group])
        for info in group:
            parts = info.name.split(".")
            apart.setdefault(tuple(parts[place] for place in varying[:-1]), []).append(info)
        folded += apart.values()
    return folded


def _varying_places(names: Sequence[str]) -> list[int]:
    columns = zip(*(name.split(".") for name in names), strict=True)
    return [place for place, column in enumerate(columns) if len(set(column)) > 1]


def _row(group: Sequence[TensorInfo]) -> tuple[str, ...]:
    names = tuple(info.name for info in group)
    label = Row("", _pattern(names), names, "").label
    return (group[0].dtype, str(list(group[0].shape)), *_sums(group), label)


def _pattern(names: Sequence[str]) -> str:
    """The name with `{}` for the number that varies, and for no other."""
    parts = names[0].split(".")
    for place in _varying_places(names):
        parts[place] = "{}"
    return ".".join(parts)


def _totals(infos: Iterable[TensorInfo]) -> list[tuple[str, ...]]:
    infos = list(infos)
    dtypes = dict.fromkeys(info.dtype for info in infos)
    rows = [(dtype, "", *_sums([info for info in infos if info.dtype == dtype]), "") for dtype in dtypes]
    return [*(rows if len(rows) > 1 else []), ("total", "", *_sums(infos), "")]


def _sums(infos: Sequence[TensorInfo]) -> tuple[str, str, str]:
    parameters = sum(info.num_elements for info in infos)
    return f"{len(infos):,}", f"{parameters:,}", f"{sum(info.num_bytes for info in infos):,}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns, numbers to the right, and rule off the heading, which comes first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADING) - 1)] + [0]
    lines = [
        "  ".join(
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _list_files(source: Checkpoint) -> list[str]:
    files = source.files
    if files == (source.path,):
        return [f"file: {files[0].stat().st_size:,} bytes"]
    shown = [f"  {file.name}: {file.stat().st_size:,} bytes" for file in files[:_MAX_FILES]]
    more = [f"  ... and {len(files) - _MAX_FILES} more"] if len(files) > _MAX_FILES else []
    return [f"files: {sum(file.stat().st_size for file in files):,} bytes in {len(files)}", *shown, *more]


def _list_metadata(metadata: Mapping[str, str]) -> list[str]:
    """The text entries, escaped: they come from the file and must not reach the terminal as control characters."""
    entries = [f"  {_shown(key)}: {_shown(text)}" for key, text in list(metadata.items())[:_MAX_ENTRIES]]
    more = [f"  ... and {len(metadata) - _MAX_ENTRIES} more"] if len(metadata) > _MAX_ENTRIES else []
    return ["metadata:", *entries, *more] if entries else []


def _shown(text: str) -> str:
    shown = text[:_MAX_CHARACTERS]
    if not shown.isprintable():
        shown = shown.encode("unicode_escape").decode("ascii")
    return shown + ("..." if len(text) > _MAX_CHARACTERS else "")


def _shared_bytes(source: Checkpoint) -> list[str]:
    """Say which tensors are stored once under several names; totals count every name."""
    places: dict[tuple, list[str]] = {}
    for name, tensor in source.tensors.items():
        if tensor.info.num_elements:
            places.setdefault((tensor.segments, tensor.strides, tensor.first, tensor.info.shape), []).append(name)
    groups = [names for names in places.values() if len(names) > 1]
    extra = Counter(fold_name(" = ".join(names)) for names in groups)
    return [f"stored once: {pattern}" + (f" ({count} times)" if count > 1 else "") for pattern, count in extra.items()]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
