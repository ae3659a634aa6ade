"""`delvm-keypoints`: pictures of COCO and the skeletons of their persons on black, in OpenPose's colours."""

import argparse
import colorsys
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.alignment import WHOLE, Source
from mindvlm.models.delvm.made_data.downloads import Download, made_from
from mindvlm.models.delvm.made_data.files import Entry, find_entries, open_picture
from mindvlm.models.delvm.made_data.items import Group
from mindvlm.processing.code_processor import LABEL, PICTURE
from mindvlm.processing.samples.public_data import Unusable, read_json, records_of

COCO_JOINTS = (
    *("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder"),
    *("left elbow", "right elbow", "left wrist", "right wrist", "left hip", "right hip"),
    *("left knee", "right knee", "left ankle", "right ankle"),
)
JOINTS = (
    *("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist"),
    *("right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle"),
    *("right eye", "left eye", "right ear", "left ear"),
)
"""In OpenPose's order, which gives the colours."""
LIMBS = (
    *(("neck", "right shoulder"), ("neck", "left shoulder"), ("right shoulder", "right elbow")),
    *(("right elbow", "right wrist"), ("left shoulder", "left elbow"), ("left elbow", "left wrist")),
    *(("neck", "right hip"), ("right hip", "right knee"), ("right knee", "right ankle")),
    *(("neck", "left hip"), ("left hip", "left knee"), ("left knee", "left ankle")),
    *(
        ("neck", "nose"),
        ("nose", "right eye"),
        ("right eye", "right ear"),
        ("nose", "left eye"),
        ("left eye", "left ear"),
    ),
)
COLOURS = [
    tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(number / len(JOINTS), 1, 1))
    for number in range(len(JOINTS))
]
"""Of joints and limbs, each in their order: all hues in equal steps, from red."""
RADIUS, THICKNESS = 8, 4

Person = dict[str, tuple[float, float]]
"""joint -> place (x, y) in pixels"""


def person_of(keypoints: Any) -> Person:
    """Returns the labelled joints of COCO's keypoints, x, y and visibility of each joint; 0 is not labelled.

    The neck lies between the shoulders, if both are labelled. Raises Unusable for another list.
    """
    try:
        values = [float(value) for value in keypoints]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != 3 * len(COCO_JOINTS):
        raise Unusable(f"the keypoints of a person are no list of {3 * len(COCO_JOINTS)} numbers")
    places = zip(COCO_JOINTS, values[::3], values[1::3], values[2::3], strict=True)
    person = {joint: (x, y) for joint, x, y, visibility in places if visibility > 0}
    if "left shoulder" in person and "right shoulder" in person:
        shoulders = person["left shoulder"], person["right shoulder"]
        person["neck"] = tuple(sum(values) / 2 for values in zip(*shoulders, strict=True))
    return person


def draw_skeletons(persons: Sequence[Person], width: int, height: int) -> Image.Image:
    """Returns a picture of persons on black, each over those before: limbs of 4 pixels, discs of radius 8 on joints."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for person in persons:
        for limb, colour in zip(LIMBS, COLOURS, strict=False):
            if all(joint in person for joint in limb):
                draw.line([person[joint] for joint in limb], fill=colour, width=THICKNESS)
        for joint, colour in zip(JOINTS, COLOURS, strict=True):
            if joint in person:
                x, y = person[joint]
                draw.ellipse([x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS], fill=colour)
    return image


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", type=os.path.expanduser, nargs="+", required=True, metavar="FOLDER|TAR", help="of the pictures"
    )
    parser.add_argument(
        "--annotations", type=os.path.expanduser, required=True, metavar="FILE", help="person_keypoints_*.json"
    )


def find_sources(arguments: argparse.Namespace) -> list[Source]:
    """Returns each annotated picture with its persons, by the order of the annotations' list of pictures."""
    path = Path(arguments.annotations)
    content = read_json(path)
    persons: dict[Any, list[Any]] = defaultdict(list)
    try:
        for annotation in records_of(content.get("annotations"), list, path):
            if annotation.get("category_id", 1) == 1 and not annotation.get("iscrowd"):
                persons[annotation["image_id"]].append(annotation["keypoints"])
        images = {record["id"]: record for record in records_of(content.get("images"), list, path)}
        names = {key: os.path.splitext(record["file_name"])[0] for key, record in images.items()}
        sizes = {key: (record["width"], record["height"]) for key, record in images.items()}
    except (AttributeError, KeyError, TypeError) as error:
        fault = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
        raise UserError(f"{path}: a record {fault}; expected COCO's person_keypoints_*.json, give that file") from None
    lost = next((key for key in persons if key not in images), None)
    if lost is not None:
        raise UserError(f"{path}: annotates the picture {lost!r}, which its list of images lacks; download it again")
    files = {entry.name.rpartition("/")[2]: entry for entry in find_entries(arguments.source) if entry.is_picture}
    return [
        Source(name, (PICTURE, LABEL), partial(load, files.get(name.rpartition("/")[2]), persons[key], sizes[key]))
        for key, name in names.items()
        if key in persons
    ]


def load(file: Entry | None, keypoints: Sequence[Any], size: tuple[int, int]) -> Group:
    """Returns a picture and its skeletons. Raises Unusable if there are none."""
    if file is None:
        raise Unusable("its picture is missing")
    persons = list(filter(None, map(person_of, keypoints)))
    if not persons:
        raise Unusable("no joint of a person is labelled")
    image = open_picture(file.read)
    width, height = image.size
    if (width, height) != tuple(size):
        raise Unusable("its picture has another size than in the annotations")
    if not all(0 <= x <= width and 0 <= y <= height for person in persons for x, y in person.values()):
        raise Unusable("a joint lies outside the picture")
    return image, draw_skeletons(persons, *image.size)


KEYPOINTS = made_from(
    Download(
        task="keypoints",
        title="pictures of COCO with the skeletons of their persons",
        description="Reads person_keypoints_*.json and the pictures of COCO (https://cocodataset.org/#download). A "
        "label has the persons' skeletons in OpenPose's colours on black.",
        add_options=add_options,
        find_sources=find_sources,
        cut=WHOLE,
        unit="pairs",
        per_line=4,
    )
)
