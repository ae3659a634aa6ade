"""Merges an adapter into a model: translates between the namings of the adapter and the model."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mindvlm.checkpoint import CastSource, TensorInfo, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.weights.lora.adapter import Adapter, open_adapter
from mindvlm.weights.lora.merged_source import MergedSource, merged_already
from mindvlm.weights.recognise import ConvertibleModel, native_model
from mindvlm.weights.remedies import connector_remedy
from mindvlm.weights.rules.findings import ConversionError, Finding
from mindvlm.weights.rules.naming import best_fit, targets_of
from mindvlm.weights.rules.overlaid import OverlaidSource, SelectedSource
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import CONNECTORS, RuleTable
from mindvlm.weights.wrappers import wrapper_prefix

ADAPTERS_KEY = "mindvlm_adapters"
"""The text entry of a converted file with the digests of the adapters that were merged into it."""


def held_adapters(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the digests of the adapters that were merged into a converted file, from its text entries."""
    return tuple(filter(None, metadata.get(ADAPTERS_KEY, "").split(",")))


def merge_adapter(
    model: ConvertibleModel, source: TensorSource, adapter: Adapter, held: Collection[str] = ()
) -> tuple[TensorSource, Mapping[str, Sequence[str]]]:
    """Merges an adapter whose names are native, or those of one of the model's Hugging Face namings.

    Args:
        model: the base.
        source: the tensors of the base, or of whole parts of it, under native names.
        adapter: the adapter. The tensors in its second file may have another naming.
        held: the digests of adapters that the base is known to hold.

    Returns:
        The merged tensors under native names, and for each changed one the adapter's tensors that change it.

    Raises:
        ConversionError: the adapter does not fit the shapes of the model, or replaces half of a module.
        UserError: its names are of another model, or the base holds it already.
    """
    if adapter.digest() in held:
        raise merged_already(source.path, adapter)
    merged, modified = source, {}
    beside: list[MergedSource] = []
    for one in (*adapter.trained_whole, adapter):
        merged, changed, base = _merged(model, merged, one, beside)
        beside.append(base)
        modified = {name: [*changed.get(name, ()), *modified.get(name, ())] for name in {**changed, **modified}}
    return merged, modified


def _merged(
    model: ConvertibleModel, source: TensorSource, adapter: Adapter, beside: Sequence[MergedSource]
) -> tuple[TensorSource, dict[str, list[str]], MergedSource]:
    """Merges one file of an adapter: translates the base to its naming, merges, and translates the changes back.

    Returns the merged tensors, the adapter's tensors for each changed one, and the base under the adapter's naming.
    """
    tables = (model.native, *model.hf_tables)
    adapter = adapter.without_prefix(wrapper_prefix(adapter.targets, tables))
    targets = {target: TensorInfo(target, "float32", ()) for target in adapter.targets}
    table = best_fit(tables, targets).table
    # a tied tensor has one name here: changed under only one of two names it would differ from itself
    table = table.without(table.aliases)
    known = [name for name in source.infos if table.part_of(name)]
    back = make_plan(table.reverse(), SelectedSource(source, known).infos, partial=True, origin=str(source.path))
    there = [name for target in targets for name in targets_of(table, target)]
    lacking = [name for name in there if name not in source.infos]
    if CONNECTORS in model.parts_of(lacking) & model.parts_of(source.infos):
        raise UserError(
            f"{adapter.path}: does not fit {source.path}; {connector_remedy(model.native, there, source.infos)}"
        )
    if not any(target in back.infos for target in targets):
        raise UserError(
            f"{adapter.path}: changes tensors that {model.name} has under none of its names, the first is "
            f"{next(iter(targets), None)}; give an adapter of this model, or name the file among the sources too if it "
            f"holds a part that {source.path} lacks"
        )
    base = MergedSource(back.view(source), adapter, beside)
    forward = make_plan(table, base.infos, partial=True, origin=str(source.path))
    modified: dict[str, list[str]] = {}
    for name, keys in base.merged.items():
        for target in forward.targets_of(name):
            modified.setdefault(target, []).extend(keys)
    replaced = {target for name in adapter.replaced for target in forward.targets_of(name)}
    if left := _left_behind(model.native, source.infos, replaced, modified):
        findings = [Finding("missing", name, "the rest of its module is replaced") for name in left]
        raise ConversionError(f"{adapter.path} replaces half of a module", findings)
    changes = SelectedSource(forward.view(base), list(modified))
    return OverlaidSource([(str(source.path), source), (str(adapter.path), changes)]), modified, base


def _left_behind(
    native: RuleTable, infos: Iterable[str], replaced: Collection[str], changed: Collection[str]
) -> list[str]:
    """Returns native tensors that stay although tensors of an adapter replace the rest of their module.

    A module is a Linear or norm, whose bias belongs to its weight, or a whole connector.

    Args:
        native: the table of native names.
        infos: the tensors of the model.
        replaced: those that the adapter replaces.
        changed: those that it changes in any way.
    """
    weights = {name.removesuffix(".weight") for name in replaced if name.endswith(".weight")}
    connectors = {
        native.unit_of(name)
        for name in replaced
        if not name.endswith(".bias") and native.part_of(name).key == CONNECTORS
    }
    return [
        name
        for name in infos
        if name not in changed
        and (native.unit_of(name) in connectors or name.endswith(".bias") and name.removesuffix(".bias") in weights)
    ]


@contextlib.contextmanager
def adapted_view(
    source: TensorSource, folder: str | Path, models: Sequence[ConvertibleModel], held: Collection[str] = ()
) -> Iterator[TensorSource]:
    """Yields the tensors of a whole model under native names with an adapter merged in.

    Tensors that the adapter changes are float32. The others are read from `source` as they are.

    Args:
        source: the tensors of the model.
        folder: of the adapter.
        models: the models that `source` may belong to.
        held: the digests of adapters that `source` is known to hold.

    Raises:
        ConversionError: the adapter does not fit the shapes of the model.
        UserError: it cannot be read, its names are of another model, or `source` holds it already.
    """
    with open_adapter(folder) as adapter:
        wide = CastSource(source, "float32")
        merged, modified = merge_adapter(native_model(source.infos, models), wide, adapter, held)
        yield OverlaidSource([(str(source.path), source), (str(adapter.path), SelectedSource(merged, list(modified)))])
