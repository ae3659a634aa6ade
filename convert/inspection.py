"""The table of `--inspect`: one line for all tensors whose names differ only in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mindvlm.checkpoint import Checkpoint, TensorInfo
from mindvlm.weights.rules.findings import Row, fold_name, format_table

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
    """Returns the format of the files that hold the tensors, in words."""
    formats = dict.fromkeys(_FORMATS.get(file.suffix, file.suffix) for file in checkpoint.files)
    return " + ".join(formats) + (" in shards" if checkpoint.path.name.endswith(".index.json") else "")


def inspect_table(source: Checkpoint) -> str:
    """Returns a readable description of any checkpoint: format, files, metadata, tensors and totals per dtype.

    Tensors of equal dtype and shape whose names differ only in numbers share a line with the numbers and the total
    parameters and bytes. Names come last, so a long one does not break the columns.
    """
    infos = source.infos
    rows = [_HEADING, *(_row(group) for group in _fold(infos))]
    totals = _totals(infos.values())
    table = format_table([*rows, *totals], numbers=_NUMBERS)
    split = len(table) - len(totals)
    shared = _shared_bytes(source)
    return "\n".join(
        [
            f"{source.path}: {describe_format(source)}, {len(infos):,} tensor{'' if len(infos) == 1 else 's'}",
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
    """Groups tensors of one pattern, dtype and shape, in order of appearance.

    Where numbers vary at two places (an expert of a layer), the layers stay apart, since a label has one range.
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
    """Returns the name with `{}` for the number that varies."""
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


def _list_files(source: Checkpoint) -> list[str]:
    files = source.files
    if files == (source.path,):
        return [f"file: {files[0].stat().st_size:,} bytes"]
    shown = [f"  {file.name}: {file.stat().st_size:,} bytes" for file in files[:_MAX_FILES]]
    more = [f"  ... and {len(files) - _MAX_FILES} more"] if len(files) > _MAX_FILES else []
    return [f"files: {sum(file.stat().st_size for file in files):,} bytes in {len(files)}", *shown, *more]


def _list_metadata(metadata: Mapping[str, str]) -> list[str]:
    """Lists the text entries, escaped: control characters from a file must not reach the terminal."""
    entries = [f"  {_shown(key)}: {_shown(text)}" for key, text in list(metadata.items())[:_MAX_ENTRIES]]
    more = [f"  ... and {len(metadata) - _MAX_ENTRIES} more"] if len(metadata) > _MAX_ENTRIES else []
    return ["metadata:", *entries, *more] if entries else []


def _shown(text: str) -> str:
    shown = text[:_MAX_CHARACTERS]
    if not shown.isprintable():
        shown = shown.encode("unicode_escape").decode("ascii")
    return shown + ("..." if len(text) > _MAX_CHARACTERS else "")


def _shared_bytes(source: Checkpoint) -> list[str]:
    """Lists tensors that are stored once under several names; totals count every name."""
    places: dict[tuple, list[str]] = {}
    for name, tensor in source.tensors.items():
        if tensor.info.num_elements:
            places.setdefault((tensor.segments, tensor.strides, tensor.first, tensor.info.shape), []).append(name)
    groups = [names for names in places.values() if len(names) > 1]
    extra = Counter(fold_name(" = ".join(names)) for names in groups)
    return [f"stored once: {pattern}" + (f" ({count} times)" if count > 1 else "") for pattern, count in extra.items()]
