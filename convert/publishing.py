"""How the files of a conversion appear: all of them, when all are complete and proved, or none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindvlm.checkpoint import PendingFiles, Target, TensorSource, check_target
from mindvlm.core.errors import UserError


@dataclass(frozen=True)
class Output:
    """A file of the result: its name, and where it lies until all are proved."""

    path: Path
    made: Path


def publish(outputs: Sequence[Output], target: Target) -> None:
    """Let the files appear, all or none; those of an earlier conversion to the same target go."""
    if not outputs:
        return
    made_folder = not target.folder.exists()
    try:
        target.folder.mkdir(exist_ok=True)
        with PendingFiles() as files:
            for output in outputs:
                files.adopt(output.path, output.made)
            files.remove(target.obsolete)
    except BaseException as error:
        if made_folder:
            with contextlib.suppress(OSError):
                target.folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{target.folder}: cannot be written ({error.strerror}); nothing was kept") from error
        raise


def check_place(target: Target, planned: TensorSource, *, sources: Iterable[Path]) -> None:
    """Raise UserError if the files of `target` would replace a source, cannot be written, or do not fit on the disk."""
    check_target(target)
    touched = [file for file in (*target.files, *target.obsolete) if file.exists()]
    for source in sources:
        if any(file.samefile(source) for file in touched):
            raise UserError(f"{source}: is a source and would be replaced; give another --mindspore_ckpt_path")
    folder = target.folder
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    needed = sum(info.num_bytes for info in planned.infos.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{target.files[-1]}: needs {needed:,} bytes, the disk has {free:,} free; make room or choose another"
        )
