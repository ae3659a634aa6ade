"""Determines which of several namings the tensors of a checkpoint use."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mindvlm.checkpoint import TensorInfo
from mindvlm.checkpoint.untrusted import quoted
from mindvlm.core.errors import UserError
from mindvlm.weights.config_json import MAX_NUM_LAYERS
from mindvlm.weights.rules.findings import ConversionError, Finding, fold_name
from mindvlm.weights.rules.table import RuleTable

MAX_NUM_TENSORS = 20_000


@dataclass(frozen=True)
class Fit:
    """Counts of the names of a checkpoint that a table keeps, and that it knows (keeps or drops)."""

    table: RuleTable
    num_kept: int
    num_known: int
    num_tensors: int

    @property
    def is_enough(self) -> bool:
        """Whether the table is a candidate: it knows at least half of the names and keeps some."""
        return self.num_kept > 0 and 2 * self.num_known >= self.num_tensors


def best_fit(tables: Sequence[RuleTable], names: Collection[str]) -> Fit:
    """Returns the fit of the table that keeps most names; of equals, that knows most; then of the first."""
    return max((_fit(table, names) for table in tables), key=lambda fit: (fit.num_kept, fit.num_known))


def total_fit(fits: Sequence[Fit]) -> Fit:
    """Returns the total fit of several checkpoints, with the table of the first."""
    return Fit(
        fits[0].table,
        sum(fit.num_kept for fit in fits),
        sum(fit.num_known for fit in fits),
        sum(fit.num_tensors for fit in fits),
    )


def choose_table(
    tables: Sequence[RuleTable], infos: Mapping[str, TensorInfo], *, model: str, origin: str = "the checkpoint"
) -> RuleTable:
    """Returns the table whose names the tensors have.

    The table that keeps most of the tensors wins; its plan reports names that no table knows.

    Args:
        tables: the namings of one model; the first of equals wins.
        infos: the tensors.
        model: name of the model in messages.
        origin: name of the checkpoint in messages.

    Raises:
        UserError: no table knows at least half of the names, or there are more than a model has.
        ConversionError: some names are those of another table, so the checkpoint mixes two namings.
    """
    require_size_of_model(infos, origin)
    fit = best_fit(tables, infos)
    table = fit.table
    if not fit.is_enough:
        raise UserError(
            f"{origin} is not a {table.family.capitalize()} checkpoint of the model {model}: {fit.num_known} of its "
            f"{len(infos)} tensors have known names; the first is {next(iter(infos), None)}; give weights of {model}"
        )
    findings = _mixed_in(table, tables, infos)
    if findings:
        raise ConversionError(f"{origin} mixes {table.name} names with others", findings)
    return table


def require_size_of_model(infos: Mapping[str, TensorInfo], origin: str) -> None:
    """Raises UserError if there are more tensors or layers than a model can have, so that checks stay fast."""
    if len(infos) > MAX_NUM_TENSORS:
        raise UserError(
            f"{origin}: holds {len(infos):,} tensors, a model has at most {MAX_NUM_TENSORS:,}; give weights of a model"
        )
    for name in infos:
        for part in name.split("."):
            if part.isdecimal() and len(part) > 3 and (len(part) > 9 or int(part) >= MAX_NUM_LAYERS):
                raise UserError(
                    f"{origin}: tensor {quoted(name)} is of a layer beyond the {MAX_NUM_LAYERS} that a model may have; "
                    "give weights of a model"
                )


def targets_of(table: RuleTable, name: str) -> tuple[str, ...]:
    """Returns the targets of the rule for `name`, whatever else the rule needs."""
    for rule, _, layers in table.claims(name)[:1]:
        return tuple(pattern.fill(layers) for pattern in rule.target_patterns)
    return ()


def _fit(table: RuleTable, names: Collection[str]) -> Fit:
    rules = [claims[0][0] for name in names if (claims := table.claims(name))]
    return Fit(table, sum(bool(rule.targets) for rule in rules), len(rules), len(names))


def _mixed_in(table: RuleTable, tables: Sequence[RuleTable], infos: Mapping[str, TensorInfo]) -> list[Finding]:
    strangers = [name for name in infos if not table.claims(name)]
    makers = {target: name for name in infos for target in targets_of(table, name)} if strangers else {}
    findings = []
    for name in strangers:
        other = next((other for other in tables if other.claims(name)), None)
        if other is None:
            continue
        made = next((target for target in targets_of(other, name) if target in makers), None)
        if made:
            detail = f"a {other.name} name of {fold_name(made)}, which {fold_name(makers[made])} is too"
            findings.append(Finding("duplicate", name, detail))
        else:
            findings.append(Finding("unexpected", name, f"a {other.name} name among {table.name} names"))
    return findings
