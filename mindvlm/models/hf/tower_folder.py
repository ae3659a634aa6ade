"""Finds the config.json and the weights of a vision tower, which may be in a separate repository, and opens a
checkpoint with that tower."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo, TensorSource, holds_weights, open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.hf.towers import published_tower, tower_places
from mindvlm.weights.config_json import (
    TEXT,
    Config,
    ConfigTable,
    read_config,
    read_config_file,
    shown,
    without_nulls,
)
from mindvlm.weights.recognise import ConvertibleModel, native_model, native_view, tables_of
from mindvlm.weights.remedies import missing_connector_remedy
from mindvlm.weights.rules.findings import Finding
from mindvlm.weights.rules.overlaid import OverlaidSource, SelectedSource
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.wrappers import require_no_adapter, without_wrappers

Infos = Mapping[str, TensorInfo]

BESIDE = "vision_config.json"
_CONNECTORS = {"mm_projector", "connector", "_connector", "multi_modal_projector"}


def in_tower(name: str) -> bool:
    """Returns whether a tensor of a whole model belongs to the tower, in any naming."""
    return name.startswith(("vision_tower.", "model.vision_tower."))


def in_connector(name: str) -> bool:
    """Returns whether a tensor of a whole model belongs to the connector, in any naming."""
    return not _CONNECTORS.isdisjoint(name.split(".")[:4])


def tower_folders(folder: Path, name: str) -> list[Path]:
    """Returns the folders with a tower's name, relative to the weights and to the working directory."""
    # unlike Path.is_dir, this returns False for an invalid file name
    return [place for place in tower_places(folder, name) if os.path.isdir(place)]


def with_tower_config(config: Config, folder: Path) -> dict[str, Any]:
    """Returns the config.json in `folder` with the tower's config under `vision_config`, if a file describes the tower.

    Raises:
        UserError: a file is not a JSON object.
    """
    name = ConfigTable(without_nulls(config), str(folder / "config.json")).get("mm_vision_tower", TEXT)
    if "vision_config" in config or not name:
        return dict(config)
    tower = find_tower_config(folder, name)
    return dict(config) if tower is None else {**config, "vision_config": tower}


def find_tower_config(folder: Path, name: str) -> dict[str, Any] | None:
    """Returns the config.json of the tower `name`, or None if it is unknown.

    Uses the first of: vision_config.json beside the weights; the config.json in a folder of that name, relative to the
    weights or to the working directory; the published tower of that name.

    Raises:
        UserError: a file is not a JSON object.
    """
    beside = folder / BESIDE
    if beside.exists():
        return read_config_file(beside, remedy="repair it or move it away")
    for place in tower_folders(folder, name):
        if (config := read_config(place)) is not None:
            return config.get("vision_config", config)
    return published_tower(name)


def tower_config(table: ConfigTable, folder: Path, tower: str | Path | None) -> Config | None:
    """Returns the config.json of the tower, or None if the config.json of the checkpoint describes it.

    Args:
        table: config.json of the checkpoint.
        folder: folder of the checkpoint.
        tower: the user's folder or config.json of the tower.

    Raises:
        UserError: the file does not exist or is not a JSON object.
    """
    if tower is None:
        name = table.get("mm_vision_tower", TEXT)
        return find_tower_config(folder, name) if name and "vision_config" not in table else None
    path = Path(os.path.expanduser(tower))
    if not path.exists():
        raise UserError(f"vision_tower {path}: no such file or folder; give a tower's folder")
    if path.is_file() and path.suffix != ".json":
        raise UserError(f"vision_tower {path}: is not a folder; give the folder that contains it and a config.json")
    file = path / "config.json" if path.is_dir() else path
    described = read_config_file(file, remedy="give a tower's folder")
    # a whole model whose tower has a config.json elsewhere
    is_elsewhere = "vision_config" not in described and described.get("mm_vision_tower")
    return find_tower_config(file.parent, described["mm_vision_tower"]) if is_elsewhere else described


def tower_weights(table: ConfigTable, folder: Path, tower: str | Path | None) -> str | None:
    """Returns the folder of separate tower weights, or None if the checkpoint contains them; see `tower_config`.

    This is the user's folder or, for a checkpoint without a tower, the folder that its config.json names.
    """
    if tower is not None:
        path = Path(os.path.expanduser(tower))
        return str(path) if path.is_dir() and holds_weights(path) else None
    name = table.get("mm_vision_tower", TEXT)
    places = [place for place in tower_folders(folder, name) if holds_weights(place)] if name else []
    if not places or not holds_weights(folder):
        return None
    with open_checkpoint(folder) as checkpoint:
        return None if any(map(in_tower, checkpoint.infos)) else str(places[0])


def missing_tower(weights: Path) -> UserError:
    """Returns the error for weights without a tower: the tower that config.json names, and where it was searched."""
    folder = weights if weights.is_dir() else weights.parent
    name = (read_config(folder) or {}).get("mm_vision_tower")
    searched = ""
    if isinstance(name, str) and name:
        places = " and ".join(map(str, tower_places(folder, name)))
        searched = f"; config.json names {shown(name)}, searched as {places}"
    return UserError(
        f"{weights}: holds no vision tower{searched}; give the folder of the tower's weights as vision_tower "
        "(--vision_tower)"
    )


def view_with_tower(
    source: TensorSource,
    models: Sequence[ConvertibleModel],
    *,
    target_infos: Infos | None = None,
    vision_tower: TensorSource | None = None,
) -> TensorSource:
    """Returns the tensors of a checkpoint under native names; see `native_view`.

    Args:
        source: the checkpoint.
        models: the models of the family.
        target_infos: the tensors of the model.
        vision_tower: a checkpoint of the tower, of a whole CLIP or SigLIP as openai and google publish them, or of
            another model of the family. Its tower replaces the tower in `source`, without what the model leaves out.

    Raises:
        ConversionError: the tensors do not match the model.
        UserError: there is no tower or no connector, or `native_view` raises it.
    """
    source = without_wrappers(source, tables_of(models))
    wanted = target_infos or ()
    if 0 < sum(map(in_connector, wanted)) < len(wanted):
        connector = [name for name in source.infos if in_connector(name)]
        if not connector:
            raise UserError(f"{source.path}: holds no connector; {missing_connector_remedy(source.path)}")
        _require_more_than_connector(source)
    if vision_tower is None:
        if any(map(in_tower, wanted)) and not any(map(in_tower, source.infos)):
            raise missing_tower(source.path)
        left_out = _left_out(target_infos, models) if target_infos else None
        return native_view(source, models, target_infos=target_infos, left_out=left_out)
    if target_infos is None:
        raise ValueError("a separate tower requires target_infos")
    model = native_model(target_infos, models)
    rest = SelectedSource(source, [name for name in source.infos if not in_tower(name)])
    lower = native_view(rest, models, target_infos=target_infos, partial=True)
    tower = _tower_of(native_view(vision_tower, models, left_out=_left_out(target_infos, models)))
    whole = OverlaidSource([(str(source.path), lower), (str(vision_tower.path), tower)])
    origin = f"{source.path} with {vision_tower.path}"
    return make_plan(model.native, whole.infos, target_infos, origin=origin).view(whole)


def require_model(folder: Path) -> None:
    """Raises UserError if a folder holds an adapter or a connector, as a training saves them, and not a model."""
    if holds_weights(folder):
        with open_checkpoint(folder) as checkpoint:
            require_no_adapter(checkpoint)
            _require_more_than_connector(checkpoint)


def _require_more_than_connector(source: TensorSource) -> None:
    if all(map(in_connector, source.infos)):
        raise UserError(
            f"{source.path}: holds only the connector; join it with its decoder and tower: mindvlm-convert "
            f"--torch_ckpt_path DECODER TOWER {source.path} --to hf --mindspore_ckpt_path FOLDER"
        )


def _left_out(target_infos: Infos, models: Sequence[ConvertibleModel]) -> dict[str, str]:
    """Returns what a tower may have and the model lacks; see `ConvertibleModel.left_out`."""
    return next((model.left_out(target_infos) for model in models if model.left_out), {})


def _tower_of(native: TensorSource) -> TensorSource:
    """Returns the tensors of the tower among native ones."""
    names = [name for name in native.infos if in_tower(name)]
    if not names:
        raise UserError(f"{native.path}: holds no vision tower; give the folder of a tower as vision_tower")
    return SelectedSource(native, names)


def sizes_remedy(config: Any, findings: Iterable[Finding]) -> str:
    """Returns a remedy for a folder whose weights contradict the sizes in its config.json.

    Args:
        config: the run config, with `checkpoint` (the folder) and `vision_tower`.
        findings: the contradictions.
    """
    folder, tower = Path(config.checkpoint), config.vision_tower
    data = read_config(folder) or {}
    name, is_described = data.get("mm_vision_tower"), "vision_config" in data or (folder / BESIDE).exists()
    is_assumed = name and tower is None and not is_described and not tower_folders(folder, name)
    if is_assumed and any(in_tower(finding.name) for finding in findings):
        return (
            f"the tower {name} was assumed to be the published one; if it is not, put its config.json beside the "
            f"weights as {BESIDE}, or give its folder as vision_tower"
        )
    return f"correct the sizes in {folder}/config.json, or use the weights that match it"
