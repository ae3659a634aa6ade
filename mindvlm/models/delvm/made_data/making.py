"""Makes the pictures and codes of tasks: options, resuming, and the lines that say what was made."""

import argparse
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindvlm.checkpoint.atomic import atomic_file
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.items import Group, Item, encode_in_order, load_in_order
from mindvlm.models.delvm.made_data.outputs import CodeFile, PictureFolder, keep_description

if TYPE_CHECKING:
    from mindvlm.models.delvm.picture_codes import PictureEncoder

Progress = Callable[[int, int], None]
SIZES = 16, 4096
SKIPPED = "skipped.txt"


def add_vqgan(parser: argparse.ArgumentParser, unit: str, per_line: int) -> None:
    """Adds `--vqgan`, the number of groups in a sentence, `--UNIT_per_line`, and for pairs `--targets`."""
    parser.add_argument(
        "--vqgan", type=os.path.expanduser, metavar="FOLDER", help=f"write the {unit} as codes of this VQGAN"
    )
    parser.add_argument(
        f"--{unit}_per_line",
        type=int,
        default=per_line,
        metavar="N",
        help=f"in a sentence of codes (default {per_line})",
    )
    if unit == "pairs":
        parser.add_argument(
            "--targets",
            choices=["all", "labels"],
            default="all",
            help="codes that a decoder learns to predict: all, or those of the labels alone (default all)",
        )


def check_range(arguments: argparse.Namespace, name: str, least: int, most: int) -> None:
    """Raises UserError if an option is out of range."""
    value = getattr(arguments, name)
    if not least <= value <= most:
        raise UserError(f"--{name} is {value}; expected {least} to {most}")


def open_encoder(arguments: argparse.Namespace) -> "PictureEncoder | None":
    """Returns the encoder of `--vqgan`, if given. Raises UserError if it cannot be used."""
    if not arguments.vqgan:
        return None
    # imported here: it imports MindSpore
    from mindvlm.models.delvm.picture_codes import PictureEncoder

    return PictureEncoder(Path(arguments.vqgan))


class Maker:
    """Makes tasks in the folder `--output`.

    Args:
        arguments: the parsed options.
        description: the options that the pictures depend on; another run in the same folder must have the same.
        encoder: encodes the pictures; None writes no codes.
        unit: what `--UNIT_per_line` counts.
        noun: word for groups.
        groups_per_line: groups that are joined to a sentence of codes.
        keeps_pictures: whether the pictures are written as PNG files.

    Raises:
        UserError: the folder holds other data or cannot be written.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        description: dict,
        *,
        encoder: "PictureEncoder | None",
        unit: str,
        noun: str,
        groups_per_line: int,
        keeps_pictures: bool,
    ):
        self.folder, self.encoder, self.keeps_pictures = Path(arguments.output), encoder, keeps_pictures
        self.noun, self.groups_per_line = noun, groups_per_line
        self.only_labels = getattr(arguments, "targets", "all") == "labels"
        keep_description(self.folder, {"kind": arguments.kind, **description})
        if encoder:
            per_line = f"{unit}_per_line"
            by = {"vqgan": os.path.realpath(arguments.vqgan), per_line: getattr(arguments, per_line)}
            by |= {"targets": arguments.targets} if hasattr(arguments, "targets") else {}
            keep_description(self.folder / "vision", by)

    def make(self, tasks: Mapping[str, Sequence[Item]], progress: Progress) -> list[str]:
        """Makes the items that are missing. Returns the lines that say what was made and what was skipped.

        Raises:
            UserError: no item of a task can be used, or a file cannot be written.
        """
        total, done, num_new = sum(map(len, tasks.values())), 0, 0
        num_groups = sum(len(item.groups) for items in tasks.values() for item in items)
        skipped: dict[str, str] = {}
        for task, items in tasks.items():
            num_new += self._make_task(task, items, skipped, lambda count, done=done: progress(done + count, total))
            done += len(items)
        tasks_of = f" of {len(tasks)} tasks" if len(tasks) > 1 else ""
        lines = [f"made {num_new} of {num_groups} {self.noun}{tasks_of} in {self.folder}"]
        if self.encoder:
            lines.append(f"codes: {self.folder / 'vision'}")
        return lines + summary(skipped, self.folder / SKIPPED)

    def _make_task(
        self, task: str, items: Sequence[Item], skipped: dict[str, str], progress: Callable[[int], None]
    ) -> int:
        """Makes a task and adds the items that cannot be used to `skipped`. Returns the number of new groups."""
        pictures = PictureFolder(self.folder / task) if self.keeps_pictures else None
        codes = None
        if self.encoder:
            path = self.folder / "vision" / task / "train.bin"
            codes = CodeFile(path, self.encoder.vocab_size, self.encoder.num_codes)
        missing = [item for item in items if not all(output.has(item) for output in (pictures, codes) if output)]
        reasons: dict[str, str] = {}
        counter = itertools.count(len(items) - len(missing) + 1)

        def to_encode() -> Iterator[tuple[Item, Sequence[Group]]]:
            for item, groups in load_in_order(missing):
                if isinstance(groups, str):
                    reasons[f"{task}/{item.name}"] = groups
                elif pictures and not pictures.has(item):
                    pictures.add(item, groups)
                if codes and not codes.has(item) and not isinstance(groups, str):
                    yield item, groups
                else:
                    progress(next(counter))

        for item, rows in encode_in_order(to_encode(), self.encoder):
            codes.add(item, [without_targets(row) for row in rows] if self.only_labels else rows)
            progress(next(counter))
        skipped.update(reasons)
        write_skipped(skipped, self.folder / SKIPPED)
        if len(reasons) == len(items):
            raise UserError(f"{task}: no item can be used: {summary(reasons, self.folder / SKIPPED)[0]}")
        if codes:
            codes.finish(items, self.groups_per_line)
        return sum(len(item.groups) for item in missing if f"{task}/{item.name}" not in reasons)


def without_targets(codes: Sequence[int]) -> list[int]:
    """Returns the codes of a pair with those of the picture negative: they are read but are no targets."""
    half = len(codes) // 2
    return [-code for code in codes[:half]] + list(codes[half:])


def write_skipped(skipped: dict[str, str], path: Path) -> None:
    """Writes a line for each item that was skipped; removes the file if there are none."""
    if skipped:
        with atomic_file(path) as file:
            file.write(
                "".join(f"{name}: {reason}\n" for name, reason in skipped.items()).encode(errors="surrogateescape")
            )
    else:
        path.unlink(missing_ok=True)


def summary(skipped: dict[str, str], path: Path) -> list[str]:
    """Returns a line for each reason, the most frequent one first."""
    counts = Counter(skipped.values())
    first = {reason: name for name, reason in reversed(skipped.items())}
    return [
        f"skipped {count}: {reason} (the first is {first[reason]}; {path} lists all)"
        for reason, count in counts.most_common()
    ]
