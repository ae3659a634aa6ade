"""`delvm-segmentation`: pictures of SA-1B and their masks in random colours, six crops of each."""

import argparse
import json
from functools import partial

import numpy as np
from PIL import Image

from mindvlm.models.delvm.made_data.alignment import SIX, Source, generator
from mindvlm.models.delvm.made_data.downloads import Download, add_source, made_from
from mindvlm.models.delvm.made_data.files import Entry, find_entries, open_picture
from mindvlm.models.delvm.made_data.items import Group
from mindvlm.models.delvm.made_data.run_lengths import area, paint, run_lengths
from mindvlm.processing.code_processor import LABEL, PICTURE
from mindvlm.processing.samples.public_data import Unusable

ANNOTATIONS = ".json"


def find_sources(arguments: argparse.Namespace) -> list[Source]:
    """Returns each picture with its masks; a file without its partner is a source that cannot be used."""
    pictures: dict[str, Entry] = {}
    annotations: dict[str, Entry] = {}
    for entry in find_entries(arguments.source):
        if entry.is_picture or entry.suffix == ANNOTATIONS:
            (pictures if entry.is_picture else annotations).setdefault(entry.name, entry)
    return [
        Source(name, (PICTURE, LABEL), partial(load, pictures.get(name), annotations.get(name), name, arguments.seed))
        for name in dict.fromkeys((*pictures, *annotations))
    ]


def load(picture: Entry | None, annotations: Entry | None, name: str, seed: int) -> Group:
    """Returns a picture and its masks, whose colours depend on `name` and `seed`. Raises Unusable if there are none."""
    if not picture or not annotations:
        raise Unusable(f"it has no {ANNOTATIONS} of masks" if picture else "it has no picture")
    image = open_picture(picture.read)
    masks = read_masks(annotations.read(), image.height, image.width)
    colours = (generator(seed, name).random((len(masks), 3), np.float32) * 255).astype(np.uint8)
    return image, Image.fromarray(paint(masks, colours, image.height, image.width))


def read_masks(content: bytes, height: int, width: int) -> list[list[int]]:
    """Returns the run lengths of the masks of a picture, the largest mask first.

    Raises:
        Unusable: there are none, or one is damaged or has another size than the picture.
    """
    try:
        encodings = [annotation["segmentation"] for annotation in json.loads(content)["annotations"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unusable(f"its {ANNOTATIONS} has no list of annotations with masks") from None
    if not encodings:
        raise Unusable("it has no masks")
    masks = [run_lengths(encoding) for encoding in encodings]
    if any(mask[:2] != (height, width) for mask in masks):
        raise Unusable("a mask has another size than its picture")
    return sorted((counts for _, _, counts in masks), key=area, reverse=True)


SEGMENTATION = made_from(
    Download(
        task="segmentation",
        title="pictures of SA-1B with their masks in random colours",
        description="Reads SA-1B as downloaded from https://ai.meta.com/datasets/segment-anything-downloads: tar "
        "files, or folders, with NAME.jpg and NAME.json. Each mask gets a random colour on black; smaller masks lie on "
        "larger ones. Six crops of 800 pixels of a picture and its masks become six pairs.",
        add_options=add_source,
        find_sources=find_sources,
        cut=SIX,
        unit="pairs",
        per_line=len(SIX.names),
    )
)
