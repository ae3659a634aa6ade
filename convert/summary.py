"""What a conversion did: as a text for people and as the record that `account` describes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mindvlm.convert.conversion import Conversion
from mindvlm.convert.inspection import describe_format
from mindvlm.convert.report.account import Account, SourceRecord, Step, build_report, file_record
from mindvlm.convert.report.origins import Origin, add_origins, carry_origins, origins_of
from mindvlm.weights.rules.findings import fold_label, format_table
from mindvlm.weights.rules.plan import Plan

Origins = Mapping[str, Sequence[Origin]]


def summary(conversion: Conversion) -> str:
    """Return a readable account: sources, rules with counts, dropped and absent tensors, totals, proofs."""
    opened = conversion.opened
    lines = []
    for index, layer in enumerate(opened.layers):
        used = sum(opened.origins[name] == index for name in opened.source.infos if name in opened.origins)
        lines.append(f"source: {layer.checkpoint.path}, {layer.plan.table.name} names, gives {used} tensors")
    if opened.adapter:
        lines.append(f"merged: {opened.adapter.path}, changes {len(opened.modified)} tensors")
    lines.append(f"model: {opened.model.name}")
    for layer in opened.layers:
        lines += _rules(layer.plan)
    if conversion.way_out:
        lines += _rules(conversion.way_out)
    if opened.absent_parts:
        lines.append(f"partial: nothing is there of: {', '.join(opened.absent_parts)}")
    lines.append(f"sizes: {opened.sizes}")
    lines.append(_totals(conversion))
    if conversion.copied:
        lines.append(f"copied beside it: {', '.join(copy.path.name for copy in conversion.copied)}")
    elif conversion.request.to == "hf" and conversion.outputs and conversion.request.only is None:
        lines.append("config.json and tokenizer do not lie beside the source; a model folder needs them too")
    if conversion.verified:
        lines.append(f"verified: {conversion.verified.describe()}")
    if conversion.parity:
        lines += ["", conversion.parity.table()]
    return "\n".join(lines)


def report_of(conversion: Conversion) -> dict[str, Any]:
    """Return the machine-readable record; reads the source files once more for their hashes."""
    opened = conversion.opened
    sources = [
        SourceRecord(
            "layer" if index else "base",
            str(layer.checkpoint.path),
            describe_format(layer.checkpoint),
            layer.plan.table.name,
            tuple(file_record(file) for file in dict.fromkeys((layer.checkpoint.path, *layer.checkpoint.files))),
        )
        for index, layer in enumerate(opened.layers)
    ]
    steps = [Step(index, layer.plan, layer.checkpoint.infos) for index, layer in enumerate(opened.layers)]
    if opened.adapter:
        files = tuple(map(file_record, opened.adapter.files))
        sources.append(SourceRecord("adapter", str(opened.adapter.path), "PEFT LoRA", "", files))
    if conversion.way_out:
        steps.append(Step(None, conversion.way_out, opened.source.infos))
    return build_report(
        Account(
            model=opened.model.name,
            family=opened.model.family,
            options=_options(conversion),
            sources=sources,
            steps=steps,
            infos=conversion.infos,
            origins=_origins(conversion),
            statistics=conversion.statistics,
            absent_parts=opened.absent_parts,
            outputs=[dataclasses.replace(file_record(out.made), path=str(out.path)) for out in conversion.outputs],
            verification=_verification(conversion),
            seconds=conversion.seconds,
        )
    )


def _origins(conversion: Conversion) -> Origins:
    opened = conversion.opened
    layers = [
        carry_origins(origins_of(layer.checkpoint.infos, index), layer.plan)
        for index, layer in enumerate(opened.layers)
    ]
    origins: Origins = {name: layers[opened.origins[name]][name] for name in opened.source.infos}
    if opened.adapter:
        origins = add_origins(origins, opened.modified, len(layers))
    if not conversion.way_out:
        return origins
    kept = {name: (Origin(0, (name,)),) for name in conversion.infos}
    return kept | carry_origins(origins, conversion.way_out)


def _options(conversion: Conversion) -> dict[str, Any]:
    request = conversion.request
    return {
        "target": request.target,
        "dtype": request.dtype,
        "to": request.to,
        "only": request.only,
        "max_shard_size": request.max_shard_size,
        "dry_run": request.dry_run,
        "sizes": conversion.opened.sizes,
    }


def _verification(conversion: Conversion) -> dict[str, Any] | None:
    if conversion.verified is None and conversion.failure is None:
        return None
    record: dict[str, Any] = {"passed": conversion.failure is None, "failure": conversion.failure}
    if conversion.verified:
        record["source_tensors_equal"] = conversion.verified.num_source_tensors
        record["planned_tensors_equal"] = conversion.verified.num_planned_tensors
    if conversion.parity:
        record["logits"] = conversion.parity.record()
    return record


def _rules(plan: Plan) -> list[str]:
    """The rules of a plan in use, and what it leaves out and why."""
    if plan.is_identity:
        return [f"{plan.table.name} names: all {len(plan.infos)} tensors stay as they are"]
    rows = [("rule", "tensors", "from", "to"), *_folded_rules(plan)]
    lines = ["", *format_table(rows), ""]
    num_kept = len(plan.identities)
    lines.append(f"unchanged names: {num_kept}; rules without a tensor: {len(plan.unused_rules)}")
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.dropped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        lines.append(f"dropped: {fold_label(names)}: {reason}")
    return lines


def _folded_rules(plan: Plan) -> list[tuple[str, str, str, str]]:
    """One row for all renamings that only exchange the same beginning of a name, one for every other rule."""
    used: dict[tuple[str, str, str], list[int]] = {}
    for rule, count in plan.uses.items():
        if rule.targets:
            kind, start, target = type(rule).__name__, join_names(rule.sources), join_names(rule.targets)
            beginnings = _beginnings(start, target) if kind == "Rename" else (start, target)
            used.setdefault((kind, *beginnings), []).append(count)
    return [(kind, str(sum(counts)), start, target) for (kind, start, target), counts in used.items()]


def _beginnings(source: str, target: str) -> tuple[str, str]:
    """Replace the end that two names share by `*`, but leave each its first word."""
    old, new = source.split("."), target.split(".")
    shared = 0
    while shared < min(len(old), len(new)) - 1 and old[-1 - shared] == new[-1 - shared]:
        shared += 1
    if not shared:
        return source, target
    return ".".join((*old[:-shared], "*")), ".".join((*new[:-shared], "*"))


def _totals(conversion: Conversion) -> str:
    infos = conversion.infos.values()
    totals = (
        f"{len(infos)} tensors, {sum(info.num_elements for info in infos):,} parameters, "
        f"{sum(info.num_bytes for info in infos):,} bytes, dtype {conversion.request.dtype}, "
        f"{conversion.seconds:.1f} s"
    )
    if conversion.request.dry_run:
        return f"dry run, nothing was written; {conversion.request.target} would hold {totals}"
    if not conversion.outputs:
        return f"nothing was written; {conversion.request.target} holds {totals}"
    if len(conversion.outputs) > 1:
        return f"wrote {len(conversion.outputs)} files to {conversion.outputs[0].path.parent}: {totals}"
    return f"wrote {conversion.outputs[0].path}: {totals}"


def join_names(names: Sequence[str]) -> str:
    """Write names that differ in one place once: a.q.b, a.k.b is "a.[q|k].b"."""
    if len(names) < 2:
        return "".join(names)
    start = len(os.path.commonprefix(names))
    rests = [name[start:] for name in names]
    end = len(os.path.commonprefix([rest[::-1] for rest in rests]))
    middles = "|".join(rest[: len(rest) - end] for rest in rests)
    return f"{names[0][:start]}[{middles}]{rests[0][len(rests[0]) - end :]}"
