"""The JSON report of a conversion: where every tensor came from, by which rules, and what it became.

`report_of` returns the report as plain values, `write_report` writes it as JSON (UTF-8, indented, keys in the order
below; a float that JSON cannot express is one of the texts "NaN", "Infinity", "-Infinity").

    schema            "mindvlm-conversion"
    schema_version    1; grows when a key changes its meaning or disappears
    model, family     what was recognised, such as "vary_toy" and "vary"
    options           the settings of the conversion, by name; form: note and residual of computed tensors, or null
    sources           list: role ("base", "layer", "adapter"), path, format, naming, files
      files           list: path, bytes, sha256
    rules             list: source, kind, from, to, used; the rules that were used, `used` times each
    unused_rules      list: source, kind, from, to; the rules of the same tables that matched nothing
    identities        list: source, names; tensors that kept name and layout
    dropped           list: source, name, reason, dtype, shape
    absent_parts      parts of the model that are in no source
    tensors           list, in the order of the target: name, dtype, shape, origin, statistics
      origin          list: source, names; the tensors of each source that it consists of, the adapter's last
      statistics      norm, sum, min, max, num_nonfinite (see `TensorStatistics`); null if they were not computed
    totals            tensors, parameters, bytes, by_dtype: dtype -> tensors, parameters, bytes
    outputs           list: path, bytes, sha256; empty in a dry run
    verification      the result of the proofs, or null
    versions          python, mindvlm, numpy, platform
    seconds           duration of the conversion
    peak_memory_bytes highest resident memory of the process so far, interpreter and libraries included

`source` is an index into `sources`; in rules, unused_rules, identities and dropped it is null for the step from native
names to those of the target.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mindvlm
from mindvlm.checkpoint import TensorInfo, atomic_file
from mindvlm.convert.conversion import Conversion
from mindvlm.convert.inspection import describe_format
from mindvlm.convert.quantizing import VerifiedBlocks
from mindvlm.convert.statistics import TensorStatistics
from mindvlm.core.errors import UserError
from mindvlm.core.host_memory import peak_memory
from mindvlm.weights.opened import Opened
from mindvlm.weights.rules.operations import Rule
from mindvlm.weights.rules.plan import Plan

SCHEMA_VERSION = 1
_READ_BYTES = 4 * 1024 * 1024


Origins = Mapping[str, Mapping[int, Sequence[str]]]
"""For each tensor the tensors that it consists of, by the index of their source."""


@dataclass(frozen=True)
class Step:
    """A plan applied to the tensors `infos`: those of the source with that index, None for the step to the target."""

    source: int | None
    plan: Plan
    infos: Mapping[str, TensorInfo]


def report_of(conversion: Conversion) -> dict[str, Any]:
    """Returns the report of a conversion; reads the source files once more for their hashes.

    Raises:
        UserError: a file cannot be read.
    """
    opened, infos = conversion.opened, conversion.tensors.infos
    outputs = [file_record(output.made) | {"path": str(output.path)} for output in conversion.outputs]
    record = {
        "schema": "mindvlm-conversion",
        "schema_version": SCHEMA_VERSION,
        "model": opened.model.name,
        "family": opened.model.family,
        "options": _options(conversion),
        "sources": _sources(opened),
        **rule_records(_steps(conversion)),
        "absent_parts": opened.absent_parts,
        "tensors": tensor_records(infos, _origins(conversion), conversion.statistics),
        "totals": totals(infos.values()),
        "outputs": outputs,
        "verification": _verification(conversion),
        "versions": {
            "python": platform.python_version(),
            "mindvlm": mindvlm.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
        },
        "seconds": round(conversion.seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }
    return _plain(record)


def write_report(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes a report as JSON; the file appears when it is complete.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def file_record(path: str | Path) -> dict[str, Any]:
    """Returns a file's path, its size in `bytes`, and the `sha256` of its bytes in hexadecimal.

    Raises:
        UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
            num_bytes = file.tell()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file and the disk") from error
    return {"path": str(path), "bytes": num_bytes, "sha256": digest.hexdigest()}


def rule_records(steps: Sequence[Step]) -> dict[str, list[dict[str, Any]]]:
    """Returns what the plans did, under the keys of the report."""
    return {
        "rules": [
            {"source": step.source, **_rule_record(rule), "used": step.plan.uses[rule]}
            for step in steps
            for rule in step.plan.table.rules
            if rule in step.plan.uses
        ],
        "unused_rules": [
            {"source": step.source, **_rule_record(rule)} for step in steps for rule in step.plan.unused_rules
        ],
        "identities": [
            {"source": step.source, "names": step.plan.identities} for step in steps if step.plan.identities
        ],
        "dropped": [
            {"source": step.source, "name": name, "reason": reason, **_described(step.infos[name])}
            for step in steps
            for name, reason in step.plan.dropped.items()
        ],
    }


def tensor_records(
    infos: Mapping[str, TensorInfo], origins: Origins, statistics: Mapping[str, TensorStatistics]
) -> list[dict[str, Any]]:
    """Returns a record of each written tensor; for `origins` see `carry_origins` and `add_origins`."""
    return [
        {
            "name": name,
            **_described(info),
            "origin": [{"source": source, "names": names} for source, names in origins[name].items()],
            "statistics": dataclasses.asdict(statistics[name]) if name in statistics else None,
        }
        for name, info in infos.items()
    ]


def totals(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    """Returns the numbers of tensors, parameters and bytes, of all and of each dtype."""
    by_dtype: dict[str, dict[str, int]] = {}
    for info in infos:
        row = by_dtype.setdefault(info.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += info.num_elements
        row["bytes"] += info.num_bytes
    total = {key: sum(row[key] for row in by_dtype.values()) for key in ("tensors", "parameters", "bytes")}
    return {**total, "by_dtype": by_dtype}


def carry_origins(origins: Origins, plan: Plan) -> Origins:
    """Returns the origins of a plan's targets, given those of the tensors that it reads."""
    return {target: _joined(origins[source] for source in plan.sources_of(target)) for target in plan.infos}


def add_origins(origins: Origins, changed: Mapping[str, Sequence[str]], source: int) -> Origins:
    """Returns `origins` with the tensors of another source added to those that it changed: `MergedSource.merged`."""
    return {
        name: _joined((found, {source: changed[name]})) if name in changed else found for name, found in origins.items()
    }


def _joined(origins: Iterable[Mapping[int, Sequence[str]]]) -> dict[int, list[str]]:
    """Returns the names of each source in order of appearance, each once."""
    joined: dict[int, dict[str, None]] = {}
    for origin in origins:
        for source, names in origin.items():
            joined.setdefault(source, {}).update(dict.fromkeys(names))
    return {source: list(names) for source, names in joined.items()}


def _origins(conversion: Conversion) -> Origins:
    opened = conversion.opened
    carried = [
        carry_origins({name: {index: [name]} for name in one.tensors.infos}, one.plan)
        for index, one in enumerate(opened.inputs)
    ]
    computed = conversion.formed.computed if conversion.formed else {}
    origins: Origins = {
        name: _joined(carried[opened.origins[one]][one] for one in computed.get(name, [name]))
        for name in opened.source.infos
    }
    if opened.adapter:
        origins = add_origins(origins, opened.modified, len(carried))
    if not conversion.way_out:
        return origins
    return {name: {0: [name]} for name in conversion.tensors.infos} | carry_origins(origins, conversion.way_out)


def _steps(conversion: Conversion) -> list[Step]:
    opened = conversion.opened
    steps = [Step(index, one.plan, one.tensors.infos) for index, one in enumerate(opened.inputs)]
    return [*steps, Step(None, conversion.way_out, opened.source.infos)] if conversion.way_out else steps


def _sources(opened: Opened) -> list[dict[str, Any]]:
    """Returns a record of each source; its place in the list is the index that `Step.source` and `Origins` have."""
    found = []
    for index, one in enumerate(opened.inputs):
        checkpoint = one.checkpoint
        # a folder of shards is no file
        files = dict.fromkeys(path for path in (checkpoint.path, *checkpoint.files) if not path.is_dir())
        found.append(
            ("layer" if index else "base", checkpoint.path, describe_format(checkpoint), one.plan.table.name, files)
        )
    if opened.adapter:
        found.append(("adapter", opened.adapter.path, "PEFT LoRA", "", opened.adapter.files))
    keys = ("role", "path", "format", "naming", "files")
    return [dict(zip(keys, (*fields, list(map(file_record, files))), strict=True)) for *fields, files in found]


def _options(conversion: Conversion) -> dict[str, Any]:
    request = conversion.request
    return {
        "target": request.target,
        "dtype": request.dtype,
        "to": request.to,
        "quant": request.quant,
        "only": request.only,
        "max_shard_size": request.max_shard_size,
        "dry_run": request.dry_run,
        "sizes": conversion.opened.sizes,
        "form": {"note": conversion.formed.note, "residual": conversion.formed.residual} if conversion.formed else None,
    }


def _verification(conversion: Conversion) -> dict[str, Any] | None:
    if conversion.verified is None and conversion.failure is None:
        return None
    record: dict[str, Any] = {
        "passed": conversion.failure is None,
        "failure": conversion.failure and str(conversion.failure),
    }
    if isinstance(conversion.verified, VerifiedBlocks):
        record["relative_errors"] = conversion.verified.errors
        record["other_tensors_equal"] = conversion.verified.num_equal
    elif conversion.verified:
        record["source_tensors_equal"] = conversion.verified.num_source_tensors
        record["planned_tensors_equal"] = conversion.verified.num_planned_tensors
    if conversion.parity:
        record["logits"] = conversion.parity.record()
    return record


def _rule_record(rule: Rule) -> dict[str, Any]:
    return {"kind": type(rule).__name__, "from": list(rule.sources), "to": list(rule.targets)}


def _described(info: TensorInfo) -> dict[str, Any]:
    return {"dtype": info.dtype, "shape": list(info.shape)}


def _plain(value: Any) -> Any:
    """Replaces tuples by lists, and paths, keys and the floats without a JSON literal by texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
