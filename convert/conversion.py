"""A conversion from its sources to its files: recognised, planned, layered, merged, cast, written and proved.

Nothing here knows a tensor's name; the tables of a model do (models.py). Every stage is a view that reads from the one
below when it is asked, so memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import (
    CastSource,
    MemorySource,
    TensorInfo,
    TensorSource,
    bytes_bar,
    check_ending,
    plan_target,
    staging_folder,
    write_checkpoint,
)
from mindvlm.convert.parity.comparison import ParityReport, ParityRequest, compare_logits
from mindvlm.convert.publishing import Output, check_place, publish
from mindvlm.convert.report.tensor_statistics import StatisticsTap, TensorStatistics
from mindvlm.convert.verify import Verified, verify_conversion
from mindvlm.core.errors import UserError
from mindvlm.weights.buffers import unpack_buffers
from mindvlm.weights.companions import copy_companions
from mindvlm.weights.opened import ALIASES_KEY, BUFFERS_KEY, METADATA_KEY, NAMING_KEY, Opened, open_native
from mindvlm.weights.rules.layered import LayeredSource
from mindvlm.weights.rules.plan import Plan

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
        outputs: the files of tensors, none in a dry run.
        copied: files of the source that the written folder needs too, see companions.py.
        seconds: time the whole took.
        statistics: of each written tensor, where they were asked for.
        verified, parity: the proofs, where they were asked for.
        failure: what the proofs found wrong; then no file appears.
    """

    request: Request
    opened: Opened
    way_out: Plan | None
    infos: Mapping[str, TensorInfo]
    outputs: tuple[Output, ...]
    copied: tuple[Output, ...]
    seconds: float
    statistics: Mapping[str, TensorStatistics]
    verified: Verified | None
    parity: ParityReport | None
    failure: str | None


class ParityFailure(UserError):
    """The converted model computes something else than its source; `report` says where."""

    def __init__(self, report: ParityReport, target: Path):
        self.report = report
        super().__init__(f"{target}: --verify logits failed: {report.failure()}; convert again, or report the rule")


def convert(
    request: Request,
    *,
    show_progress: bool = False,
    say: Callable[[str], None] | None = None,
    record: Callable[[Conversion], None] | None = None,
) -> Conversion:
    """Convert checkpoints as `request` says.

    Files are made and proved in a hidden folder beside the target; they appear together at the end, or not at all.

    Args:
        show_progress: draw progress bars on stderr.
        say: called with one line before each slow step of the comparison of logits.
        record: called when everything is decided and before the files appear, also if a proof failed.

    Raises:
        ConversionError: the tensors do not fit the model.
        UserError: unreadable source, unwritable target, values out of the dtype's range, failed proof.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            open_native(request.sources, model=request.model, merge_lora=request.merge_lora, only=request.only)
        )
        if request.target is None:
            request = dataclasses.replace(request, target=opened.default_target())
        config = opened.parity_config() if request.verify == "logits" else None
        back = opened.way_back() if request.to == "hf" else None
        planned: TensorSource = back.view(opened.source) if back else opened.source
        buffers = _restored_buffers(opened) if back and not request.only else None
        if buffers:
            planned = LayeredSource([("the weights", planned), ("their buffers", buffers)])
        if request.dtype != "keep":
            planned = CastSource(planned, request.dtype)
        tap = StatisticsTap(planned) if request.statistics else None
        target = plan_target(request.target, planned.infos, max_shard_size=request.max_shard_size)
        place, outputs, copied = request.target, (), ()
        if request.write:
            check_place(target, planned, sources=opened.files)
        if request.write and not request.dry_run:
            staging = stack.enter_context(staging_folder(request.target))
            place = staging / request.target.name
            with bytes_bar(planned, "writing", show=show_progress) as bar:
                made = write_checkpoint(
                    place,
                    tap or planned,
                    metadata=_metadata(request, opened),
                    progress=lambda _, size: bar.update(size),
                    max_shard_size=request.max_shard_size,
                )
            outputs = tuple(map(Output, target.files, made))
            if target.whole_folder and _is_whole(opened, request.only):
                companions = copy_companions(opened.layers[0].checkpoint.path.parent, place)
                copied = tuple(Output(target.folder / file.name, file) for file in companions)
        verified = parity = error = None
        if request.verify and not request.dry_run:
            try:
                with bytes_bar(planned, "verifying", show=show_progress) as bar:
                    verified = verify_conversion(
                        opened,
                        place,
                        shown_as=request.target,
                        way_out=back,
                        buffers=buffers,
                        dtype=None if request.dtype == "keep" else request.dtype,
                        progress=lambda _, size: bar.update(size),
                    )
                if config is not None:
                    parity = compare_logits(_parity_request(request, opened, place, config), progress=say)
                    if not parity.passed:
                        error = ParityFailure(parity, request.target)
            except UserError as failure:
                error = failure
        conversion = Conversion(
            request,
            opened,
            back,
            planned.infos,
            outputs,
            copied,
            time.monotonic() - started,
            tap.statistics if tap else {},
            verified,
            parity,
            str(error) if error else None,
        )
        if record:
            record(conversion)
        if error:
            raise error
        publish((*copied, *outputs), target)
    return conversion


def _is_whole(opened: Opened, only: str | None) -> bool:
    """Whether what is written is all of the base, so that the files beside that describe it."""
    return only is None or set(opened.layers[0].plan.infos) <= set(opened.source.infos)


def _metadata(request: Request, opened: Opened) -> dict[str, str]:
    """Text kept in the file: with native names what the way back needs, in the Hugging Face layout what was there."""
    if request.to == "hf":
        return opened.source_metadata
    kept = {"format": "ms", NAMING_KEY: opened.naming, METADATA_KEY: json.dumps(opened.source_metadata)}
    optional = {ALIASES_KEY: ",".join(opened.aliases), BUFFERS_KEY: opened.packed_buffers}
    return kept | {key: text for key, text in optional.items() if text}


def _restored_buffers(opened: Opened) -> MemorySource | None:
    """The small tensors that the base had, or had before it was converted to native names, beside the model's own."""
    found = unpack_buffers(opened.packed_buffers)
    return MemorySource(found) if found else None


def _parity_request(request: Request, opened: Opened, place: Path, config: Mapping[str, Any]) -> ParityRequest:
    return ParityRequest(
        model=opened.model.name,
        source_paths=[str(path) for path in request.sources],
        target=str(place),
        config=dict(config),
        merge_lora=str(request.merge_lora) if request.merge_lora else None,
        only=request.only,
        dtype=request.dtype,
    )


def _check_choice(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{flag} {value!r} is unknown; expected one of: {', '.join(known)}")
