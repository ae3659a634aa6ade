"""A conversion from its sources to its files: recognised, planned, layered, merged, cast, written and proved.

Nothing here knows a tensor's name; the tables of a model do (models.py). Every stage is a view that reads from the one
below when it is asked, so memory does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mindvlm.checkpoint import CastSource, TensorInfo, TensorSource, check_ending, plan_target, write_checkpoint
from mindvlm.convert.companions import copy_companions
from mindvlm.convert.opened import ALIASES_KEY, METADATA_KEY, NAMING_KEY, Opened, open_native
from mindvlm.convert.parity import ParityReport, ParityRequest, compare_logits
from mindvlm.convert.plan import Plan
from mindvlm.convert.tensor_statistics import StatisticsTap, TensorStatistics
from mindvlm.convert.verify import Verified, verify_conversion
from mindvlm.errors import UserError

DTYPES = ("keep", "float32", "float16", "bfloat16")
NAMINGS = ("native", "hf")
PROOFS = ("tensors", "logits")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert, and how.

    Attributes:
        sources: files or folders, the base first; a later one overrides tensors of an earlier one.
        target: a `.safetensors` or `.ckpt` file, or a folder; None for MODEL.ckpt beside the base.
        model: a key of `MODELS`, or None to recognise it.
        dtype: "keep", or what floating-point tensors become.
        to: "native" names, or "hf" for the names, shapes and layout of the Hugging Face files.
        only: the key of the part to keep, or None for everything.
        merge_lora: folder of a PEFT adapter to merge into the weights.
        max_shard_size: bytes of the largest file, or None for one file.
        verify: None, "tensors", or "logits" (which includes "tensors").
        write: False proves an existing target instead of writing it.
        dry_run: stop before anything is written.
        statistics: take each tensor's norm and sum while it passes, for the report.
    """

    sources: tuple[Path, ...]
    target: Path | None = None
    model: str | None = None
    dtype: str = "keep"
    to: str = "native"
    only: str | None = None
    merge_lora: Path | None = None
    max_shard_size: int | None = None
    verify: str | None = None
    write: bool = True
    dry_run: bool = False
    statistics: bool = False

    def __post_init__(self) -> None:
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--to", self.to, NAMINGS)
        if self.verify:
            _check_choice("--verify", self.verify, PROOFS)
        if self.target is None and self.to == "hf":
            raise UserError("--to hf writes new weights; give a folder or a .safetensors with --mindspore_ckpt_path")
        if self.target is not None:
            check_ending(self.target)


@dataclass(frozen=True)
class Conversion:
    """What was done, or in a dry run would be.

    Attributes:
        request: what was asked for, with the target that was chosen.
        opened: the sources; closed, but their names, plans and origins stay.
        way_out: the plan from native to written names, None where nothing is renamed.
        infos: the written tensors.
        outputs: the files, none in a dry run.
        copied: files of the source that the written folder needs too, see companions.py.
        seconds: time the whole took.
        statistics: of each written tensor, where they were asked for.
        verified, parity: the proofs, where they were asked for.
    """

    request: Request
    opened: Opened
    way_out: Plan | None
    infos: Mapping[str, TensorInfo]
    outputs: tuple[Path, ...]
    copied: tuple[Path, ...]
    seconds: float
    statistics: Mapping[str, TensorStatistics]
    verified: Verified | None
    parity: ParityReport | None


def convert(request: Request, *, show_progress: bool = False, say: Callable[[str], None] | None = None) -> Conversion:
    """Convert checkpoints as `request` says; files appear when they are complete.

    Args:
        show_progress: draw progress bars on stderr.
        say: called with one line before each slow step of the comparison of logits.

    Raises:
        ConversionError: the tensors do not fit the model; nothing is written.
        UserError: unreadable source, unwritable target, values out of the dtype's range, failed proof. What was written
            but did not pass its proof is removed.
    """
    started = time.monotonic()
    with open_native(request.sources, model=request.model, merge_lora=request.merge_lora, only=request.only) as opened:
        if request.target is None:
            beside = opened.layers[0].checkpoint.path.with_name(f"{opened.model.name}.ckpt")
            request = dataclasses.replace(request, target=beside)
        config = _parity_config(opened) if request.verify == "logits" else None
        way_out = opened.way_back() if request.to == "hf" else None
        planned: TensorSource = way_out.view(opened.source) if way_out else opened.source
        cast_to = None if request.dtype == "keep" else request.dtype
        if cast_to:
            planned = CastSource(planned, cast_to)
        tap = StatisticsTap(planned) if request.statistics else None
        outputs: tuple[Path, ...] = ()
        if request.write:
            _check_target(request, opened, planned)
        if request.write and not request.dry_run:
            with _progress(planned, "writing", show_progress) as bar:
                outputs = write_checkpoint(
                    request.target,
                    tap or planned,
                    metadata=_metadata(request, opened),
                    progress=lambda _, size: bar.update(size),
                    max_shard_size=request.max_shard_size,
                )
        verified = parity = None
        if request.verify and not request.dry_run:
            try:
                with _progress(planned, "verifying", show_progress) as bar:
                    progress = lambda _, size: bar.update(size)  # noqa: E731
                    verified = verify_conversion(
                        opened, request.target, way_out=way_out, dtype=cast_to, progress=progress
                    )
                if config is not None:
                    parity = compare_logits(_parity_request(request, opened, config), progress=say)
                    if not parity.passed:
                        raise ParityFailure(parity, request.target)
            except (UserError, KeyboardInterrupt):
                for path in reversed(outputs):
                    path.unlink(missing_ok=True)
                raise
        copied: tuple[Path, ...] = ()
        if outputs and request.to == "hf" and request.target.is_dir():
            copied = copy_companions(opened.layers[0].checkpoint.path.parent, request.target)
    seconds = time.monotonic() - started
    statistics = tap.statistics if tap else {}
    return Conversion(request, opened, way_out, planned.infos, outputs, copied, seconds, statistics, verified, parity)


class ParityFailure(UserError):
    """The converted model computes something else than its source; `report` says where."""

    def __init__(self, report: ParityReport, target: Path):
        self.report = report
        super().__init__(f"{target}: --verify logits failed: {report.failure()}; convert again, or report the rule")


def _check_target(request: Request, opened: Opened, planned: TensorSource) -> None:
    """Raise UserError if the target would replace a source, or does not fit on the disk."""
    target = plan_target(request.target, planned.infos, max_shard_size=request.max_shard_size)
    touched = [file for file in (*target.files, *target.obsolete) if file.exists()]
    for source in (file for layer in opened.layers for file in layer.checkpoint.files):
        if any(file.samefile(source) for file in touched):
            raise UserError(f"{source}: is a source and would be replaced; give another --mindspore_ckpt_path")
    folder = target.folder
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    needed = sum(info.num_bytes for info in planned.infos.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{request.target}: needs {needed:,} bytes, the disk has {free:,} free; make room or choose another"
        )


def _metadata(request: Request, opened: Opened) -> dict[str, str]:
    """Text kept in the file: with native names what the way back needs, in the Hugging Face layout what was there."""
    if request.to == "hf":
        return opened.source_metadata
    kept = {"format": "ms", NAMING_KEY: opened.naming, METADATA_KEY: json.dumps(opened.source_metadata)}
    return kept | ({ALIASES_KEY: ",".join(opened.aliases)} if opened.aliases else {})


def _parity_config(opened: Opened) -> Mapping[str, Any]:
    if opened.config is not None:
        return opened.config
    released = opened.model.released_infos()
    if all(name in released and info.shape == released[name].shape for name, info in opened.source.infos.items()):
        return opened.model.released_config()
    raise UserError(f"{opened.source.path}: --verify logits needs the model's config.json; put it beside the weights")


def _parity_request(request: Request, opened: Opened, config: Mapping[str, Any]) -> ParityRequest:
    return ParityRequest(
        model=opened.model.name,
        source_paths=[str(path) for path in request.sources],
        target=str(request.target),
        config=dict(config),
        merge_lora=str(request.merge_lora) if request.merge_lora else None,
        only=request.only,
        dtype=request.dtype,
    )


def _check_choice(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{flag} {value!r} is unknown; expected one of: {', '.join(known)}")


def _progress(source: TensorSource, what: str, show: bool) -> tqdm:
    total = sum(info.num_bytes for info in source.infos.values())
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show, leave=False)
