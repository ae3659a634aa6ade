"""An adapter merged into a model under native names, whichever of the model's namings the adapter has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.models.vary.tower_names import FAMILY
from mindvlm.weights.lora.adapter import Adapter, open_adapter
from mindvlm.weights.lora.merging import MergedSource
from mindvlm.weights.recognise import ConvertibleModel, native_model


def merge_adapter(
    model: ConvertibleModel, source: TensorSource, adapter: Adapter
) -> tuple[TensorSource, Mapping[str, Sequence[str]]]:
    """Merge an adapter whose names are native, or those of one of the model's Hugging Face namings.

    Args:
        source: the tensors of the model, or of whole parts of it, under native names.

    Returns:
        The merged tensors under native names, and for each that is changed the adapter's tensors that change it.

    Raises:
        ConversionError: the adapter does not fit the shapes of the model.
        UserError: its names are of another model.
    """
    if adapter.fits(source.infos):
        merged = MergedSource(source, adapter)
        return merged, merged.merged
    for table in model.hf_tables:
        if any(not table.part_of(name) for name in source.infos):
            continue
        # A tied tensor has one name here: changed under one of two it would differ from itself.
        single = table.without(table.aliases)
        foreign = single.reverse().plan(source.infos, partial=True, origin=str(source.path)).view(source)
        if adapter.fits(foreign.infos):
            merged = MergedSource(foreign, adapter)
            plan = single.plan(merged.infos, partial=True, origin=str(source.path))
            modified: dict[str, list[str]] = {}
            for name, keys in merged.merged.items():
                for target in plan.targets_of(name):
                    modified.setdefault(target, []).extend(keys)
            return plan.view(merged), modified
    known = {name for table in model.tables for native in source.infos for name in table.sources_of(native)}
    stranger = next((name for name in adapter.targets if name not in known), next(iter(adapter.targets), None))
    raise UserError(
        f"{adapter.path}: changes tensors that {model.name} has under none of its names, the first is {stranger}; "
        f"give an adapter of this model"
    )


@contextlib.contextmanager
def adapted_view(source: TensorSource, folder: str | Path, *, family: str = FAMILY) -> Iterator[TensorSource]:
    """The tensors of a whole model under native names with an adapter merged in, in float32.

    Args:
        source: the tensors of the model.
        folder: of the adapter.

    Raises:
        ConversionError: the adapter does not fit the shapes of the model.
        UserError: it cannot be read, or its names are of another model.
    """
    with open_adapter(folder) as adapter:
        merged, _ = merge_adapter(native_model(source.infos, family), CastSource(source, "float32"), adapter)
        yield merged
