"""The checks of `mindvlm-check`, which run before anything heavy starts.

Each takes a `Run`, stores its results there, and yields a status and a text for every line to show. A `UserError` means
that the check failed.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.core.interruption import uninterrupted

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "FAILED", "skipped"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
ROUND_TRIP_TEXT = "Provide the OCR results of this image. 写出这幅图中所有文字。 x² ≥ 3.5 €"
MIB = 1024**2
Lines = Iterator[tuple[str, str]]


@dataclass
class Run:
    """The results of the checks so far. A failed check leaves its attributes None.

    Attributes:
        opened: closes the files at the end.
        config: the typed config of the model, or of a training job.
        model_config: that of the model that a training job trains.
        family: its family.
        checkpoint: the open weights file.
        parts: open weights files of separate parts, see `separate_parts`.
        tokenizer_file: True if all files of the tokenizer are present.
        processor: the family's processor.
        model: the built Cell, with unfilled weights.
        model_parameters: name and shape of every parameter of the model.
        weights: the checkpoint's tensors under native names.
        device: 'CPU' or 'Ascend'.
        dtype: name of the compute dtype.
        kernels: the native kernels; None without them, and on Ascend.
    """

    arguments: argparse.Namespace
    opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    config: Any = None
    model_config: Any = None
    family: Any = None
    checkpoint: Any = None
    parts: dict[str, Any] = field(default_factory=dict)
    tokenizer_file: bool | None = None
    processor: Any = None
    model: Any = None
    model_parameters: dict[str, tuple[int, ...]] | None = None
    weights: Any = None
    device: str | None = None
    dtype: str | None = None
    kernels: Any = None


def check_config(run: Run) -> Lines:
    """Checks keys, types, ranges, and that the sections agree with each other."""
    # MindSpore ends the process with a traceback when its import is interrupted
    with uninterrupted():
        from mindvlm.api import shipped_config_path
        from mindvlm.models.registry import get_family, separate_parts
        from mindvlm.models.run_config import read_config

    path = run.arguments.config_path or shipped_config_path()
    parts = {key: part for key in separate_parts() if (part := getattr(run.arguments, key))}
    overrides = {key: str(Path(part).resolve()) for key, part in parts.items()}
    overrides |= {key: value for key in ("device", "weights") if (value := getattr(run.arguments, key)) is not None}
    config = read_config(path, overrides)
    if config.model.language_model is None:
        raise UserError(f"config {path} has no model.language_model; add the section")
    run.config, run.family = config, get_family(config.family)
    yield OK, f"{config.name} of the family {config.family}, contexts up to {config.model.max_length} tokens"


def check_job(run: Run) -> Lines:
    """Checks the keys of a training job and of its model. Does not open data or weights."""
    with uninterrupted():
        from mindvlm.models.registry import get_family
        from mindvlm.training.building import read_model
        from mindvlm.training.job_file import parse_overrides, read_job

    config = read_job(run.arguments.config_path, parse_overrides(run.arguments.set)).config
    model = read_model(config)
    run.config, run.model_config, run.family = config, model, get_family(model.family)
    parallel = config.parallel
    layout = f"dp {parallel.dp} x tp {parallel.tp}, zero {parallel.zero}, {config.batch_size} rows a pass"
    lora = f", adapters of rank {config.lora.rank}" if config.lora else ""
    recompute = ", recompute" if config.recompute else ""
    yield OK, f"training job of {model.name} of the family {model.family}: {layout}{lora}{recompute}"


def check_files(run: Run) -> Lines:
    """Checks that weights and tokenizer files are present, readable, of a known kind, and complete by their headers."""
    from mindvlm.checkpoint import open_checkpoint
    from mindvlm.models.loading import open_config_checkpoint, separate_parts

    try:
        if not run.config.checkpoint:
            raise UserError("the config names no checkpoint; set checkpoint to a file of weights")
        checkpoint = run.opened.enter_context(open_config_checkpoint(run.config.checkpoint))
        yield OK, described(checkpoint)
        for key, path in separate_parts(run.config, run.family).items():
            run.parts[key] = run.opened.enter_context(open_checkpoint(path))
            yield OK, described(run.parts[key])
        run.checkpoint = checkpoint
    except UserError as error:
        yield FAILED, str(error)
    for path in tokenizer_files(run.config.processor):
        yield OK, f"{path}: {check_tokenizer_file(path)} bytes"
    run.tokenizer_file = True


def described(checkpoint) -> str:
    """Describes an open checkpoint in a few words."""
    files = checkpoint.files
    size = sum(file.stat().st_size for file in files)
    shards = f" in {len(files)} files" if len(files) > 1 else ""
    return f"{checkpoint.path}: {len(checkpoint.infos)} tensors, {mib(size)}{shards}"


def tokenizer_files(processor_config) -> list[Path]:
    """Returns the tokenizer files that the processor's config names: by its keys that end in `_file`, which may also be
    folders, and by `tokenizer`.

    Raises:
        UserError: a folder holds none.
    """
    from mindvlm.processing.text.tokenizer_files import find_tokenizer

    names = [f.name for f in dataclasses.fields(processor_config) if f.name.endswith("_file")]
    files = []
    for path in [Path(value) for name in names if (value := getattr(processor_config, name))]:
        found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()] if path.is_dir() else [path]
        if not found:
            raise UserError(f"tokenizer folder {path}: holds none of {', '.join(TOKENIZER_FILES)}; copy them there")
        files += found
    chosen = getattr(processor_config, "tokenizer", None)
    return [*files, find_tokenizer(Path(chosen))] if chosen else files


def check_tokenizer_file(path: Path) -> int:
    """Returns the size of a file in bytes.

    Raises:
        UserError: it is missing, unreadable, empty, or a Git LFS pointer.
    """
    if not path.exists():
        raise UserError(f"tokenizer file {path}: not found; copy it there or set its key in processor")
    if not path.is_file():
        raise UserError(f"tokenizer file {path}: not a regular file; give the path of a file or a folder")
    try:
        with open(path, "rb") as file:
            beginning = file.read(12)
    except OSError as error:
        raise UserError(f"tokenizer file {path}: cannot be read ({error.strerror}); check path and rights") from None
    if not beginning:
        raise UserError(f"tokenizer file {path}: empty; copy it again")
    if beginning == b"version http":
        raise UserError(f"tokenizer file {path}: a Git LFS pointer, not the file; run `git lfs pull` in its repository")
    return path.stat().st_size


def check_tokenizer(run: Run) -> Lines:
    """Checks that the tokenizer loads, decodes what it encodes, and has the ids that the model was trained with."""
    processor = run.family.processor(run.config.processor)
    if run.family.output != "text":
        yield OK, f"none: the model generates {run.family.output}"
        return
    tokenizer, vocab_size = processor.tokenizer, run.config.model.language_model.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.language_model.vocab_size is {vocab_size}; "
            "use the tokenizer file that belongs to the model"
        )
    decoded = tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT))
    if decoded != ROUND_TRIP_TEXT:
        raise UserError(f"the tokenizer decodes {ROUND_TRIP_TEXT!r} as {decoded!r}; use the file of the model")
    ids = {token: tokenizer.special_id(token) for token in processor.image_span.tokens}
    check_image_token_ids(run, processor.image_span, ids)
    run.processor = processor
    special = ", ".join(f"{token} {token_id}" for token, token_id in ids.items())
    yield OK, f"{tokenizer.vocab_size} ids, Chinese and English come back unchanged; {special}"


def check_image_token_ids(run: Run, span, ids: dict[str, int]) -> None:
    """Compares the ids with the config.json beside the weights, if there is one.

    Raises:
        UserError: it cannot be read, or has another id.
    """
    if run.checkpoint is None:
        return
    path = run.checkpoint.path.with_name("config.json")
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again or move it away") from None
    keys = {"im_start_token": span.start, "im_end_token": span.end, "im_patch_token": span.placeholder}
    for key, token in keys.items():
        token_id = ids.get(token)
        expected = data.get(key, token_id) if isinstance(data, dict) else token_id
        if expected != token_id:
            raise UserError(
                f"{token} has the id {token_id} but {path} has {key} {expected!r}; check processor.special_tokens"
            )


def check_model(run: Run) -> Lines:
    """Checks that the Cells can be built. Parameters take no memory until they are filled."""
    from mindvlm.models.loading import build_model
    from mindvlm.nn.parameters import parameter_shapes

    model, _ = build_model(run.family, run.config.model)
    parameters = parameter_shapes(model)
    parts: dict[str, int] = {}
    for name, shape in parameters.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + math.prod(shape)
    run.model, run.model_parameters = model, parameters
    counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    yield OK, f"{sum(parts.values()):,} parameters: {counts}"


def check_weights(run: Run) -> Lines:
    """Compares names, shapes and kinds of dtypes with the model, from headers alone."""
    from mindvlm.checkpoint import TensorInfo

    expected = {name: TensorInfo(name, "float32", shape) for name, shape in run.model_parameters.items()}
    run.weights = run.family.native_view(run.checkpoint, target_infos=expected, **run.parts)
    yield OK, f"names and shapes of all {len(expected)} tensors fit the model (values are not read)"
    if run.weights.recipe:
        yield check_cache(run)


def check_cache(run: Run) -> tuple[str, str]:
    """Returns whether converted weights are cached, and if not whether there is room for them."""
    from mindvlm.checkpoint.atomic import existing_folder
    from mindvlm.weights import cache as weights_cache

    sources = (run.checkpoint, *run.parts.values())
    files = list(dict.fromkeys(file for source in sources for file in (source.path, *source.files)))
    try:
        entry = weights_cache.entry_folder(*files)
        manifest = weights_cache.Manifest(files, run.weights.recipe)
        if weights_cache.is_made_as(entry, manifest):
            return OK, f"converted ones are kept in {entry}"
        room = shutil.disk_usage(existing_folder(entry.parent)).free
    except (UserError, OSError) as error:
        return WARNING, f"converted at every start, because they cannot be kept: {error}"
    needed = sum(info.num_bytes for info in run.weights.infos.values())
    text = f"the first start converts them and keeps them in {entry}: {mib(needed)}"
    if needed > room:
        return WARNING, f"{text}, but {mib(room)} are free there; make room or set MINDVLM_CACHE"
    return OK, text


def check_device(run: Run) -> Lines:
    """Checks that the device is available."""
    import mindspore as ms

    from mindvlm.core import runtime
    from mindvlm.native.library import open_library

    with warnings.catch_warnings():
        # the next check reports what this warns of
        warnings.simplefilter("ignore")
        context = runtime.start(run.config)
    run.dtype = next(name for name, value in runtime.DTYPES.items() if value == context.dtype)
    run.device = ms.get_context("device_target")
    found = f"{run.device} NPU"
    if run.device == "CPU":
        run.kernels = open_library()
        kernels = f"native kernels {run.kernels.instruction_set}" if run.kernels else "without native kernels"
        found = f"CPU with {os.cpu_count()} cores, {kernels}"
    yield OK, f"{found} (device: {run.config.device}), {run.config.mode} mode"


def check_dtype(run: Run) -> Lines:
    """Describes how the stored dtypes change on the way to the device."""
    from mindvlm.checkpoint.dtypes import block_size, item_size

    sizes: dict[str, int] = {}
    for info in run.weights.infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    stored = ", ".join(f"{dtype} ({mib(size)})" for dtype, size in sizes.items())
    text = f"stored {stored}, computed in {run.dtype}"
    if run.dtype != run.config.dtype:
        yield WARNING, f"{text} and not in {run.config.dtype}, for which the {run.device} backend has no fast kernels"
    elif run.dtype == "float16" and sizes.keys() - {"float16"}:
        yield WARNING, f"{text}: a value beyond 65504 will be refused while loading; dtype: bfloat16 accepts it"
    elif any(item_size(dtype) > item_size(run.dtype) * block_size(dtype) for dtype in sizes):
        yield OK, f"{text}: rounded while loading"
    else:
        yield OK, text if sizes.keys() == {run.dtype} else f"{text}: widened without loss"


def mib(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / MIB)} MiB"
