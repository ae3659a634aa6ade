"""An opened LoRA adapter of PEFT, and the files that belong to it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mindvlm.checkpoint import TensorInfo, TensorSource, holds_weights, open_checkpoint
from mindvlm.checkpoint.opening import find_weights, part_folders
from mindvlm.core.errors import UserError
from mindvlm.weights.foreign import require_values
from mindvlm.weights.lora.config import CONFIG_NAME, AdapterConfig, read_adapter_config
from mindvlm.weights.lora.keys import BiasShift, Draft, LowRank
from mindvlm.weights.rules.findings import ConversionError

T = TypeVar("T")
NUM_COMPARED = 64

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED_WHOLE = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_CONNECTORS = ("mm_projector.safetensors", "mm_projector.bin")
_PARTS = ("vision_tower", "connector")
_BASE_LAYER = re.compile(r"(^|\.)base_layer\.")


@dataclass(frozen=True)
class Adapter:
    """An opened adapter; `open_adapter` makes one. A context manager, closed by `close()`.

    Attributes:
        config: its settings.
        path: the folder, or the file of what was trained completely; for messages.
        checkpoint: its tensors.
        weights: the file of the tensors.
        low_rank, shifts, replaced: the changes, by the name of the changed tensor in the base model; the values of
            `replaced` are names in `checkpoint`.
        trained_whole: the replaced tensors in the files beside it, later files over earlier ones; their names may have
            other layouts.
    """

    config: AdapterConfig
    path: Path
    checkpoint: TensorSource
    weights: Path
    low_rank: Mapping[str, LowRank]
    shifts: Mapping[str, BiasShift]
    replaced: Mapping[str, str]
    trained_whole: tuple[Adapter, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights and the config."""
        return (self.weights, *(whole.weights for whole in self.trained_whole), self.config.path)

    @property
    def targets(self) -> Mapping[str, tuple[str, ...]]:
        """The changed tensors of the base model, each with the adapter's tensors that change it."""
        targets = {target: (key,) for target, key in self.replaced.items()}
        for target, shift in self.shifts.items():
            targets[target] = (*targets.get(target, ()), shift.key)
        for target, pair in self.low_rank.items():
            targets[target] = (*targets.get(target, ()), pair.key_a, pair.key_b)
        return targets

    def without_prefix(self, prefix: str) -> Adapter:
        """Returns the adapter of a base whose names lack `prefix`."""

        def renamed(changes: Mapping[str, T]) -> dict[str, T]:
            return {name.removeprefix(prefix): change for name, change in changes.items()}

        low_rank = [replace(pair, module=pair.module.removeprefix(prefix)) for pair in self.low_rank.values()]
        return replace(
            self,
            low_rank={pair.target: pair for pair in low_rank},
            shifts=renamed(self.shifts),
            replaced=renamed(self.replaced),
        )

    def digest(self) -> str:
        """Returns a digest of its settings and of some values of each tensor, which identifies the adapter."""
        digest = hashlib.sha256(f"{self.config.rank} {self.config.alpha}".encode())
        for key, info in sorted(self.checkpoint.infos.items()):
            digest.update(f"{key} {info.dtype} {info.shape}\n".encode())
            digest.update(self.checkpoint.read_range(key, 0, min(info.num_elements, NUM_COMPARED)).tobytes())
        return digest.hexdigest()[:16]

    def fits(self, infos: Mapping[str, TensorInfo]) -> bool:
        """Tells whether all tensors that it changes are in `infos`, whatever their shapes."""
        return all(target in infos for target in self.targets)

    def close(self) -> None:
        self.checkpoint.close()
        for whole in self.trained_whole:
            whole.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_adapter(path: str | Path) -> Adapter:
    """Opens a PEFT LoRA adapter by its folder or its weights file, with `adapter_config.json` beside the weights.

    A folder without an adapter but with one sub-folder that holds one stands for that. Parts that were trained
    completely belong to the adapter if they lie beside it or in the folder that was given: the files
    `non_lora_trainables` and `mm_projector`, and TinyLLaVA Factory's folders `connector` and `vision_tower` unless the
    whole model is there. Only headers and the config are read.

    Raises:
        UserError: a missing or damaged file, or an adapter of a kind that cannot be merged.
        ConversionError: keys of an unknown kind, a factor without its partner, or ranks that are not the config's.
    """
    path = Path(os.path.expanduser(path))
    weights = _find_weights(path)
    config = read_adapter_config(weights.parent / CONFIG_NAME)
    places = (weights.parent, path) if weights.name in _WEIGHTS else ()
    wholes = tuple(filter(None, (_open_trained_whole(file, config) for file in _trained_beside(places))))
    checkpoint = _open_weights(weights)
    draft = Draft(config, checkpoint.infos)
    draft.sort_keys()
    low_rank = draft.pairs()
    draft.check_saved_modules([name for whole in wholes for name in whole.replaced])
    if draft.findings:
        checkpoint.close()
        raise ConversionError(f"{weights} is not a complete LoRA adapter", draft.findings)
    return Adapter(config, weights.parent, checkpoint, weights, low_rank, draft.shifts, draft.replaced, wholes)


def chosen_adapter(sources: Sequence[TensorSource], given: str | Path | None) -> str | Path | None:
    """Returns the adapter to merge: the given one, or else the one in the folder of a base in sub-folders.

    TinyLLaVA Factory saves an adapter beside the parts of its base; both together are the trained model. The names of
    adapted tensors contain `base_layer`, so the adapter is also found from a part alone.

    Args:
        sources: the base and further sources.
        given: the user's adapter, or None.

    Raises:
        UserError: another adapter is given for such a base, an adapter with the whole model around it is given for
            another base, or a base whose names contain `base_layer` is without its adapter.
    """
    path = sources[0].path
    own = path if path.is_dir() and (path / CONFIG_NAME).is_file() else None
    if given is None and own is None:
        return _adapter_of_base_layers(sources)
    if own and given and not Path(given).resolve().is_relative_to(own.resolve()):
        raise UserError(
            f"{own}: holds an adapter of its own, and {given} is another; convert {own} first, which merges its own, "
            "and give the result"
        )
    if given and not own:
        folder = Path(os.path.expanduser(given))
        folder = folder.resolve() if folder.is_dir() else folder.parent.resolve()
        if part_folders(folder) and not any(one.path.resolve().is_relative_to(folder) for one in sources):
            raise UserError(
                f"{given}: holds the whole model that was trained, an adapter and {_listed(part_folders(folder))}; "
                f"give it without another base: mindvlm-convert --torch_ckpt_path {given}, or mindvlm-predict "
                f"--config_path {given}"
            )
    return given or own


def _adapter_of_base_layers(sources: Sequence[TensorSource]) -> Path | None:
    """Returns the folder of the adapter that tensors named `base_layer` belong to; None if there are no such tensors.

    Raises:
        UserError: it lies neither beside these tensors nor in the folder above.
    """
    for source in sources:
        name = next(filter(_BASE_LAYER.search, source.infos), None)
        if name is None:
            continue
        path = source.path.absolute()
        places = [*([path] if path.is_dir() else ()), *path.parents][:2]
        for place in places:
            if (place / CONFIG_NAME).is_file():
                return place
        raise UserError(
            f"{source.path}: the base of a LoRA adapter, without what was trained (tensor {name}), and no "
            f"{CONFIG_NAME} lies in {' or '.join(map(str, places))}; give the adapter's folder with --merge_lora or "
            "--adapter, or save the model after PEFT's merge_and_unload()"
        )
    return None


def _trained_beside(places: Sequence[Path]) -> Iterator[Path]:
    """Yields the files of what was trained completely, in the order in which they override each other."""
    if not any(map(part_folders, places)):
        folders = [place / part for part in _PARTS for place in places]
        yield from dict.fromkeys(
            find_weights(folder) for folder in folders if folder.is_dir() and holds_weights(folder)
        )
    for names in (_CONNECTORS, _TRAINED_WHOLE):
        files = [place / name for place in places for name in names if (place / name).is_file()]
        yield from files[:1]


def _open_trained_whole(file: Path, config: AdapterConfig) -> Adapter | None:
    checkpoint = _open_weights(file)
    if not checkpoint.infos:
        return None
    draft = Draft(config, checkpoint.infos, is_adapter=False)
    draft.sort_keys()
    if draft.findings:
        checkpoint.close()
        raise ConversionError(f"{file} does not hold parts that were trained completely", draft.findings)
    return Adapter(config, file, checkpoint, file, {}, {}, draft.replaced)


def _open_weights(file: Path) -> TensorSource:
    # LLaVA writes the second file also if there is nothing in it
    checkpoint = open_checkpoint(file, require_finite=True, may_be_empty=file.name in _TRAINED_WHOLE)
    require_values(checkpoint.infos, str(file))
    return checkpoint


def _find_weights(path: Path) -> Path:
    if path.name in (*_TRAINED_WHOLE, *_CONNECTORS):
        raise UserError(
            f"{path}: holds parts that were trained completely, not an adapter; give the folder of the adapter that it "
            "belongs to, or, if it has none, this file after the base's weights: mindvlm-convert --torch_ckpt_path "
            f"BASE {path}"
        )
    if path.is_file():
        if path.name == CONFIG_NAME:
            return _find_weights(path.parent)
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give the folder of a PEFT adapter")
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    inside = sorted({file.parent for name in _WEIGHTS for file in path.glob(f"*/{name}")})
    if len(inside) == 1:
        return _find_weights(inside[0])
    if inside:
        raise UserError(f"{path}: holds {len(inside)} adapters, in {_listed(inside)}; give the folder of one of them")
    raise UserError(f"{path}: holds no adapter; expected {' or '.join(_WEIGHTS)} with {CONFIG_NAME} beside it")


def _listed(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders[:3]) + (", ..." if len(folders) > 3 else "")
