"""The summary of a conversion that the command prints."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from mindvlm.convert.conversion import Conversion
from mindvlm.native.library import BLOCK
from mindvlm.weights.remedies import connector_file
from mindvlm.weights.rules.findings import fold_label, format_table
from mindvlm.weights.rules.plan import Plan


def summary(conversion: Conversion) -> str:
    """Returns the summary: sources, rules with counts, dropped and absent tensors, totals, proofs."""
    opened = conversion.opened
    lines = []
    for index, one in enumerate(opened.inputs):
        used = sum(opened.origins[name] == index for name in opened.source.infos if name in opened.origins)
        removed = f" without {' and '.join(one.wrappers)}" if one.wrappers else ""
        lines.append(f"source: {one.checkpoint.path}, {one.plan.table.name} names{removed}, gives {used} tensors")
    if opened.adapter:
        lines.append(f"merged: {opened.adapter.path}, changes {len(opened.modified)} tensors")
    lines.append(f"model: {opened.model.name}")
    for one in opened.inputs:
        lines += _rules(one.plan)
    if conversion.formed and conversion.formed.note:
        lines.append(conversion.formed.note)
    if conversion.way_out:
        lines += _rules(conversion.way_out)
    if opened.absent_parts:
        beside = connector_file(opened.inputs[0].checkpoint.path) if "connector" in opened.absent_parts else None
        unread = f"; {beside} was not read, give it as a further source" if beside else ""
        lines.append(f"partial: missing parts: {', '.join(opened.absent_parts)}{unread}")
    lines.append(f"sizes: {opened.sizes}")
    if conversion.quantization and (kept := conversion.quantization.kept):
        lines.append(f"16 bits where the width is no multiple of {BLOCK}: {fold_label(kept)}")
    for one in opened.inputs:
        if one.nonfinite:
            lines.append(f"NaN or infinity in {one.checkpoint.path}, kept as it is: {fold_label(one.nonfinite)}")
    lines.append(_totals(conversion))
    copied = [copy.path.name for copy in conversion.copied]
    if copied:
        lines.append(f"beside it: {', '.join(copied)}")
    elif conversion.request.to == "hf" and conversion.outputs and conversion.request.only is None:
        lines.append("config.json and the tokenizer are not beside the source; a model folder needs them too")
    is_folder = conversion.outputs and conversion.target.whole_folder
    if is_folder and opened.undescribed_parts and "config.json" not in copied:
        lines.append(
            f"no config.json: that of {opened.described_in} does not describe {', '.join(opened.undescribed_parts)}; "
            "put the config.json of the whole model there, such as the one that the training wrote"
        )
    if conversion.verified:
        lines.append(f"verified: {conversion.verified.describe()}")
    if conversion.parity:
        lines += ["", conversion.parity.table()]
    return "\n".join(lines)


def _rules(plan: Plan) -> list[str]:
    """Lists the rules that a plan used, and the tensors that it drops, with the reasons."""
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
    """Returns one row for all renamings that exchange the same prefix, and one for every other rule."""
    used: dict[tuple[str, str, str], list[int]] = {}
    for rule, count in plan.uses.items():
        if rule.targets:
            kind, start, target = type(rule).__name__, join_names(rule.sources), join_names(rule.targets)
            beginnings = _beginnings(start, target) if kind == "Rename" else (start, target)
            used.setdefault((kind, *beginnings), []).append(count)
    return [(kind, str(sum(counts)), start, target) for (kind, start, target), counts in used.items()]


def _beginnings(source: str, target: str) -> tuple[str, str]:
    """Replaces the end that two names share by `*`, except for the first word of each."""
    old, new = source.split("."), target.split(".")
    shared = 0
    while shared < min(len(old), len(new)) - 1 and old[-1 - shared] == new[-1 - shared]:
        shared += 1
    if not shared:
        return source, target
    return ".".join((*old[:-shared], "*")), ".".join((*new[:-shared], "*"))


def _totals(conversion: Conversion) -> str:
    infos, outputs, target = conversion.tensors.infos.values(), conversion.outputs, conversion.request.target
    if outputs:
        size = f"{sum(output.path.stat().st_size for output in outputs):,} bytes"
    else:
        size = f"{sum(info.num_bytes for info in infos):,} bytes of values"
    totals = (
        f"{len(infos)} tensors, {sum(info.num_elements for info in infos):,} parameters, {size}, {_dtype(conversion)}, "
        f"{conversion.seconds:.1f} s"
    )
    if conversion.request.dry_run:
        return f"dry run, nothing was written; {target} would hold {totals}"
    if not outputs:
        return f"nothing was written; {target} holds {totals}"
    if len(outputs) > 1:
        return f"wrote {len(outputs)} files to {outputs[0].path.parent}: {totals}"
    return f"wrote {outputs[0].path}: {totals}"


def _dtype(conversion: Conversion) -> str:
    """Names the dtypes, with the number of tensors of each if the weights are quantized."""
    if not conversion.quantization:
        return f"dtype {conversion.request.dtype}"
    counts = Counter(info.dtype for info in conversion.tensors.infos.values())
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())


def join_names(names: Sequence[str]) -> str:
    """Joins names that differ in one place: a.q.b and a.k.b become "a.[q|k].b"."""
    if len(names) < 2:
        return "".join(names)
    start = len(os.path.commonprefix(names))
    rests = [name[start:] for name in names]
    end = len(os.path.commonprefix([rest[::-1] for rest in rests]))
    middles = "|".join(rest[: len(rest) - end] for rest in rests)
    return f"{names[0][:start]}[{middles}]{rests[0][len(rests[0]) - end :]}"
