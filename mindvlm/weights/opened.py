"""Opened sources of a conversion, combined into one model under native names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import Checkpoint, TensorInfo, TensorSource, open_checkpoint
from mindvlm.checkpoint.opening import PART_FOLDERS
from mindvlm.core.errors import UserError
from mindvlm.weights.buffers import COMPUTED, pack_buffers
from mindvlm.weights.config_json import read_config
from mindvlm.weights.foreign import require_plain_weights, require_unquantized
from mindvlm.weights.lora.adapter import Adapter, chosen_adapter, open_adapter
from mindvlm.weights.lora.merging import held_adapters, merge_adapter
from mindvlm.weights.recognise import ConvertibleModel, Formed, detect_model, tables_of
from mindvlm.weights.remedies import connector_remedy
from mindvlm.weights.rules.findings import ConversionError, Finding
from mindvlm.weights.rules.overlaid import OverlaidSource, SelectedSource
from mindvlm.weights.rules.plan import Plan
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import CONNECTORS
from mindvlm.weights.wrappers import PlainNames, without_wrappers

NAMING_KEY, ALIASES_KEY = "mindvlm_naming", "mindvlm_aliases"
METADATA_KEY, BUFFERS_KEY = "mindvlm_source_metadata", "mindvlm_source_buffers"


@dataclass(frozen=True)
class Input:
    """One source.

    Attributes:
        checkpoint: the files.
        tensors: their tensors, under names without the prefixes of wrappers.
        plan: maps these to native names.
    """

    checkpoint: Checkpoint
    tensors: TensorSource
    plan: Plan

    @property
    def wrappers(self) -> tuple[str, ...]:
        """The prefixes that were removed."""
        return self.tensors.wrappers if isinstance(self.tensors, PlainNames) else ()

    @property
    def nonfinite(self) -> list[str]:
        """Names of used tensors in which NaN or infinity was read so far."""
        stored = self.tensors.names if isinstance(self.tensors, PlainNames) else {}
        found = self.checkpoint.nonfinite
        return sorted(
            name for name in self.tensors.infos if stored.get(name, name) in found and self.plan.targets_of(name)
        )


@dataclass(frozen=True)
class Opened:
    """All sources of a conversion as one model.

    Attributes:
        model: the recognized model.
        inputs: the sources, the base first; later ones override earlier ones.
        source: tensors under native names, with a merged adapter, restricted to the selected part.
        origins: index of the input of each native name.
        modified: the adapter's tensors for each native name that they changed.
        adapter: the merged adapter, or None.
        sizes: description of the sizes that the shapes were checked against.
        absent_parts: parts of the model without any tensor.
        undescribed_parts: parts that have tensors but that the config.json in `described_in` does not describe.
        config: the config.json beside the base, or None.
        described_in: the folder whose config.json describes most of the model, see `_description`.
    """

    model: ConvertibleModel
    inputs: tuple[Input, ...]
    source: TensorSource
    origins: Mapping[str, int]
    modified: Mapping[str, Sequence[str]]
    adapter: Adapter | None
    sizes: str
    absent_parts: tuple[str, ...]
    undescribed_parts: tuple[str, ...]
    config: Mapping[str, Any] | None
    described_in: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read."""
        paths = [path for one in self.inputs for path in (one.checkpoint.path, *one.checkpoint.files)]
        return tuple(dict.fromkeys((*paths, *(self.adapter.files if self.adapter else ()))))

    @property
    def naming(self) -> str:
        """Name of the naming to convert back to.

        This is the naming of the base, the one before its conversion to native names, or that of its config.json.
        """
        base = self.inputs[0]
        if base.plan.table is self.model.native:
            described = self.model.config_naming and self.model.config_naming(self.config or {})
            return base.checkpoint.metadata.get(NAMING_KEY) or described or self.model.hf.name
        return base.plan.table.name

    @property
    def aliases(self) -> tuple[str, ...]:
        """Aliases of tied tensors in the base, or in its source if it was converted to native names."""
        base = self.inputs[0]
        if base.plan.table is not self.model.native:
            return base.plan.aliases
        if NAMING_KEY not in base.checkpoint.metadata:
            return self.model.hf.aliases
        return tuple(filter(None, base.checkpoint.metadata.get(ALIASES_KEY, "").split(",")))

    @property
    def source_metadata(self) -> dict[str, str]:
        """Metadata of the base, or of its source if it was converted to native names."""
        base = self.inputs[0]
        if base.plan.table is not self.model.native:
            return dict(base.checkpoint.metadata)
        try:
            kept = json.loads(base.checkpoint.metadata.get(METADATA_KEY, "null"))
        except (ValueError, RecursionError):
            kept = None
        return {str(k): str(v) for k, v in kept.items()} if isinstance(kept, dict) else {"format": "pt"}

    @property
    def packed_buffers(self) -> str:
        """Computed buffers of the base, which are dropped here, as text for the metadata of the converted file."""
        base = self.inputs[0]
        if base.plan.table is self.model.native:
            return base.checkpoint.metadata.get(BUFFERS_KEY, "")
        return pack_buffers(base.tensors, [n for n, reason in base.plan.dropped.items() if reason == COMPUTED])

    @property
    def held_adapters(self) -> tuple[str, ...]:
        """The digests of the adapters that the tensors hold, the merged one included."""
        merged = (self.adapter.digest(),) if self.adapter else ()
        return (*held_adapters(self.inputs[0].checkpoint.metadata), *merged)

    def default_target(self) -> Path:
        """Returns the path MODEL.ckpt beside the weights of the base."""
        return self.inputs[0].checkpoint.folder / f"{self.model.name}.ckpt"

    def parity_config(self) -> Mapping[str, Any]:
        """Returns the config.json for building the reference.

        Raises:
            UserError: there is no config.json beside the base, and the sizes are not the released ones.
        """
        if self.config is not None:
            folder, complete = self.inputs[0].checkpoint.folder, self.model.whole_config
            return complete(self.config, folder) if complete else self.config
        if _is_released(self.model, self.source.infos):
            return self.model.released_config()
        raise UserError(f"{self.source.path}: --verify logits needs the model's config.json; put it beside the weights")

    def in_form(self, name: str) -> tuple[Opened, Formed]:
        """Returns the model in a form of `ConvertibleModel.forms`, and its description.

        Raises:
            UserError: the tensors do not determine the form.
        """
        found = (self.config, *(read_config(one.checkpoint.folder) for one in self.inputs[1:]))
        formed = self.model.forms[name].make(self.source, [config for config in found if config is not None])
        origins = dict(self.origins) | dict.fromkeys(formed.computed, 0)
        absent = self.model.native.absent(formed.source.infos)
        return replace(self, source=formed.source, origins=origins, absent_parts=absent), formed

    def way_back(self, form: str = "") -> Plan:
        """Returns the plan from native names to those of a form, or to Hugging Face names, those of the base if it had
        such."""
        if form and (chosen := self.model.forms[form].table):
            return make_plan(chosen.reverse(), self.source.infos, partial=True, origin=str(self.source.path))
        tables = self.model.hf_tables_for(self.source.infos)
        table = next((table for table in tables if table.name == self.naming), None)
        if table is None:
            table = tables[0]
        else:
            table = table.without([alias for alias in table.aliases if alias not in self.aliases])
        return make_plan(table.reverse(), self.source.infos, partial=True, origin=str(self.source.path))


@contextlib.contextmanager
def open_native(
    paths: Sequence[str | Path],
    models: Sequence[ConvertibleModel],
    *,
    model: str | None = None,
    merge_lora: str | Path | None = None,
    only: str | None = None,
    require_finite: bool = False,
) -> Iterator[Opened]:
    """Opens checkpoints, recognizes their model and overlays them under native names.

    Args:
        paths: files or folders, the base first; later ones override tensors of earlier ones.
        models: candidate models.
        model: name of the model, or None to recognize it from tensor names and config.json.
        merge_lora: folder of a PEFT adapter with native or Hugging Face names.
        only: key of the part to keep; None for the whole model.
        require_finite: raise NonFiniteError when NaN or infinity is read from a checkpoint; an adapter always does.

    Raises:
        ConversionError: the tensors do not fit the model.
        UserError: a source is unreadable or of an unknown model, the adapter does not fit, or the part is missing.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path, require_finite=require_finite)) for path in paths]
        for checkpoint in checkpoints:
            require_plain_weights(checkpoint.infos, str(checkpoint.path))
            require_unquantized(checkpoint.infos, str(checkpoint.path))
        tables = tables_of(models)
        sources = [without_wrappers(checkpoint, tables) for checkpoint in checkpoints]
        config = read_config(checkpoints[0].folder)
        origin = " + ".join(map(str, paths))
        found = detect_model(
            models, *(source.infos for source in sources), folder_config=config, name=model, origin=origin
        )
        if config is None and found.other_config:
            config = found.other_config(checkpoints[0].folder)
        folder, target_infos = _description(found, checkpoints)
        base = _input(found, checkpoints[0], sources[0], target_infos)
        left_out = found.left_out(target_infos or base.plan.infos) if found.left_out else None
        uppers = zip(checkpoints[1:], sources[1:], strict=True)
        inputs = (base, *(_input(found, *upper, target_infos, left_out) for upper in uppers))
        table = inputs[0].plan.table
        if not only or only != table.takes_only:
            found.require_own_names(table, sources[0].infos, str(checkpoints[0].path))
        overlaid = _overlaid(found, inputs)
        parts = found.parts_of(target_infos or ())
        if not parts >= found.parts_of(overlaid.infos):
            whole = make_plan(found.native, overlaid.infos, partial=True)
            found.require_consistent_sizes(
                whole, origin, sources_of=lambda name: inputs[overlaid.origins[name]].plan.sources_of(name)
            )
        source: TensorSource = overlaid
        modified: Mapping[str, Sequence[str]] = {}
        adapter = None
        if merge_lora := chosen_adapter(checkpoints, merge_lora):
            adapter = stack.enter_context(open_adapter(merge_lora))
            source, modified = merge_adapter(found, source, adapter, held_adapters(checkpoints[0].metadata))
        if only:
            source = SelectedSource(source, _names_of_part(found, source.infos, only))
        others = tuple(sorted(found.parts_of(source.infos) - parts)) if parts else ()
        sizes = _sizes(found, source.infos, folder, parts, others)
        absent = found.native.absent(source.infos)
        yield Opened(found, inputs, source, overlaid.origins, modified, adapter, sizes, absent, others, config, folder)


def _description(
    model: ConvertibleModel, checkpoints: Sequence[Checkpoint]
) -> tuple[Path, Mapping[str, TensorInfo] | None]:
    """Returns the folder whose config.json describes the model, and the native tensors of it.

    This is the base's folder. If its config.json describes a part only, as that of a language model does, the folder
    above a sub-folder of a model in parts, or of a later source, comes first if its config.json describes more.
    """
    places = (checkpoint.folder for checkpoint in checkpoints)
    folders = list(dict.fromkeys(f for p in places for f in (p, p.absolute().parent)[: 1 + (p.name in PART_FOLDERS)]))
    base = model.target_infos(folders[0])
    if base is None:
        return folders[0], None
    described = [(folder, model.target_infos(folder) or {}) for folder in folders[1:]]
    return max([(folders[0], base), *described], key=lambda found: len(model.parts_of(found[1])))


def _input(
    model: ConvertibleModel,
    checkpoint: Checkpoint,
    tensors: TensorSource,
    target_infos: Mapping[str, TensorInfo] | None,
    left_out: Mapping[str, str] | None = None,
) -> Input:
    origin = str(checkpoint.path)
    table = model.detect_table(tensors.infos, origin)
    plan = model.plan(table, tensors.infos, target_infos, partial=True, origin=origin, left_out=left_out)
    return Input(checkpoint, tensors, plan)


def _overlaid(model: ConvertibleModel, inputs: Sequence[Input]) -> OverlaidSource:
    """Returns the sources under native names, laid over each other.

    Raises:
        ConversionError: a source replaces a part of the model, and tensors of that part in earlier sources stay.
    """
    native = model.native
    for index, one in enumerate(inputs):
        below = dict.fromkeys(name for lower in inputs[:index] for name in lower.plan.infos)
        left = native.rest_of_units(one.plan.infos, below)
        if left:
            findings = [Finding("missing", name, "would stay from the sources before") for name in left]
            is_other_type = model.parts_of(left) == {CONNECTORS} and any(name not in below for name in one.plan.infos)
            remedy = connector_remedy(native, one.plan.infos, below) if is_other_type else ""
            raise ConversionError(f"{one.checkpoint.path} replaces half of a part of the model", findings, remedy)
    return OverlaidSource([(str(one.checkpoint.path), one.plan.view(one.tensors)) for one in inputs])


def _is_released(model: ConvertibleModel, infos: Mapping[str, TensorInfo]) -> bool:
    released = model.released_infos()
    return all(name in released and info.shape == released[name].shape for name, info in infos.items())


def _sizes(
    model: ConvertibleModel,
    infos: Mapping[str, TensorInfo],
    folder: Path,
    parts: Collection[str],
    others: Collection[str],
) -> str:
    """Describes the sizes that the shapes were checked against; config.json has those of `parts` but not `others`."""
    config = folder / "config.json"
    if parts:
        return f"those of {config}" + (f"; {', '.join(others)} checked against the rest only" if others else "")
    if _is_released(model, infos):
        return f"those of the released {model.name}"
    why = f"{config} does not describe a {model.name}" if config.exists() else "no config.json lies beside the weights"
    return f"checked against each other only; they are not those of the released {model.name}, and {why}"


def _names_of_part(model: ConvertibleModel, infos: Mapping[str, TensorInfo], key: str) -> list[str]:
    names: dict[str, list[str]] = {part.key: [] for part in model.native.parts}
    if key not in names:
        raise UserError(f"--only {key!r} is not a part of {model.name}; expected one of: {', '.join(names)}")
    for name in infos:
        names[model.native.part_of(name).key].append(name)
    if not names[key]:
        there = ", ".join(part for part, found in names.items() if found)
        raise UserError(f"--only {key}: the sources have no tensor of this part; they have: {there}")
    return names[key]
