"""Scenes: what each task's label shows, and `mindvlm-make-data` for them."""

import numpy as np
import pytest
from PIL import Image

from mindvlm.models.delvm.made_data.outputs import CodeFile
from mindvlm.models.delvm.scenes import CLASSES, COLOURS, TASKS, Scene, draw_pair, draw_scene
from mindvlm.models.delvm.token_files import TokenFile, find_token_files
from mindvlm.processing.code_processor import find_pairs
from mindvlm.tools.make_data import main
from tests.tiny_delvm import training_tensors, write_vqgan

GRAY, RED, BLUE = (120, 120, 120), (200, 30, 60), (40, 40, 200)


@pytest.fixture
def scene():
    """A red disc with a blue star in front, on gray, as three columns of a square."""
    index = np.repeat(np.array([[0] * 3 + [1] * 3 + [2] * 3], np.uint8), 9, 0)
    picture = np.array([GRAY, RED, BLUE], np.uint8)[index]
    return Scene(Image.fromarray(picture), index, ["disc", "star"])


def pair_of(task, scene):
    picture, label = TASKS[task](scene, np.random.default_rng(0))
    assert picture.mode == label.mode == "RGB" and picture.size == label.size
    return np.asarray(picture), np.asarray(label)


def columns(pixels):
    assert (pixels == pixels[:1]).all()
    return [tuple(map(int, pixel)) for pixel in pixels[0]]


def test_labels_show_kinds_borders_and_order(scene):
    black, white = (0, 0, 0), (255, 255, 255)
    _, label = pair_of("segmentation", scene)
    assert columns(label) == [black] * 3 + [CLASSES["disc"]] * 3 + [CLASSES["star"]] * 3
    _, label = pair_of("depth", scene)
    assert columns(label) == [black] * 3 + [(127, 127, 127)] * 3 + [white] * 3
    _, label = pair_of("edges", scene)
    assert columns(label) == [black, black, white, white, black, white, white, black, black]


@pytest.mark.parametrize("task", ["blur", "rain", "colour"])
def test_labels_show_the_undamaged_picture(task, scene):
    picture, label = pair_of(task, scene)
    assert (label == np.asarray(scene.picture)).all() and (picture != label).any()


def test_grayscale_pictures_have_one_brightness_per_colour(scene):
    picture, _ = pair_of("colour", scene)
    assert (picture == picture[..., :1]).all()
    brightness = np.sort(COLOURS @ (0.299, 0.587, 0.114))
    assert (np.diff(brightness) > 15).all()


def test_scenes_have_visible_shapes_that_are_nearer_below():
    for seed in range(20):
        scene = draw_scene(np.random.default_rng(seed), 64)
        numbers = np.unique(scene.index)
        assert numbers[0] == 0 and 2 <= len(numbers) - 1 <= len(scene.kinds) <= 4
        rows = [np.flatnonzero((scene.index == number).any(1)) for number in numbers[1:]]
        centres = [one.min() + one.max() for one in rows]
        assert centres[-1] > centres[0]


def test_rain_and_blur_change_what_they_say():
    picture, label = draw_pair("rain", 0, seed=1, size=128)
    changed = (np.asarray(picture) != np.asarray(label)).any(-1)
    assert 0.005 < changed.mean() < 0.3
    picture, label = draw_pair("blur", 0, seed=1, size=128)
    steepest = [np.abs(np.diff(np.asarray(one).astype(int), axis=1)).max() for one in (picture, label)]
    assert steepest[0] < steepest[1] / 2


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(*arguments):
    raise KeyboardInterrupt


def command(folder, *options):
    return ["delvm-scenes", "--output", str(folder), "--size", "32", *map(str, options)]


def test_pairs_depend_on_seed_task_and_number_alone(tmp_path, capsys):
    assert main(command(tmp_path / "a", "--num_images", 3)) == 0
    assert "made 18 of 18 pairs of 6 tasks" in capsys.readouterr().err
    before = contents(tmp_path / "a")
    for task in TASKS:
        assert len(find_pairs(tmp_path / "a" / task)) == 3
    pictures = [content for name, content in before.items() if name.endswith("img.png")]
    assert len(pictures) == len(set(pictures)) == 18
    assert main(command(tmp_path / "b", "--num_images", 1, "--tasks", "rain")) == 0
    assert main(command(tmp_path / "b", "--num_images", 3)) == 0
    assert "made 17 of 18" in capsys.readouterr().err
    assert contents(tmp_path / "b") == before
    (tmp_path / "b/rain/000001_label.png").unlink()
    assert main(command(tmp_path / "b", "--num_images", 3)) == 0
    assert contents(tmp_path / "b") == before
    assert main(command(tmp_path / "c", "--num_images", 1, "--seed", 2)) == 0
    assert contents(tmp_path / "c")["rain/000000_img.png"] != before["rain/000000_img.png"]


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    return write_vqgan(tmp_path_factory.mktemp("scenes") / "vqgan", training_tensors())


def test_codes_are_sentences_of_pairs_and_a_killed_run_goes_on(tmp_path, vqgan, monkeypatch):
    options = ["--vqgan", vqgan, "--pairs_per_line", 2, "--tasks", "rain", "edges", "--num_images"]
    assert main(command(tmp_path / "a", *options, 5)) == 0
    files = find_token_files(tmp_path / "a")
    assert [str(path.relative_to(tmp_path / "a")) for path in files] == [
        "vision/edges/train.bin", "vision/rain/train.bin"
    ]  # fmt: skip
    from mindvlm.models.delvm.picture_codes import PictureEncoder

    encode = PictureEncoder(vqgan)
    file = TokenFile(files[1], encode.vocab_size)
    length = encode([tmp_path / "a/rain/000000_img.png"]).shape[1]
    assert file.lengths.tolist() == [4 * length, 4 * length, 2 * length]
    names = ("000002_img", "000002_label", "000003_img", "000003_label")
    # one at a time: batches change no code
    expected = [encode([tmp_path / f"a/rain/{name}.png"])[0].tolist() for name in names]
    assert file[1].reshape(4, -1).tolist() == expected
    # a run of more pairs, killed within a line, continues as if nothing had happened
    assert main(command(tmp_path / "b", *options, 3)) == 0
    monkeypatch.setattr(CodeFile, "finish", interrupt)
    assert main(command(tmp_path / "b", *options, 4)) == 130
    monkeypatch.undo()
    partial = tmp_path / "b/vision/rain/.codes.partial"
    assert partial.read_text().count("\n") == 4
    with open(partial, "a") as file:
        file.write('"000004"\t[[1, 2')
    assert main(command(tmp_path / "b", *options, 5)) == 0
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_codes_of_pictures_may_be_no_targets(tmp_path, vqgan, capsys):
    options = ["--vqgan", vqgan, "--pairs_per_line", 2, "--tasks", "rain", "--num_images", 2]
    for targets in ("all", "labels"):
        assert main(command(tmp_path / targets, *options, "--targets", targets)) == 0
    every, labels = (TokenFile(tmp_path / name / "vision/rain/train.bin", 40)[0] for name in ("all", "labels"))
    every, labels = every.reshape(4, -1), labels.reshape(4, -1)
    assert (labels[[0, 2]] == -every[[0, 2]]).all() and (labels[[1, 3]] == every[[1, 3]]).all()
    assert main(command(tmp_path / "labels", *options)) == 2
    assert "was made with targets 'labels', not 'all'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_images", 0], "--num_images is 0; expected 1 to 1000000"),
        (["--size", 8], "--size is 8; expected 16 to 4096"),
        (["--pairs_per_line", 0], "--pairs_per_line is 0; expected"),
        (["--seed", -1], "--seed is -1; expected 0 or more"),
        (["--vqgan", "nowhere"], "--vqgan nowhere: is no folder with the config.json of a VQGAN"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(tmp_path, capsys, options, message):
    assert main(command(tmp_path / "a", *options)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_folder_of_other_data_is_refused(tmp_path, capsys):
    assert main(command(tmp_path / "a", "--num_images", 1)) == 0
    before = contents(tmp_path / "a")
    capsys.readouterr()
    assert main(command(tmp_path / "a", "--num_images", 1, "--seed", 2)) == 2
    assert "a: was made with seed 1, not 2; delete it or choose another output" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.png").touch()
    assert main(command(tmp_path / "b")) == 2
    assert "b: holds other data; choose another output" in capsys.readouterr().err
    assert contents(tmp_path / "a") == before and contents(tmp_path / "b") == {"x.png": b""}
