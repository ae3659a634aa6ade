"""Publishes the files of a conversion: all of them, when all are complete and proved, or none."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindvlm.checkpoint import PendingFiles, Target, TensorSource, check_target
from mindvlm.checkpoint.atomic import existing_folder, output_folder
from mindvlm.core.errors import UserError


@dataclass(frozen=True)
class Output:
    """A file of the result: its final path, and where it was made."""

    path: Path
    made: Path


def publish(outputs: Sequence[Output], target: Target) -> None:
    """Moves the files to their paths, all or none, and removes those of an earlier conversion to the same target.

    Raises:
        UserError: a file cannot be written; then nothing has changed.
    """
    if not outputs:
        return
    with output_folder(target.folder, target.folder):
        target.folder.mkdir(exist_ok=True)
        with PendingFiles() as files:
            for output in outputs:
                files.adopt(output.path, output.made)
            files.remove(target.obsolete)


def check_place(target: Target, planned: TensorSource, *, sources: Iterable[Path]) -> None:
    """Raises UserError if the files of `target` would replace a source, cannot be written, or need too much space."""
    check_target(target)
    touched = [file for file in (*target.files, *target.obsolete) if file.exists()]
    for source in sources:
        if any(file.samefile(source) for file in touched):
            raise UserError(f"{source}: is a source and would be replaced; give another --mindspore_ckpt_path")
    needed = sum(info.num_bytes for info in planned.infos.values())
    free = shutil.disk_usage(existing_folder(target.folder)).free
    if needed > free:
        raise UserError(
            f"{target.files[-1]}: needs {needed:,} bytes, the disk has {free:,} free; make room or choose another"
        )
