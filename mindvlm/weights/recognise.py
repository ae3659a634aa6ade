"""The models that can be converted, and how one is recognised. A new model adds its row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo, TensorSource
from mindvlm.convert.reference.vary_layout import vary_toy_config
from mindvlm.convert.reference.vary_tiny_layout import vary_tiny_config
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava import names as tinyllava
from mindvlm.models.tinyllava import part_names as tinyllava_parts
from mindvlm.models.tinyllava.tower_folder import deleted_layer, with_tower_config
from mindvlm.models.vary import names as vary
from mindvlm.models.vary import names_tiny as vary_tiny
from mindvlm.models.vary.tower_names import FAMILY
from mindvlm.weights.config_json import Config, named_types, shown_name
from mindvlm.weights.rules.consistency import require_consistent_sizes
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.layered import FirstRows
from mindvlm.weights.rules.naming import Fit, best_fit, choose_table, require_size_of_model, targets_of, total_fit
from mindvlm.weights.rules.plan import Plan
from mindvlm.weights.rules.table import RuleTable

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class ConvertibleModel:
    """What converting a model takes.

    Attributes:
        name: what it is called on the command line.
        family: the family of `mindvlm.families` that it belongs to.
        tables: the namings that are understood, the native one first.
        hf: the names of its published files.
        hf_tables: `hf` and the namings of published files with parts of it: those that a way back may lead to.
        model_types: what config.json calls it, as `model_type` or among the `architectures`.
        target_infos: folder of the weights -> its native tensors, or None if no config.json there describes it.
        released_infos: the native tensors of the released weights.
        released_config: the config.json of the released weights.
        example_infos: the native tensors of an example whose numbers all differ, see consistency.py.
        whole_config: a config.json and its folder -> the same with what stands in other files.
        row_tables: native tensors of which a model may take the first rows alone: a vocabulary that is longer than
            the tokenizer.
        left_out: native tensors of a model -> what a part that is laid over it may have and it has not, as
            `RuleTable.plan` takes it.
        config_naming: a config.json -> the name of the table of files that it lies beside, or None for that of `hf`.
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
    whole_config: Callable[[Config, Path], Config] = lambda config, folder: config
    row_tables: tuple[str, ...] = ()
    left_out: Callable[[Infos], dict[str, str]] = lambda infos: {}
    config_naming: Callable[[Config], str | None] = lambda config: None

    @property
    def native(self) -> RuleTable:
        """The table of the names used in this library."""
        return self.tables[0]

    def hf_tables_for(self, infos: Infos) -> list[RuleTable]:
        """Return the namings of published files that have a name for each of these native tensors, else `hf`."""
        return [table for table in self.hf_tables if all(map(table.part_of, infos))] or [self.hf]

    def detect_table(self, infos: Infos, origin: str = "the checkpoint") -> RuleTable:
        """Return the table whose names the tensors bear; see `choose_table` for the errors."""
        return choose_table(self.tables, infos, model=self.name, origin=origin)

    def require_own_names(self, table: RuleTable, infos: Infos, origin: str = "the checkpoint") -> None:
        """Raise UserError if `table` takes the vision vocabulary out of another model, and there is more of that."""
        if table.hands_over and any(not targets_of(table, name) for name in infos):
            raise UserError(
                f"{origin}: holds a model with the names of {table.name}, of which {self.name} takes only the vision "
                f"vocabulary; give weights of {self.name}, or convert it as what it is or with --only vision_vocabulary"
            )

    def require_consistent_sizes(
        self,
        plan: Plan,
        origin: str = "the checkpoint",
        *,
        sources_of: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        """Check the tensors that a plan leads to against each other; see consistency.py for arguments and errors."""
        require_consistent_sizes(plan, self.native, self.example_infos(), origin=origin, sources_of=sources_of)


MODELS = {
    model.name: model
    for model in (
        ConvertibleModel(
            name=vary.NAME,
            family=FAMILY,
            tables=vary.TABLES,
            hf=vary.HF,
            hf_tables=vary.HF_TABLES,
            model_types=vary.MODEL_TYPES,
            target_infos=vary.infos_of_config,
            released_infos=vary.released_infos,
            released_config=vary_toy_config,
            example_infos=vary.example_infos,
        ),
        ConvertibleModel(
            name=vary_tiny.NAME,
            family=FAMILY,
            tables=vary_tiny.TABLES,
            hf=vary_tiny.HF,
            hf_tables=vary_tiny.HF_TABLES,
            model_types=vary_tiny.MODEL_TYPES,
            target_infos=vary_tiny.infos_of_config,
            released_infos=vary_tiny.released_infos,
            released_config=vary_tiny_config,
            example_infos=vary_tiny.example_infos,
        ),
        *(
            ConvertibleModel(
                name=kind.name,
                family=tinyllava_parts.FAMILY,
                tables=kind.tables,
                hf=kind.tables[1],
                hf_tables=kind.tables[1:],
                model_types=kind.model_types,
                target_infos=kind.infos_of_config,
                released_infos=kind.released_infos,
                released_config=kind.released_config,
                example_infos=kind.example_infos,
                whole_config=with_tower_config,
                row_tables=tinyllava.ROW_TABLES,
                left_out=deleted_layer,
                config_naming=tinyllava_parts.config_naming,
            )
            for kind in tinyllava.KINDS
        ),
    )
}


def detect_model(
    *sources: Infos,
    folder_config: Config | None = None,
    name: str | None = None,
    origin: str = "the checkpoint",
) -> ConvertibleModel:
    """Return the model that the tensors of all sources belong to, each of which may have names of its own.

    The tensor names decide. Where they leave a choice, as for a part that several models have: the model that
    config.json names; else those whose own names the tensors bear; else, if all lead to the same native tensors, the
    first that they are complete for; else the only one that they fit.

    Args:
        sources: the tensors of each.
        folder_config: the config.json beside them, if there is one.
        name: a key of `MODELS` that the user gave, which decides.
        origin: what to call the checkpoint in messages.

    Raises:
        UserError: no model, or more than one, is left; the message says for each why. Or `name` is none of them.
    """
    if name is not None:
        if name not in MODELS:
            raise UserError(f"--model {name!r} is unknown; expected one of: {', '.join(MODELS)}")
        return MODELS[name]
    return _recognise(tuple(MODELS.values()), sources, folder_config, origin)


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
            f"{origin}: is of no known model: {_reasons(fits, folder_config)}; {_first_unknown(models, sources)}"
        )
    candidates = _named(candidates, folder_config) or candidates
    candidates = [model for model in candidates if not fits[model].table.hands_over] or candidates
    if len(candidates) == 1:
        return candidates[0]
    failures = {model: _failure(tables[model], sources) for model in candidates}
    complete = [model for model in candidates if failures[model] is None]
    if _agree([tables[model] for model in candidates], sources):
        return (complete or candidates)[0]
    if len(complete) != 1:
        why = "; ".join(f"{model.name}: {failure or 'it fits'}" for model, failure in failures.items())
        raise UserError(f"{origin}: cannot tell which model it is ({why}); say it with --model")
    return complete[0]


def native_view(
    source: TensorSource,
    *,
    target_infos: Infos | None = None,
    family: str = FAMILY,
    partial: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> TensorSource:
    """Return the tensors of a checkpoint under native names, whichever of the known namings it has.

    Nothing is copied: tensors are read from `source` when asked for. See `RuleTable.plan` for `target_infos`, `partial`
    and `left_out`; with the first, the model is one that has such tensors, without them it is recognised. A vocabulary
    that is longer than they ask for is cut, where the model allows it.

    Raises:
        ConversionError: the tensors do not make up the model.
        UserError: an unknown family, not a checkpoint of it at all, or of another model that has a part in common.
    """
    models = _of_family(family)
    origin = str(source.path)
    meant = [model for model in models if target_infos and all(model.native.part_of(name) for name in target_infos)]
    if len(meant) > 1:
        meant = [model for model in meant if _failure([model.native], [target_infos]) is None] or meant
    model = meant[0] if len(meant) == 1 else _recognise(meant or models, [source.infos], None, origin)
    table = model.detect_table(source.infos, origin)
    model.require_own_names(table, source.infos, origin)
    wanted = {name: target_infos[name] for name in model.row_tables if target_infos and name in target_infos}
    source = FirstRows.of(
        source, {sources[0]: info for name, info in wanted.items() if (sources := table.sources_of(name))}
    )
    return table.plan(source.infos, target_infos, origin=origin, partial=partial, left_out=left_out).view(source)


def native_model(infos: Infos, family: str = FAMILY) -> ConvertibleModel:
    """Return the model whose native names the tensors of a whole model bear; of several the one that they complete.

    Raises:
        UserError: an unknown family, or no model of it or more than one is such.
    """
    meant = [model for model in _of_family(family) if all(model.native.part_of(name) for name in infos)]
    if len(meant) > 1:
        meant = [model for model in meant if _failure([model.native], [infos]) is None]
    if len(meant) != 1:
        raise UserError(f"the tensors are of {len(meant)} models of the family {family!r}; give those of a whole model")
    return meant[0]


def _of_family(family: str) -> list[ConvertibleModel]:
    models = [model for model in MODELS.values() if model.family == family]
    if not models:
        known = ", ".join(dict.fromkeys(model.family for model in MODELS.values()))
        raise UserError(f"unknown model family {family!r}; known: {known}")
    return models


def _named(models: Sequence[ConvertibleModel], config: Config | None) -> list[ConvertibleModel]:
    """Return those of `models` that a config names; by its architectures if they decide, else by `model_type`."""
    for name in named_types(config or {}):
        found = [model for model in models if name in model.model_types]
        if found:
            return found
    return []


def _agree(tables: Sequence[Sequence[RuleTable]], sources: Sequence[Infos]) -> bool:
    """Tell whether the tables of all models, one for each source, lead every tensor to the same targets."""
    return all(
        len({targets_of(of_model[index], name) for of_model in tables}) == 1
        for index, infos in enumerate(sources)
        for name in infos
    )


def _failure(tables: Sequence[RuleTable], sources: Sequence[Infos]) -> str | None:
    try:
        for table, infos in zip(tables, sources, strict=True):
            table.plan(infos)
    except ConversionError as error:
        return str(error)
    return None


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
    tables = [table for model in models for table in model.tables]
    names = (name for infos in sources for name in infos)
    first = next((name for name in names if not any(table.claims(name) for table in tables)), None)
    return f"the first unknown tensor is {first}" if first else "give a file that holds weights of one model"
