"""Recognition of the model and the naming of a checkpoint from its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.weights.config_json import Config, named_types, shown_name
from mindvlm.weights.foreign import require_plain_weights
from mindvlm.weights.remedies import remedy_for
from mindvlm.weights.rules.consistency import require_consistent_sizes, require_open_tensors
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.naming import Fit, best_fit, choose_table, require_size_of_model, targets_of, total_fit
from mindvlm.weights.rules.overlaid import FirstRows
from mindvlm.weights.rules.plan import Plan
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import RuleTable
from mindvlm.weights.wrappers import without_wrappers

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Formed:
    """Native tensors of another form of a model.

    Attributes:
        source: the tensors.
        computed: the tensors whose values are computed -> the native tensors that they are computed from.
        note: a line for the summary and the report, or "".
        residual: relative error of a form that the tensors determine only approximately; 0 if they determine it.
        files: further files of a folder of this form, by name.
    """

    source: TensorSource
    computed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    note: str = ""
    residual: float = 0.0
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """A form of a model that a conversion can write although its tensors are not those of the source.

    Attributes:
        make: returns the form; called with the native tensors and the config.json of each source that has one, the
            base first.
        table: names to write; None for those of `hf_tables`.
    """

    make: Callable[[TensorSource, Sequence[Config]], Formed]
    table: RuleTable | None = None


@dataclass(frozen=True)
class ConvertibleModel:
    """A model that can be converted.

    Attributes:
        name: name on the command line.
        family: name of its family in `mindvlm.models.registry`.
        tables: known namings, the native one first.
        hf: naming of the published files.
        hf_tables: namings to convert back to: `hf`, and those of published files with parts of the model.
        model_types: names in config.json, as `model_type` or in `architectures`.
        target_infos: returns the native tensors for a folder of weights, or None if its config.json describes none.
        released_infos: returns the native tensors of the released weights.
        released_config: returns the config.json of the released weights.
        published: the repositories of the Hugging Face hub with released weights.
        example_infos: returns the native tensors of an example whose sizes all differ, see consistency.py.
        whole_config: completes a config.json from other files of its folder.
        row_tables: native tensors that may be cut to their first rows, for a vocabulary longer than the tokenizer.
        left_out: returns prefixes of the tensors that an overlaid part may have but the model lacks, see `make_plan`.
        config_naming: returns the naming of the files beside a config.json, or None for that of `hf`.
        separate_parts: the keys of a run config that name checkpoints with parts of the model, with their help.
        companions: files that its folders have besides those of `mindvlm.weights.companions`.
        other_config: returns the config of a folder that has it in another file than a config.json, or None.
        implied_infos: returns the native tensors below open patterns that the sizes of given native tensors imply;
            called with (tensors, origin).
        forms: the forms by the name that `--to` gives them; "hf" is computed before its names are given.
    """

    name: str
    family: str
    tables: tuple[RuleTable, ...]
    hf: RuleTable
    hf_tables: tuple[RuleTable, ...]
    model_types: tuple[str, ...]
    target_infos: Callable[[Path], dict[str, TensorInfo] | None]
    released_infos: Callable[[], dict[str, TensorInfo]]
    released_config: Callable[[], dict[str, Any]]
    example_infos: Callable[[], dict[str, TensorInfo]]
    published: tuple[str, ...] = ()
    whole_config: Callable[[Config, Path], Config] | None = None
    row_tables: tuple[str, ...] = ()
    left_out: Callable[[Infos], dict[str, str]] | None = None
    config_naming: Callable[[Config], str | None] | None = None
    separate_parts: Mapping[str, str] = field(default_factory=dict, hash=False)
    companions: tuple[str, ...] = ()
    other_config: Callable[[Path], Config | None] | None = None
    implied_infos: Callable[[Infos, str], Infos] | None = None
    forms: Mapping[str, Form] = field(default_factory=dict, hash=False)

    @property
    def native(self) -> RuleTable:
        """The table of native names."""
        return self.tables[0]

    def hf_tables_for(self, infos: Infos) -> list[RuleTable]:
        """Returns the tables of `hf_tables` that name all of these native tensors, or else `hf`."""
        return [table for table in self.hf_tables if all(map(table.part_of, infos))] or [self.hf]

    def parts_of(self, names: Iterable[str]) -> set[str]:
        """Returns the keys of the parts that these native tensors belong to."""
        return {self.native.part_of(name).key for name in names}

    def detect_table(self, infos: Infos, origin: str = "the checkpoint") -> RuleTable:
        """Returns the table of the tensor names; see `choose_table` for the errors."""
        return choose_table(self.tables, infos, model=self.name, origin=origin)

    def plan(self, table: RuleTable, infos: Infos, target_infos: Infos | None = None, **options: Any) -> Plan:
        """Returns the plan of `make_plan`, whose errors get a remedy where the cause is known."""
        try:
            return make_plan(table, infos, target_infos, **options)
        except ConversionError as error:
            remedy = remedy_for(error.findings, table, infos, target_infos, self.row_tables)
            raise ConversionError(error.what, error.findings, remedy) from None

    def require_own_names(self, table: RuleTable, infos: Infos, origin: str = "the checkpoint") -> None:
        """Raises UserError if `table` takes one part of another model but the tensors contain more of it."""
        if table.takes_only and any(not targets_of(table, name) for name in infos):
            part = table.takes_only
            raise UserError(
                f"{origin}: contains a model with the names of {table.name}, of which {self.name} takes only the "
                f"{part.replace('_', ' ')}; give weights of {self.name}, convert them as their own model, or add "
                f"--only {part}"
            )

    def require_consistent_sizes(
        self,
        plan: Plan,
        origin: str = "the checkpoint",
        *,
        sources_of: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        """Checks the target tensors of a plan against each other; see consistency.py for arguments and errors."""
        if self.implied_infos:
            require_open_tensors(plan, self.native, self.implied_infos(plan.infos, origin), origin=origin)
        require_consistent_sizes(plan, self.native, self.example_infos(), origin=origin, sources_of=sources_of)


def detect_model(
    models: Sequence[ConvertibleModel],
    *sources: Infos,
    folder_config: Config | None = None,
    name: str | None = None,
    origin: str = "the checkpoint",
) -> ConvertibleModel:
    """Returns the model of the tensors of all sources, whose namings may differ.

    The tensor names determine the model. If several models match, as for a part that they share, the choice is the
    model that config.json names; else the models for which these are not the names of another model; else, if all
    produce the same native tensors, the one with most complete sources and parts; else the only one that fits.

    Args:
        models: candidate models.
        sources: tensors of each source.
        folder_config: the config.json beside them, or None.
        name: name of the model, if the user specified it.
        origin: name of the checkpoint in messages.

    Raises:
        UserError: not exactly one model matches, with the reason for each, or `name` is unknown.
    """
    if name is not None:
        by_name = {model.name: model for model in models}
        if name not in by_name:
            raise UserError(f"--model {name!r} is unknown; expected one of: {', '.join(by_name)}")
        return by_name[name]
    return _recognise(models, sources, folder_config, origin)


def _recognise(
    models: Sequence[ConvertibleModel], sources: Sequence[Infos], folder_config: Config | None, origin: str
) -> ConvertibleModel:
    for infos in sources:
        require_size_of_model(infos, origin)
    each = {model: [best_fit(model.tables, infos) for infos in sources] for model in models}
    tables = {model: [fit.table for fit in found] for model, found in each.items()}
    fits = {model: total_fit(found) for model, found in each.items()}
    likely = [model for model, fit in fits.items() if fit.is_enough]
    most = max((fits[model].num_kept for model in likely), default=0)
    candidates = [model for model in likely if fits[model].num_kept == most]
    if not candidates:
        raise UserError(
            f"{origin}: not a known model: {_reasons(fits, folder_config)}; {_first_unknown(models, sources)}"
        )
    candidates = _named(candidates, folder_config) or candidates
    candidates = [model for model in candidates if not fits[model].table.takes_only] or candidates
    if len(candidates) == 1:
        return candidates[0]
    failures = {model: _failures(tables[model], sources) for model in candidates}
    complete = [model for model in candidates if not failures[model]]
    if _agree([tables[model] for model in candidates], sources):
        return min(
            candidates, key=lambda model: (len(failures[model]), _num_incomplete(model, tables[model], failures))
        )
    if len(complete) != 1:
        why = "; ".join(f"{model.name}: {found[0] if found else 'it fits'}" for model, found in failures.items())
        raise UserError(f"{origin}: the model is ambiguous ({why}); specify it with --model")
    return complete[0]


def native_view(
    source: TensorSource,
    models: Sequence[ConvertibleModel],
    *,
    target_infos: Infos | None = None,
    partial: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> TensorSource:
    """Returns a view of a checkpoint in any known naming under native names.

    Nothing is copied: tensors are read from `source` on access. See `make_plan` for `partial` and `left_out`.

    Args:
        source: the checkpoint.
        models: candidate models.
        target_infos: the expected native tensors, which determine the model; None to recognize it. A longer vocabulary
            is cut if the model allows it.

    Raises:
        ConversionError: the tensors do not form the model.
        UserError: the checkpoint belongs to none of the models, or to another model that shares a part, or its tensors
            are not plain weights.
    """
    origin = str(source.path)
    require_plain_weights(source.infos, origin)
    meant = [model for model in models if target_infos and all(model.native.part_of(name) for name in target_infos)]
    if len(meant) > 1:
        meant = [model for model in meant if not _failures([model.native], [target_infos])] or meant
    source = without_wrappers(source, tables_of(meant or models))
    model = meant[0] if len(meant) == 1 else _recognise(meant or models, [source.infos], None, origin)
    table = model.detect_table(source.infos, origin)
    model.require_own_names(table, source.infos, origin)
    wanted = {name: target_infos[name] for name in model.row_tables if target_infos and name in target_infos}
    source = FirstRows.of(
        source, {sources[0]: info for name, info in wanted.items() if (sources := table.sources_of(name))}
    )
    return model.plan(table, source.infos, target_infos, origin=origin, partial=partial, left_out=left_out).view(source)


def tables_of(models: Iterable[ConvertibleModel]) -> list[RuleTable]:
    """Returns the namings of all models."""
    return [table for model in models for table in model.tables]


def native_model(infos: Infos, models: Sequence[ConvertibleModel]) -> ConvertibleModel:
    """Returns the model of a complete set of native tensors.

    Raises:
        UserError: not exactly one model has these tensors.
    """
    meant = [model for model in models if all(model.native.part_of(name) for name in infos)]
    if len(meant) > 1:
        meant = [model for model in meant if not _failures([model.native], [infos])]
    if len(meant) != 1:
        names = ", ".join(model.name for model in models)
        raise UserError(f"the tensors fit {len(meant)} of the models {names}; give those of one whole model")
    return meant[0]


def _named(models: Sequence[ConvertibleModel], config: Config | None) -> list[ConvertibleModel]:
    """Returns the models that a config names, by its architectures or else by its `model_type`."""
    for name in named_types(config or {}):
        found = [model for model in models if name in model.model_types]
        if found:
            return found
    return []


def _agree(tables: Sequence[Sequence[RuleTable]], sources: Sequence[Infos]) -> bool:
    """Whether the tables of all models, one per source, map every tensor to the same targets."""
    return all(
        len({targets_of(of_model[index], name) for of_model in tables}) == 1
        for index, infos in enumerate(sources)
        for name in infos
    )


def _num_incomplete(
    model: ConvertibleModel,
    tables: Sequence[RuleTable],
    failures: Mapping[ConvertibleModel, Sequence[ConversionError]],
) -> int:
    """Returns the number of the model's parts that findings are about."""
    names = {finding.name for error in failures[model] for finding in error.findings}
    return len(model.parts_of(target for name in names for table in tables for target in targets_of(table, name)))


def _failures(tables: Sequence[RuleTable], sources: Sequence[Infos]) -> list[ConversionError]:
    """Returns the errors of the sources that are incomplete under the table of each."""
    failures = []
    for table, infos in zip(tables, sources, strict=True):
        try:
            make_plan(table, infos)
        except ConversionError as error:
            failures.append(error)
    return failures


def _reasons(fits: Mapping[ConvertibleModel, Fit], config: Config | None) -> str:
    reasons = [
        f"{model.name} knows {fit.num_known} of the {fit.num_tensors} tensors (best as {fit.table.name} names)"
        for model, fit in fits.items()
        if fit.num_known
    ]
    others = [model.name for model, fit in fits.items() if not fit.num_known]
    if others:
        reasons.append(f"none is known to {', '.join(others)}")
    types = named_types(config or {})
    if types:
        reasons.append(f"config.json says {' / '.join(map(shown_name, types[:3]))}")
    return "; ".join(reasons)


def _first_unknown(models: Sequence[ConvertibleModel], sources: Sequence[Infos]) -> str:
    tables = tables_of(models)
    names = (name for infos in sources for name in infos)
    first = next((name for name in names if not any(table.claims(name) for table in tables)), None)
    return f"the first unknown tensor is {first}" if first else "give a file that holds weights of one model"
