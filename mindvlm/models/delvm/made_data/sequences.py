"""`delvm-video` and `delvm-pictures`: consecutive frames of clips, and independent pictures, without labels."""

import argparse
import io
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from PIL import Image

from mindvlm.models.delvm.made_data.alignment import WHOLE, Source
from mindvlm.models.delvm.made_data.downloads import Download, add_source, made_from
from mindvlm.models.delvm.made_data.files import Entry, find_entries, natural_order, open_picture
from mindvlm.models.delvm.made_data.items import Group
from mindvlm.processing.samples.public_data import Unusable

ANIMATION = ".gif"


def find_clips(arguments: argparse.Namespace) -> list[Source]:
    """Returns the lines of each clip: of a folder, its frames in natural order; of an animation, its own.

    The last line of a clip has the rest. A rest of one frame is left out.
    """
    folders: dict[str, list[Entry]] = defaultdict(list)
    found: list[Source] = []
    for entry in find_entries(arguments.source):
        if entry.suffix == ANIMATION:
            found += animation(entry, arguments.frames_per_line)
        elif entry.is_picture:
            folders[entry.name.rpartition("/")[0]].append(entry)
    for folder, entries in folders.items():
        entries.sort(key=lambda entry: natural_order(entry.name))
        clip = folder or os.path.basename(os.path.abspath(arguments.source[0]))
        found += lines_of(clip, len(entries), arguments.frames_per_line, partial(load_frames, entries))
    return sorted(found, key=lambda source: natural_order(source.name))


def lines_of(clip: str, num_frames: int, per_line: int, load: Callable[[int, int], Group]) -> list[Source]:
    """Returns the lines of a clip; `load` returns the frames from one number to another."""
    if num_frames < 2:
        return [Source(clip, [""], partial(_raise, "it has one frame"))]
    starts = range(0, num_frames - 1, per_line)
    ends = [min(start + per_line, num_frames) for start in starts]
    return [
        Source(f"{clip}/{start:06d}", [f"_{n:03d}" for n in range(end - start)], partial(load, start, end))
        for start, end in zip(starts, ends, strict=True)
    ]


def animation(entry: Entry, per_line: int) -> list[Source]:
    """Returns the lines of an animated GIF."""
    try:
        with Image.open(io.BytesIO(entry.read())) as image:
            return lines_of(entry.name, image.n_frames, per_line, partial(load_animation, entry))
    except Unusable as reason:
        return [Source(entry.name, [""], partial(_raise, str(reason)))]
    except Exception:  # Pillow may raise any exception for damaged files
        return [Source(entry.name, [""], partial(_raise, "a picture cannot be read"))]


def load_animation(entry: Entry, start: int, end: int) -> Group:
    try:
        with Image.open(io.BytesIO(entry.read())) as image:
            frames = []
            for number in range(start, end):
                image.seek(number)
                frames.append(image.convert("RGB"))
            return frames
    except Unusable:
        raise
    except Exception:  # see `animation`
        raise Unusable("a picture cannot be read") from None


def load_frames(entries: Sequence[Entry], start: int, end: int) -> Group:
    return [open_picture(entry.read) for entry in entries[start:end]]


def _raise(reason: str) -> Group:
    raise Unusable(reason)


def find_pictures(arguments: argparse.Namespace) -> list[Source]:
    """Returns the pictures of folders and tar files, each alone."""
    entries = [entry for entry in find_entries(arguments.source) if entry.is_picture]
    return [Source(entry.name, [""], partial(load_frames, [entry], 0, 1)) for entry in entries]


VIDEO = made_from(
    Download(
        task="video",
        title="consecutive frames of videos",
        description="Reads the frames of clips: folders of pictures, one folder a clip, or animated GIFs. Extract the "
        "frames of a video with ffmpeg -i VIDEO -vf fps=4 CLIP/%06d.png.",
        add_options=add_source,
        find_sources=find_clips,
        cut=WHOLE,
        unit="frames",
        per_line=8,
        sources_are_lines=True,
    )
)
PICTURES = made_from(
    Download(
        task="pictures",
        title="pictures without labels",
        description="Reads pictures from folders and from tar files, such as the shards of LAION that "
        "img2dataset writes.",
        add_options=add_source,
        find_sources=find_pictures,
        cut=WHOLE,
        unit="pictures",
        per_line=8,
    )
)
