"""The sources of a conversion, opened and brought to one model under native names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import Checkpoint, TensorInfo, TensorSource, open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.vary.tower_names import COMPUTED
from mindvlm.weights.buffers import pack_buffers
from mindvlm.weights.config_json import read_config
from mindvlm.weights.lora.adapter import Adapter, open_adapter
from mindvlm.weights.lora.applying import merge_adapter
from mindvlm.weights.recognise import ConvertibleModel, detect_model
from mindvlm.weights.rules.layered import LayeredSource, SelectedSource
from mindvlm.weights.rules.plan import Plan

NAMING_KEY, ALIASES_KEY = "mindvlm_naming", "mindvlm_aliases"
METADATA_KEY, BUFFERS_KEY = "mindvlm_source_metadata", "mindvlm_source_buffers"


@dataclass(frozen=True)
class Layer:
    """One source: the checkpoint, and the plan that gives its tensors native names."""

    checkpoint: Checkpoint
    plan: Plan


@dataclass(frozen=True)
class Opened:
    """All sources of a conversion as one model.

    Attributes:
        model: what it is.
        layers: the sources, the base first.
        source: the tensors under native names, an adapter merged in, restricted to a part if one was asked for.
        origins: native name -> index of the layer that gives it.
        modified: native names whose values an adapter changed, with the adapter's tensors that changed them.
        adapter: what was merged, if anything.
        sizes: what the shapes were checked against, in words.
        absent_parts: parts of the model of which nothing is there.
        config: the config.json beside the base, or None.
    """

    model: ConvertibleModel
    layers: tuple[Layer, ...]
    source: TensorSource
    origins: Mapping[str, int]
    modified: Mapping[str, Sequence[str]]
    adapter: Adapter | None
    sizes: str
    absent_parts: tuple[str, ...]
    config: Mapping[str, Any] | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that something is read from."""
        paths = [path for layer in self.layers for path in (layer.checkpoint.path, *layer.checkpoint.files)]
        return tuple(dict.fromkeys((*paths, *(self.adapter.files if self.adapter else ()))))

    @property
    def naming(self) -> str:
        """The naming that the way back leads to: what the base has, or had before it was converted to native names, or
        what goes with its config.json."""
        base = self.layers[0]
        if base.plan.table is self.model.native:
            described = self.model.config_naming(self.config or {})
            return base.checkpoint.metadata.get(NAMING_KEY) or described or self.model.hf.name
        return base.plan.table.name

    @property
    def aliases(self) -> tuple[str, ...]:
        """Second names of tied tensors that the base has, or had before it was converted to native names."""
        base = self.layers[0]
        if base.plan.table is not self.model.native:
            return base.plan.aliases
        if NAMING_KEY not in base.checkpoint.metadata:
            return self.model.hf.aliases
        return tuple(filter(None, base.checkpoint.metadata.get(ALIASES_KEY, "").split(",")))

    @property
    def source_metadata(self) -> dict[str, str]:
        """The text entries of the base, or those it had before it was converted to native names."""
        base = self.layers[0]
        if base.plan.table is not self.model.native:
            return dict(base.checkpoint.metadata)
        try:
            kept = json.loads(base.checkpoint.metadata.get(METADATA_KEY, "null"))
        except (ValueError, RecursionError):
            kept = None
        return {str(k): str(v) for k, v in kept.items()} if isinstance(kept, dict) else {"format": "pt"}

    @property
    def packed_buffers(self) -> str:
        """Small computed tensors of the base that are dropped here, as a text for the converted file."""
        base = self.layers[0]
        if base.plan.table is self.model.native:
            return base.checkpoint.metadata.get(BUFFERS_KEY, "")
        return pack_buffers(base.checkpoint, [n for n, reason in base.plan.dropped.items() if reason == COMPUTED])

    def default_target(self) -> Path:
        """MODEL.ckpt beside the base, for a folder beside its weights."""
        return self.layers[0].checkpoint.path.with_name(f"{self.model.name}.ckpt")

    def parity_config(self) -> Mapping[str, Any]:
        """The config.json that the reference is built from.

        Raises:
            UserError: none lies beside the base, and the sizes are not the released ones.
        """
        if self.config is not None:
            return self.model.whole_config(self.config, self.layers[0].checkpoint.path.parent)
        if _is_released(self.model, self.source.infos):
            return self.model.released_config()
        raise UserError(f"{self.source.path}: --verify logits needs the model's config.json; put it beside the weights")

    def way_back(self) -> Plan:
        """The plan from native names to those of the Hugging Face files: as the base had them, if it had such."""
        tables = self.model.hf_tables_for(self.source.infos)
        table = next((table for table in tables if table.name == self.naming), None)
        if table is None:
            table = tables[0]
        else:
            table = table.without([alias for alias in table.aliases if alias not in self.aliases])
        return table.reverse().plan(self.source.infos, partial=True, origin=str(self.source.path))


@contextlib.contextmanager
def open_native(
    paths: Sequence[str | Path],
    *,
    model: str | None = None,
    merge_lora: str | Path | None = None,
    only: str | None = None,
) -> Iterator[Opened]:
    """Open checkpoints, recognise their model, and lay them over each other under native names.

    Args:
        paths: files or folders, the base first; a later one overrides tensors of an earlier one.
        model: a key of `MODELS`, or None to recognise it from names and config.json.
        merge_lora: folder of a PEFT adapter, whose tensors bear native names or those of the Hugging Face files.
        only: the key of the part to keep.

    Raises:
        ConversionError: the tensors do not fit the model.
        UserError: a source is unreadable or of no known model, an adapter does not fit, the part is not there.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        folder = checkpoints[0].path.parent
        config = read_config(folder)
        origin = " + ".join(map(str, paths))
        found = detect_model(
            *(checkpoint.infos for checkpoint in checkpoints),
            folder_config=config,
            name=model,
            origin=origin,
        )
        target_infos = found.target_infos(folder)
        base = _layer(found, checkpoints[0], target_infos)
        left_out = found.left_out(target_infos or base.plan.infos)
        layers = (base, *(_layer(found, upper, target_infos, left_out) for upper in checkpoints[1:]))
        if only != "vision_vocabulary":
            found.require_own_names(layers[0].plan.table, checkpoints[0].infos, str(checkpoints[0].path))
        layered = LayeredSource([(str(layer.checkpoint.path), layer.plan.view(layer.checkpoint)) for layer in layers])
        if target_infos is None:
            whole = found.native.plan(layered.infos, partial=True)
            found.require_consistent_sizes(
                whole, origin, sources_of=lambda name: layers[layered.origins[name]].plan.sources_of(name)
            )
        source: TensorSource = layered
        modified: Mapping[str, Sequence[str]] = {}
        adapter = None
        if merge_lora:
            adapter = stack.enter_context(open_adapter(merge_lora))
            source, modified = merge_adapter(found, source, adapter)
        if only:
            source = SelectedSource(source, _names_of_part(found, source.infos, only))
        sizes = _sizes(found, source.infos, folder, target_infos is not None)
        absent = found.native.absent(source.infos)
        yield Opened(found, layers, source, layered.origins, modified, adapter, sizes, absent, config)


def _layer(
    model: ConvertibleModel,
    checkpoint: Checkpoint,
    target_infos: Mapping[str, TensorInfo] | None,
    left_out: Mapping[str, str] | None = None,
) -> Layer:
    origin = str(checkpoint.path)
    table = model.detect_table(checkpoint.infos, origin)
    plan = table.plan(checkpoint.infos, target_infos, partial=True, origin=origin, left_out=left_out)
    return Layer(checkpoint, plan)


def _is_released(model: ConvertibleModel, infos: Mapping[str, TensorInfo]) -> bool:
    released = model.released_infos()
    return all(name in released and info.shape == released[name].shape for name, info in infos.items())


def _sizes(model: ConvertibleModel, infos: Mapping[str, TensorInfo], folder: Path, described: bool) -> str:
    """What the shapes were checked against, in words."""
    config = folder / "config.json"
    if described:
        return f"those of {config}"
    if _is_released(model, infos):
        return f"those of the released {model.name}"
    why = f"{config} does not describe a {model.name}" if config.exists() else "no config.json lies beside the weights"
    return f"checked against each other only; they are not those of the released {model.name}, and {why}"


def _names_of_part(model: ConvertibleModel, infos: Mapping[str, TensorInfo], key: str) -> list[str]:
    names: dict[str, list[str]] = {part.key: [] for part in model.native.parts}
    if key not in names:
        raise UserError(f"--only {key!r} is no part of {model.name}; expected one of: {', '.join(names)}")
    for name in infos:
        names[model.native.part_of(name).key].append(name)
    if not names[key]:
        there = ", ".join(part for part, found in names.items() if found)
        raise UserError(f"--only {key}: the sources hold nothing of it; they hold: {there}")
    return names[key]
