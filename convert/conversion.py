"""A conversion from its sources to its files: recognised, planned, merged, cast, written and proved.

Nothing here knows a tensor's name: the rule tables of a model do. Tensors are views that read from the view below on
demand, so memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindvlm.checkpoint import (
    CastSource,
    MemorySource,
    Target,
    TensorSource,
    bytes_bar,
    check_ending,
    plan_target,
    staging_folder,
    write_checkpoint,
)
from mindvlm.convert.calibration import measure_importance
from mindvlm.convert.parity.comparison import ParityReport, compare_logits
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.publishing import Output, check_place, publish
from mindvlm.convert.quantizing import (
    QUANTIZED_FROM_KEY,
    QuantizationPlan,
    QuantizedSource,
    VerifiedBlocks,
    plan_quantization,
    quantized_from,
    verify_quantized,
)
from mindvlm.convert.statistics import StatisticsTap, TensorStatistics
from mindvlm.convert.verify import Verified, verify_conversion
from mindvlm.core.errors import UserError
from mindvlm.core.weight_formats import parse_weights
from mindvlm.models.registry import convertible_models
from mindvlm.native.library import Library, open_library
from mindvlm.weights.buffers import unpack_buffers
from mindvlm.weights.companions import copy_companions
from mindvlm.weights.lora.merging import ADAPTERS_KEY
from mindvlm.weights.opened import ALIASES_KEY, BUFFERS_KEY, METADATA_KEY, NAMING_KEY, Opened, open_native
from mindvlm.weights.recognise import Formed
from mindvlm.weights.rules.overlaid import OverlaidSource
from mindvlm.weights.rules.plan import Plan

DTYPES = ("keep", "float32", "float16", "bfloat16")
NAMINGS = ("native", "hf", *sorted({name for model in convertible_models() for name in model.forms} - {"hf"}))
PROOFS = ("tensors", "logits")


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """The settings of a conversion.

    Attributes:
        sources: files or folders, the base first; a later one overrides tensors of an earlier one.
        target: a `.safetensors` or `.ckpt` file, or a folder; None for MODEL.ckpt beside the base.
        model: the name of a convertible model, or None to recognise it.
        dtype: "keep", or the dtype to cast floating-point tensors to.
        to: "native" names, "hf" for the names, shapes and layout of the Hugging Face files, or a form of the model.
        quant: formats of quantized weights, see `mindvlm.core.weight_formats`; None keeps the dtypes.
        calibrate: folder of pictures whose activations weigh the errors of `quant`.
        config_path: YAML or folder of the model, to run it for `calibrate`; None for the source.
        only: the key of the part to keep, None for everything.
        merge_lora: folder of a PEFT adapter to merge into the weights.
        max_shard_size: size limit of each file in bytes, None for one file.
        verify: None, "tensors", or "logits" (which includes "tensors").
        write: False verifies an existing target instead of writing it.
        dry_run: stop before anything is written.
        statistics: compute each tensor's norm and sum for the report while it is written.
    """

    sources: tuple[Path, ...]
    target: Path | None = None
    model: str | None = None
    dtype: str = "keep"
    to: str = "native"
    quant: str | None = None
    calibrate: Path | None = None
    config_path: Path | None = None
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
        if self.target is None and self.to != "native":
            raise UserError(
                f"--to {self.to} writes new weights; give a folder or a .safetensors with --mindspore_ckpt_path"
            )
        if self.target is not None:
            check_ending(self.target)
        if self.quant:
            self._check_quantization()
        elif self.calibrate:
            raise UserError("--calibrate weighs the errors of quantized weights; add --quant, or leave it out")

    def _check_quantization(self) -> None:
        parse_weights(self.quant, "--quant")
        if self.to != "native":
            raise UserError(f"--to {self.to} has no quantized weights; leave --to or --quant out")
        if self.dtype != "keep":
            raise UserError(
                f"--dtype {self.dtype} does not go with --quant, which keeps 16 bits where it does not quantize; leave "
                "--dtype out, or give PART=float32"
            )
        if self.verify == "logits":
            raise UserError(
                "--verify logits proves equal results, and those of quantized weights differ; use --verify tensors"
            )
        if self.target is not None and self.target.suffix in (".ckpt", ".bin", ".pt") and not self.target.is_dir():
            raise UserError(
                f"{self.target}: quantized weights are written as .safetensors; give such a name, or a folder"
            )


@dataclass(kw_only=True)
class Conversion:
    """A conversion; `convert` fills in the results as it proceeds.

    Attributes:
        request: with the target that was chosen.
        opened: the sources; closed at the end, but their names, plans and origins stay.
        way_out: the plan from native to written names, None where nothing is renamed.
        buffers: tensors that are written beside those of `way_out`.
        tensors: everything that is written, under the written names, in the written dtypes.
        target: the files to write.
        config: the config.json that both sides of the logits check are built from, None without that check.
        outputs: the files of tensors, none in a dry run.
        copied: files of the source that the written folder needs too, see `mindvlm.weights.companions`.
        seconds: duration of the conversion.
        statistics: of each written tensor, if requested.
        verified, parity: the proofs, if requested.
        failure: the first failed proof; then no file appears.
        quantization: the dtypes of quantized weights, or None.
        formed: the form whose tensors were computed, or None.
    """

    request: ConversionRequest
    opened: Opened
    way_out: Plan | None
    buffers: TensorSource | None
    tensors: TensorSource
    target: Target
    config: Mapping[str, Any] | None
    outputs: tuple[Output, ...] = ()
    copied: tuple[Output, ...] = ()
    seconds: float = 0.0
    statistics: Mapping[str, TensorStatistics] = field(default_factory=dict)
    quantization: QuantizationPlan | None = None
    verified: Verified | VerifiedBlocks | None = None
    parity: ParityReport | None = None
    failure: UserError | None = None
    formed: Formed | None = None


class ParityFailure(UserError):
    """The converted model computes something else than its source; `report` shows where."""

    def __init__(self, report: ParityReport, target: Path):
        self.report = report
        super().__init__(f"{target}: --verify logits failed: {report.failure()}; convert again, or report the rule")


def convert(
    request: ConversionRequest, *, show_progress: bool = False, record: Callable[[Conversion], None] | None = None
) -> Conversion:
    """Converts checkpoints as `request` says.

    Files are written and proved in a hidden folder beside the target; they appear together at the end, or not at all.

    Args:
        request: what to convert, and how.
        show_progress: draw progress bars on standard error.
        record: called when everything is decided and before the files appear, also if a proof failed.

    Raises:
        ConversionError: the tensors do not fit the model.
        UserError: unreadable source, unwritable target, values out of the dtype's range, failed proof.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            open_native(
                request.sources,
                convertible_models(),
                model=request.model,
                merge_lora=request.merge_lora,
                only=request.only,
            )
        )
        conversion = _prepare(request, opened)
        request = conversion.request
        place = request.target
        if request.write:
            check_place(conversion.target, conversion.tensors, sources=opened.files)
        if request.write and not request.dry_run:
            place = stack.enter_context(staging_folder(request.target)) / request.target.name
            _write(conversion, place, show_progress)
        if request.verify and not request.dry_run:
            _prove(conversion, place, show_progress)
        conversion.seconds = time.monotonic() - started
        if record:
            record(conversion)
        if conversion.failure:
            raise conversion.failure
        publish((*conversion.copied, *conversion.outputs), conversion.target)
    return conversion


def _prepare(request: ConversionRequest, opened: Opened) -> Conversion:
    """Chooses the target and stacks the views that the written tensors are read through."""
    if request.target is None:
        target = opened.default_target()
        if request.quant:
            target = target.with_name(f"{target.stem}-{re.sub(r'[^a-z0-9]+', '-', request.quant)}.safetensors")
        request = dataclasses.replace(request, target=target)
    config = opened.parity_config() if request.verify == "logits" else None
    formed, form = None, request.to if request.to in opened.model.forms else ""
    if request.to != "native" and request.to != "hf" and not form:
        raise UserError(f"--to {request.to!r} is no form of {opened.model.name}; expected native or hf")
    if form:
        opened, formed = opened.in_form(form)
    way_out = opened.way_back(form) if request.to != "native" else None
    tensors: TensorSource = way_out.view(opened.source) if way_out else opened.source
    # computed tensors that the base has, or had before it was converted to native names
    found = unpack_buffers(opened.packed_buffers) if way_out and not request.only else {}
    buffers = MemorySource(found) if found else None
    if buffers:
        tensors = OverlaidSource([("the weights", tensors), ("their buffers", buffers)])
    if request.dtype != "keep":
        tensors = CastSource(tensors, request.dtype)
    quantization = None
    if request.quant:
        quantization = plan_quantization(request.quant, tensors, reads=not request.dry_run)
        tensors = QuantizedSource(tensors, quantization, _library(), _importance(request))
    target = plan_target(request.target, tensors.infos, max_shard_size=request.max_shard_size)
    return Conversion(
        request=request,
        opened=opened,
        way_out=way_out,
        buffers=buffers,
        tensors=tensors,
        target=target,
        config=config,
        quantization=quantization,
        formed=formed,
    )


def _importance(request: ConversionRequest) -> Mapping[str, np.ndarray]:
    if not request.calibrate or request.dry_run:
        return {}
    if not request.config_path and request.sources[0].is_file():
        raise UserError(
            f"--calibrate runs the model, which {request.sources[0]} does not describe; add --config_path YAML"
        )
    return measure_importance(
        request.config_path or request.sources[0], request.sources, request.calibrate, merge_lora=request.merge_lora
    )


def _library() -> Library:
    library = open_library()
    if library is None:
        raise UserError("--quant needs the C++ kernels, which are off or cannot be built here; see MINDVLM_NATIVE")
    return library


def _write(conversion: Conversion, place: Path, show_progress: bool) -> None:
    """Writes the tensors to `place`, and the files that a model folder needs beside them."""
    request, opened, target = conversion.request, conversion.opened, conversion.target
    tap = StatisticsTap(conversion.tensors) if request.statistics else None
    with bytes_bar(conversion.tensors, "writing", show=show_progress) as bar:
        made = write_checkpoint(
            place,
            tap or conversion.tensors,
            metadata=_metadata(request, opened),
            progress=lambda _, size: bar.update(size),
            max_shard_size=request.max_shard_size,
        )
    conversion.outputs = tuple(map(Output, target.files, made))
    if tap:
        conversion.statistics = tap.statistics
    companions: dict[str, Path] = {}
    if target.whole_folder and _is_whole(opened, request.only):
        for folder in dict.fromkeys((opened.inputs[0].checkpoint.folder, opened.described_in)):
            # the config.json of a part would describe another model
            without = ("config.json",) if opened.undescribed_parts else ()
            copies = copy_companions(folder, place, opened.model.companions, without=without)
            companions.update((file.name, file) for file in copies)
        if conversion.formed:
            for name, content in conversion.formed.files.items():
                (place / name).write_bytes(content)
                companions[name] = place / name
        conversion.copied = tuple(Output(target.folder / name, file) for name, file in companions.items())


def _prove(conversion: Conversion, place: Path, show_progress: bool) -> None:
    """Compares the files at `place` with the sources: the tensors, then the logits if they were asked for."""
    request = conversion.request
    try:
        with bytes_bar(conversion.tensors, "verifying", show=show_progress) as bar:
            conversion.verified = _proof(conversion, place, bar.update)
        if conversion.config is not None:
            for one in conversion.opened.inputs:
                if one.nonfinite:
                    raise UserError(
                        f"{one.checkpoint.path}: tensor {one.nonfinite[0]} holds NaN or infinity; --verify logits has "
                        "nothing to compare, convert without it or give other weights"
                    )
            conversion.parity = compare_logits(_parity_request(conversion, place))
            if not conversion.parity.passed:
                raise ParityFailure(conversion.parity, request.target)
    except UserError as error:
        conversion.failure = error


def _proof(conversion: Conversion, place: Path, progress: Callable[[int], object]) -> Verified | VerifiedBlocks:
    request, opened = conversion.request, conversion.opened
    if conversion.quantization:
        return verify_quantized(opened.source, conversion.tensors, place, shown_as=request.target, progress=progress)
    return verify_conversion(
        opened,
        place,
        shown_as=request.target,
        way_out=conversion.way_out,
        buffers=conversion.buffers,
        dtype=None if request.dtype == "keep" else request.dtype,
        progress=progress,
    )


def _is_whole(opened: Opened, only: str | None) -> bool:
    """Whether the result holds all of the base, so that the files beside the base describe it."""
    return only is None or set(opened.inputs[0].plan.infos) <= set(opened.source.infos)


def _metadata(request: ConversionRequest, opened: Opened) -> dict[str, str]:
    """Returns the text entries of the file: those of the source for `--to hf`, else what the way back needs."""
    adapters = {ADAPTERS_KEY: ",".join(opened.held_adapters)} if opened.held_adapters else {}
    if request.quant:
        return {
            "format": "ms",
            QUANTIZED_FROM_KEY: quantized_from(opened, request.quant, is_calibrated=request.calibrate is not None),
        } | adapters
    if request.to != "native":
        return opened.source_metadata | adapters
    kept = {"format": "ms", NAMING_KEY: opened.naming, METADATA_KEY: json.dumps(opened.source_metadata)}
    optional = {ALIASES_KEY: ",".join(opened.aliases), BUFFERS_KEY: opened.packed_buffers}
    return kept | adapters | {key: text for key, text in optional.items() if text}


def _parity_request(conversion: Conversion, place: Path) -> ParityRequest:
    request, model = conversion.request, conversion.opened.model
    return ParityRequest(
        family=model.family,
        model=model.name,
        source_paths=[str(path) for path in request.sources],
        target=str(place),
        config=dict(conversion.config),
        merge_lora=str(request.merge_lora) if request.merge_lora else None,
        only=request.only,
        dtype=request.dtype,
    )


def _check_choice(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{flag} {value!r} is unknown; expected one of: {', '.join(known)}")
