"""Remedies for checkpoints that do not fit a model in a way that training programs are known to cause."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mindvlm.checkpoint import TensorInfo
from mindvlm.weights.rules.findings import Finding
from mindvlm.weights.rules.naming import targets_of
from mindvlm.weights.rules.table import CONNECTORS, RuleTable

Infos = Mapping[str, TensorInfo]

_HEAD = "lm_head.weight"


def remedy_for(
    findings: Sequence[Finding], table: RuleTable, infos: Infos, target_infos: Infos | None, row_tables: Iterable[str]
) -> str:
    """Returns the remedy if one known cause explains all findings, else an empty text.

    Args:
        findings: the result of `make_plan` for these arguments.
        table: the naming of the checkpoint.
        infos: the tensors of the checkpoint.
        target_infos: the native tensors that the config describes, if there is one.
        row_tables: native tensors with one row per token.
    """
    found = {(finding.status, name) for finding in findings for name in targets_of(table, finding.name)}
    statuses, names = {status for status, _ in found}, {name for _, name in found}
    if not found:
        return ""
    if statuses == {"missing"} and all(name.endswith(_HEAD) for name in names):
        return (
            f"the file has no head of its own, it was saved with the head tied to the token embeddings; save it with "
            f"tie_word_embeddings false and a copy of embed_tokens.weight as {_HEAD}"
        )
    if statuses == {"shape"} and names <= set(row_tables) and target_infos:
        sources = {name: infos[table.sources_of(name)[0]] for name in names}
        rows, wanted = ({infos[name].shape[0] for name in names} for infos in (sources, target_infos))
        if len(rows) == len(wanted) == 1 and all(sources[n].shape[1:] == target_infos[n].shape[1:] for n in names):
            return rows_remedy(*rows, *wanted)
    if names and all((part := table.part_of(name)) and part.key == CONNECTORS for name in names):
        if "unexpected" in statuses and target_infos:
            there = [target for name in infos for target in targets_of(table, name)]
            return connector_remedy(table, there, target_infos)
    return ""


def rows_remedy(num_rows: int, wanted: int) -> str:
    """Returns the remedy for token tables with another number of rows than the config says."""
    if num_rows > wanted:
        return (
            f"the token tables were extended to {num_rows} rows for new tokens; set vocab_size to {num_rows} in "
            f"config.json, or cut them with model.resize_token_embeddings({wanted})"
        )
    return (
        f"the tokenizer or config.json counts {wanted} tokens, for which the token tables were not extended; take the "
        f"tokenizer and config.json of these weights, or call model.resize_token_embeddings({wanted})"
    )


def connector_remedy(native: RuleTable, there: Iterable[str], wanted: Iterable[str]) -> str:
    """Returns the remedy for a connector of another type, from native names."""

    return (
        f"the connector is of another type ({_connector(native, there)}) than the model's "
        f"({_connector(native, wanted)}); give the matching one, or correct mm_projector_type or connector_type in "
        "config.json"
    )


def _connector(native: RuleTable, names: Iterable[str]) -> str:
    parts = dict.fromkeys(part.name for name in names if (part := native.part_of(name)) and part.key == CONNECTORS)
    num_layers = sum(part.startswith("connector layer") for part in parts)
    return f"MLP of {num_layers} layers" if num_layers else ", ".join(parts) or "none"


def connector_file(weights: Path) -> Path | None:
    """Returns the file of a connector that a training saved alone beside the weights, if there is one."""
    files = [weights.with_name(name) for name in ("mm_projector.bin", "mm_projector.safetensors")]
    return next((file for file in files if file.is_file()), None)


def missing_connector_remedy(weights: Path) -> str:
    """Returns the remedy for weights without a connector, which may lie in a file beside them."""
    file = connector_file(weights)
    start = f"{file.name} beside it does" if file else "if a training saved it alone"
    return (
        f"{start}, join both: mindvlm-convert --torch_ckpt_path {weights} {file or 'mm_projector.bin'} --to hf "
        "--mindspore_ckpt_path FOLDER"
    )
