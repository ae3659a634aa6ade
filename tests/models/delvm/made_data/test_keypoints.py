"""`mindvlm-make-data delvm-keypoints`: skeletons, and tiny downloads in the layout of COCO."""

import json

import numpy as np
import pytest

from mindvlm.models.delvm.made_data.keypoints import (
    COCO_JOINTS,
    COLOURS,
    JOINTS,
    LIMBS,
    draw_skeletons,
    load,
    person_of,
)
from mindvlm.processing.samples.public_data import Unusable
from tests.models.delvm.made_data.tiny_downloads import names_below, pixels, png, run, write_files, write_tar

RED = (250, 40, 40)


def keypoints(**places):
    """Returns COCO's list: joint -> (x, y, visibility), with "_" for spaces; other joints are not labelled."""
    places = {name.replace("_", " "): place for name, place in places.items()}
    return [value for joint in COCO_JOINTS for value in places.get(joint, (0, 0, 0))]


WRIST = keypoints(left_wrist=(20, 15, 2))


def coco(**changes) -> dict:
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 40, "height": 30} for n in (7, 5, 9)]
    annotations = [
        {"image_id": 5, "category_id": 1, "iscrowd": 0, "keypoints": WRIST},
        {"image_id": 7, "category_id": 1, "iscrowd": 0, "keypoints": keypoints(nose=(20, 15, 1))},
        {"image_id": 7, "category_id": 1, "iscrowd": 1, "keypoints": WRIST},
    ]
    return {"images": images, "annotations": annotations, **changes}


def write_coco(folder, content=None, names=(5, 7, 9)):
    files = {f"val2017/{n:012d}.jpg": png(RED, form="JPEG") for n in names}
    content = coco() if content is None else content
    return write_files(folder, files | {"person_keypoints.json": json.dumps(content).encode()})


def make(output, source, *options):
    annotations = source / "person_keypoints.json"
    return run("keypoints", output, "--source", source, "--annotations", annotations, "--pictures", *options)


def test_every_joint_and_limb_has_its_colour():
    assert COLOURS[:3] == [(255, 0, 0), (255, 85, 0), (255, 170, 0)] and COLOURS[-1] == (255, 0, 85)
    assert len(set(COLOURS)) == len(JOINTS) == 18 and len(LIMBS) == 17
    assert set(JOINTS) - {"neck"} == set(COCO_JOINTS) and {joint for limb in LIMBS for joint in limb} == set(JOINTS)
    places = {joint: (50 * (number % 5) + 30, 50 * (number // 5) + 30) for number, joint in enumerate(JOINTS)}
    picture = np.asarray(draw_skeletons([places], 300, 260))
    for joint, colour in zip(JOINTS, COLOURS, strict=True):
        x, y = places[joint]
        assert tuple(picture[y, x]) == tuple(picture[y, x + 8]) == tuple(picture[y - 8, x]) == colour
        assert tuple(picture[y - 9, x + 9]) != colour


def test_limbs_are_four_pixels_thick():
    picture = np.asarray(draw_skeletons([{"neck": (20, 20), "left shoulder": (80, 20)}], 100, 40))
    column = picture[:, 50].any(-1)
    assert column.sum() == 4 and column[18:23].sum() == 4 and tuple(picture[20, 50]) == COLOURS[1]


def test_visibility_and_the_neck():
    person = person_of(keypoints(left_shoulder=(10, 20, 2), right_shoulder=(30, 40, 1), left_hip=(5, 5, 0)))
    assert person == {"left shoulder": (10, 20), "right shoulder": (30, 40), "neck": (20, 30)}
    assert person_of(keypoints(nose=(3, 4, 2), left_shoulder=(1, 2, 2))) == {"nose": (3, 4), "left shoulder": (1, 2)}
    assert person_of(keypoints()) == {}
    one, two = {"nose": (20, 20)}, {"right ear": (24, 20)}
    assert tuple(np.asarray(draw_skeletons([one, two], 60, 40))[20, 22]) == COLOURS[JOINTS.index("right ear")]
    assert tuple(np.asarray(draw_skeletons([two, one], 60, 40))[20, 22]) == COLOURS[JOINTS.index("nose")]


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ([], "no joint"),
        ([keypoints()], "no joint"),
        ([WRIST[:-1]], "no list of 51 numbers"),
        ([None], "no list of 51 numbers"),
        ([["a"] * 51], "no list of 51 numbers"),
        ([keypoints(nose=(10**400, 3, 2))], "no list of 51 numbers"),
        ([keypoints(nose=(41, 3, 2))], "outside the picture"),
        ([keypoints(nose=(float("nan"), 3, 2))], "outside the picture"),
    ],
)
def test_persons_that_cannot_be_drawn_say_why(tmp_path, lists, reason):
    (entry,) = entries_of(tmp_path)
    with pytest.raises(Unusable, match=reason):
        load(entry, lists, (40, 30))


def entries_of(folder):
    from mindvlm.models.delvm.made_data.files import find_entries

    return find_entries([str(write_files(folder / "one", {"a.png": png(RED)}))])


def test_annotated_pictures_become_pairs(tmp_path, capsys):
    source = write_coco(tmp_path / "coco")
    assert make(tmp_path / "a", source) == 0
    assert "made 2 of 2 pairs in" in capsys.readouterr().err
    assert names_below(tmp_path / "a/keypoints") == [
        f"{n:012d}_{kind}.png" for n in (5, 7) for kind in ("img", "label")
    ]
    # the middle of the picture is that of the square
    wrist = pixels(tmp_path / "a/keypoints/000000000005_label.png")
    nose = pixels(tmp_path / "a/keypoints/000000000007_label.png")
    assert tuple(wrist[8, 8]) == COLOURS[JOINTS.index("left wrist")] and tuple(nose[8, 8]) == COLOURS[0]
    assert (wrist[0] == 0).all()
    # pictures in a tar file
    archive = write_tar(tmp_path / "val2017.tar", {"val2017/000000000005.jpg": png(RED)})
    options = ["--source", archive, "--annotations", source / "person_keypoints.json", "--pictures"]
    assert run("keypoints", tmp_path / "b", *options) == 0
    assert "skipped 1: its picture is missing (the first is keypoints/000000000007" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (coco(annotations=[]), "holds no pictures of COCO"),
        (coco(annotations=[{"image_id": 5, "keypoints": keypoints()}]), "no item can be used: skipped 1: no joint"),
        (coco(images=[]), "annotates the picture 5, which its list of images lacks"),
        (coco(annotations=None), "expected a list [...], found NoneType"),
        (coco(annotations=[{"image_id": 5, "category_id": 1}]), "a record lacks 'keypoints'; expected COCO's"),
        (coco(images=[{"id": 5}]), "a record lacks 'file_name'; expected COCO's"),
        (coco(annotations=[3]), "a record is damaged ('int' object has no attribute 'get'); expected COCO's"),
        ([], "expected an object {...}, found list"),
        ({}, "expected a list [...], found NoneType"),
        (coco(images=[{"id": 5, "file_name": "../../x.jpg", "width": 1, "height": 1}], annotations=[
            {"image_id": 5, "keypoints": WRIST}]), "leads out of its folder"),
    ],
)  # fmt: skip
def test_wrong_annotations_are_one_line(tmp_path, capsys, content, message):
    assert make(tmp_path / "a", write_coco(tmp_path / "coco", content)) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and message in error
