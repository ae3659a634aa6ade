"""The record of a conversion that machines read: what came from where, by which rules, and what it became.

`build_report` makes a table of plain values, `write_report` a JSON file of it (UTF-8, indented, keys in the order
below; a float that JSON cannot express is one of the texts "NaN", "Infinity", "-Infinity").

    schema            "mindvlm-conversion"
    schema_version    1; grows when a key changes its meaning or disappears
    model, family     what was recognised, such as "vary_toy" and "vary"
    options           the settings of the conversion, by name
    sources           list: role ("base", "layer", "adapter"), path, format, naming, files
      files           list: path, bytes, sha256 (null if it was not taken)
    rules             list: source, kind, from, to, used; the rules that were used, `used` times each
    unused_rules      list: source, kind, from, to; the rules of the same tables that nothing was found for
    identities        list: source, names; tensors that kept name and layout
    dropped           list: source, name, reason, dtype, shape
    absent_parts      parts of the model of which no source has anything
    tensors           list, in the order of the target: name, dtype, shape, origin, statistics
      origin          list: source, names; the tensors of each source that it is made of, the adapter's last
      statistics      norm, sum, min, max, num_nonfinite (see `TensorStatistics`); null if they were not taken
    totals            tensors, parameters, bytes, by_dtype: dtype -> tensors, parameters, bytes
    outputs           list: path, bytes, sha256; empty in a dry run
    verification      what the proofs found, or null
    versions          python, mindvlm, numpy, platform
    seconds           time of the whole
    peak_memory_bytes highest resident memory of the process so far, interpreter and libraries included

`source` is an index into `sources`; in rules, unused_rules, identities and dropped it is null for the step from our
names to the names of the target.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import mindvlm
from mindvlm.checkpoint import TensorInfo, atomic_file
from mindvlm.convert.report.origins import Origin
from mindvlm.convert.report.tensor_statistics import TensorStatistics
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.operations import Rule
from mindvlm.weights.rules.plan import Plan

SCHEMA_VERSION = 1
_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class FileRecord:
    """A file, its size, and the SHA-256 of its bytes in hexadecimal, if it was taken."""

    path: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class SourceRecord:
    """Something that tensors came from: a checkpoint or an adapter."""

    role: str
    path: str
    format: str
    naming: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Step:
    """A plan that was carried out on tensors described by `infos`: those of a source, or None on the way out."""

    source: int | None
    plan: Plan
    infos: Mapping[str, TensorInfo]


@dataclass(frozen=True, kw_only=True)
class Account:
    """Everything that a report is built from.

    Attributes:
        sources: in the order that `Step.source` and `Origin.source` count in.
        infos: the written tensors, in order.
        origins: of the written tensors; `origins_of`, `carry_origins` and `add_origins` make them.
        verification: any table of plain values.
    """

    model: str
    family: str
    options: Mapping[str, Any]
    sources: Sequence[SourceRecord]
    steps: Sequence[Step]
    infos: Mapping[str, TensorInfo]
    origins: Mapping[str, Sequence[Origin]]
    seconds: float
    statistics: Mapping[str, TensorStatistics] = field(default_factory=dict)
    absent_parts: Sequence[str] = ()
    outputs: Sequence[FileRecord] = ()
    verification: Mapping[str, Any] | None = None


def sha256_of(path: str | Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal; `progress` is called with the bytes just read.

    Raises:
        UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
                if progress:
                    progress(len(data))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file and the disk") from error
    return digest.hexdigest()


def file_record(path: str | Path, *, digest: bool = True, progress: Callable[[int], None] | None = None) -> FileRecord:
    """Describe a file; `digest` says whether to read it for its SHA-256, see `sha256_of`."""
    return FileRecord(str(path), Path(path).stat().st_size, sha256_of(path, progress) if digest else None)


def build_report(account: Account) -> dict[str, Any]:
    """Return the report as a table of plain values; the module describes it."""
    record = {
        "schema": "mindvlm-conversion",
        "schema_version": SCHEMA_VERSION,
        "model": account.model,
        "family": account.family,
        "options": dict(account.options),
        "sources": [dataclasses.asdict(source) for source in account.sources],
        "rules": [
            {"source": step.source, **_rule_record(rule), "used": step.plan.uses[rule]}
            for step in account.steps
            for rule in step.plan.table.rules
            if rule in step.plan.uses
        ],
        "unused_rules": [
            {"source": step.source, **_rule_record(rule)} for step in account.steps for rule in step.plan.unused_rules
        ],
        "identities": [
            {"source": step.source, "names": step.plan.identities} for step in account.steps if step.plan.identities
        ],
        "dropped": [
            {"source": step.source, "name": name, "reason": reason, **_described(step.infos[name])}
            for step in account.steps
            for name, reason in step.plan.dropped.items()
        ],
        "absent_parts": list(account.absent_parts),
        "tensors": [
            {
                "name": info.name,
                **_described(info),
                "origin": [dataclasses.asdict(origin) for origin in account.origins[info.name]],
                "statistics": _statistics_record(account.statistics.get(info.name)),
            }
            for info in account.infos.values()
        ],
        "totals": _totals(account.infos.values()),
        "outputs": [dataclasses.asdict(output) for output in account.outputs],
        "verification": None if account.verification is None else dict(account.verification),
        "versions": {
            "python": platform.python_version(),
            "mindvlm": mindvlm.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
        },
        "seconds": round(account.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return _plain(record)


def write_report(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a report as JSON; the file appears when it is complete.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rule_record(rule: Rule) -> dict[str, Any]:
    return {"kind": type(rule).__name__, "from": list(rule.sources), "to": list(rule.targets)}


def _described(info: TensorInfo) -> dict[str, Any]:
    return {"dtype": info.dtype, "shape": list(info.shape)}


def _statistics_record(statistics: TensorStatistics | None) -> dict[str, Any] | None:
    return None if statistics is None else dataclasses.asdict(statistics)


def _totals(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    by_dtype: dict[str, dict[str, int]] = {}
    for info in infos:
        row = by_dtype.setdefault(info.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += info.num_elements
        row["bytes"] += info.num_bytes
    total = {key: sum(row[key] for row in by_dtype.values()) for key in ("tensors", "parameters", "bytes")}
    return {**total, "by_dtype": by_dtype}


def _plain(value: Any) -> Any:
    """Lists for tuples, texts for paths and keys, and texts for the floats that JSON has no literals for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
