"""What can be known of a run before anything heavy starts: the checks of `mindvlm-check`, in functions of their own.

Each takes a `Run`, notes in it what it found, and yields a status and a text for every line to show; a `UserError` says
that the check failed.
"""

import argparse
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.errors import UserError

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "FAILED", "skipped"
ROUND_TRIP_TEXT = "Provide the OCR results of this image. 写出这幅图中所有文字。 x² ≥ 3.5 €"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
MIB = 1024**2
Lines = Iterator[tuple[str, str]]


@dataclass
class Run:
    """What is known of a run so far; what a check could not find stays None, and so do those that need it.

    Attributes:
        config: the typed config.
        family: its family.
        checkpoint: the open weights file.
        tokenizer_file: whether all files of the tokenizer are there.
        processor: the family's processor.
        model_parameters: name and shape of every parameter of the model.
        weights: the checkpoint's tensors under native names.
        device: 'CPU' or 'Ascend'.
        dtype: name of the dtype that is computed in.
    """

    arguments: argparse.Namespace
    config: Any = None
    family: Any = None
    checkpoint: Any = None
    tokenizer_file: bool | None = None
    processor: Any = None
    model_parameters: dict[str, tuple[int, ...]] | None = None
    weights: Any = None
    device: str | None = None
    dtype: str | None = None


def check_config(run: Run) -> Lines:
    """Keys, types, ranges, and that the sections agree with each other."""
    from mindvlm.api import read_config, shipped_config_path
    from mindvlm.families import get_family

    path = run.arguments.config_path or shipped_config_path()
    config = read_config(path, {"device": run.arguments.device} if run.arguments.device else None)
    if config.model.language_model is None:
        raise UserError(f"config {path} has no model.language_model; add the section")
    run.config, run.family = config, get_family(config.family)
    yield OK, f"{config.name} of the family {config.family}, contexts up to {config.model.max_length} tokens"


def check_files(run: Run) -> Lines:
    """Weights and tokenizer files: there, readable, of a known kind, complete as far as headers tell."""
    from mindvlm.checkpoint import open_checkpoint

    try:
        if not run.config.checkpoint:
            raise UserError("the config names no checkpoint; set checkpoint to a file of weights")
        run.checkpoint = open_checkpoint(run.config.checkpoint)
        files = run.checkpoint.files
        size = sum(file.stat().st_size for file in files)
        shards = f" in {len(files)} files" if len(files) > 1 else ""
        yield OK, f"{run.checkpoint.path}: {len(run.checkpoint.infos)} tensors, {mib(size)}{shards}"
    except UserError as error:
        yield FAILED, str(error)
    for path in tokenizer_files(run.config.processor):
        yield OK, f"{path}: {check_tokenizer_file(path)} bytes"
    run.tokenizer_file = True


def tokenizer_files(processor_config) -> list[Path]:
    """The files that the processor's config names by its keys that end in `_file`; of a folder those of a tokenizer.

    Raises:
        UserError: a folder holds none.
    """
    names = [f.name for f in dataclasses.fields(processor_config) if f.name.endswith("_file")]
    files = []
    for path in [Path(value) for name in names if (value := getattr(processor_config, name))]:
        found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()] if path.is_dir() else [path]
        if not found:
            raise UserError(f"tokenizer folder {path}: holds none of {', '.join(TOKENIZER_FILES)}; copy them there")
        files += found
    return files


def check_tokenizer_file(path: Path) -> int:
    """The size of a file in bytes.

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
    """The tokenizer loads, gives text back, and knows the ids that the model was trained with."""
    processor = run.family.processor(run.config.processor)
    tokenizer, vocab_size = processor.tokenizer, run.config.model.language_model.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.language_model.vocab_size is {vocab_size}; "
            "use the tokenizer file that belongs to the model"
        )
    decoded = tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT))
    if decoded != ROUND_TRIP_TEXT:
        raise UserError(f"the tokenizer makes {decoded!r} of {ROUND_TRIP_TEXT!r}; use the file of the model")
    ids = image_token_ids(processor)
    check_image_token_ids(run, ids)
    run.processor = processor
    special = ", ".join(f"{token} {token_id}" for token, token_id in ids.items())
    yield OK, f"{tokenizer.vocab_size} ids, Chinese and English come back unchanged; {special}"


def image_token_ids(processor) -> dict[str, int]:
    """Ids of the marks around and in an image span."""
    span = processor.image_span
    return {token: processor.tokenizer.special_id(token) for token in (span.start, span.end, span.placeholder)}


def check_image_token_ids(run: Run, ids: dict[str, int]) -> None:
    """Compares with the config.json that lies beside the weights, if there is one.

    Raises:
        UserError: it cannot be read, or says another id.
    """
    if run.checkpoint is None:
        return
    path = run.checkpoint.path.with_name("config.json")
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again or move it away") from None
    for key, (token, token_id) in zip(("im_start_token", "im_end_token", "im_patch_token"), ids.items(), strict=True):
        expected = data.get(key, token_id) if isinstance(data, dict) else token_id
        if expected != token_id:
            raise UserError(
                f"{token} has the id {token_id} but {path} says {key} {expected!r}; check processor.special_tokens"
            )


def check_model(run: Run) -> Lines:
    """The Cells can be built. Parameters take no memory until they are filled."""
    from mindvlm.models.common.weights import parameter_shapes

    parameters = parameter_shapes(run.family.model(run.config.model))
    parts: dict[str, int] = {}
    for name, shape in parameters.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + math.prod(shape)
    run.model_parameters = parameters
    counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    yield OK, f"{sum(parts.values()):,} parameters: {counts}"


def check_weights(run: Run) -> Lines:
    """Names, shapes and kinds of numbers against the model, from headers alone."""
    from mindvlm.api import separate_parts
    from mindvlm.checkpoint import TensorInfo, open_checkpoint

    expected = {name: TensorInfo(name, "float32", shape) for name, shape in run.model_parameters.items()}
    parts = {key: open_checkpoint(path) for key, path in separate_parts(run.config).items()}
    run.weights = run.family.native_view(run.checkpoint, target_infos=expected, **parts)
    yield OK, f"names and shapes of all {len(expected)} tensors fit the model (values are not read)"


def check_device(run: Run) -> Lines:
    """The device can be had."""
    import mindspore as ms

    from mindvlm import runtime

    with warnings.catch_warnings():
        # what it warns of is the next check's line
        warnings.simplefilter("ignore")
        dtype = runtime.start(run.config)
    run.dtype = next(name for name, value in runtime.DTYPES.items() if value == dtype)
    run.device = ms.get_context("device_target")
    found = f"CPU with {os.cpu_count()} cores" if run.device == "CPU" else f"{run.device} NPU"
    yield OK, f"{found} (device: {run.config.device}), {run.config.mode} mode"


def check_dtype(run: Run) -> Lines:
    """What happens to the stored numbers on the way to the device."""
    from mindvlm.checkpoint.dtypes import item_size

    sizes: dict[str, int] = {}
    for info in run.weights.infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    stored = ", ".join(f"{dtype} ({mib(size)})" for dtype, size in sizes.items())
    text = f"stored {stored}, computed in {run.dtype}"
    if run.dtype != run.config.dtype:
        yield WARNING, f"{text} and not in {run.config.dtype}, for which the {run.device} backend has no fast kernels"
    elif run.dtype == "float16" and sizes.keys() - {"float16"}:
        yield WARNING, f"{text}: a value beyond 65504 will be refused while loading; dtype: bfloat16 takes it"
    elif any(item_size(dtype) > item_size(run.dtype) for dtype in sizes):
        yield OK, f"{text}: rounded while loading"
    else:
        yield OK, text if sizes.keys() == {run.dtype} else f"{text}: widened without loss"


def mib(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / MIB)} MiB"
