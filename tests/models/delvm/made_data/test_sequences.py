"""`mindvlm-make-data` for videos, plain pictures and joined lines."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from mindvlm.models.delvm.made_data.outputs import CodeFile
from mindvlm.models.delvm.token_files import TokenFile, write_token_file
from mindvlm.tools.make_data import main
from tests.models.delvm.made_data.tiny_downloads import (
    COLOURS,
    contents,
    names_below,
    pixels,
    png,
    run,
    write_files,
    write_tar,
)
from tests.tiny_delvm import training_tensors, write_vqgan

NUM_CODES = 40


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    return write_vqgan(tmp_path_factory.mktemp("data") / "vqgan", training_tensors())


def gray(level):
    return png((level, level, level))


def gif(levels):
    file = io.BytesIO()
    first, *others = [Image.new("RGB", (40, 30), (level,) * 3) for level in levels]
    first.save(file, "GIF", save_all=True, append_images=others)
    return file.getvalue()


def level_of(path):
    return int(pixels(path)[12, 12, 0])


def codes_of(folder):
    file = TokenFile(folder / "train.bin", NUM_CODES)
    return [line.tolist() for line in file]


def test_frames_follow_in_natural_order_and_rests_are_short(tmp_path, vqgan, capsys):
    clip = {f"clips/b/frame{n}.png": gray(10 * n) for n in range(1, 12)}
    source = write_files(tmp_path / "f", clip | {"clips/a/1.png": gray(200), "clips/a/2.png": gray(210)})
    options = ["--source", source / "clips", "--pictures", "--vqgan", vqgan, "--frames_per_line", 4]
    assert run("video", tmp_path / "a", *options) == 0
    assert "made 4 of 4 lines of frames" in capsys.readouterr().err
    lines = {"a/000000": [200, 210], "b/000000": [10, 20, 30, 40], "b/000004": [50, 60, 70, 80]}
    lines["b/000008"] = [90, 100, 110]
    expected = {f"{line}_{n:03d}.png": level for line, levels in lines.items() for n, level in enumerate(levels)}
    assert names_below(tmp_path / "a/video") == sorted(expected)
    assert {name: level_of(tmp_path / "a/video" / name) for name in expected} == expected
    found = codes_of(tmp_path / "a/vision/video")
    length = len(found[0]) // 2
    assert [len(line) for line in found] == [2 * length, 4 * length, 4 * length, 3 * length]


def test_a_clip_that_gains_frames_equals_a_new_one(tmp_path, vqgan, monkeypatch):
    options = ["--pictures", "--vqgan", vqgan, "--frames_per_line", 4]
    clip = {f"a/{n:02d}.png": gray(10 * n) for n in range(9)}
    source = write_files(tmp_path / "f", dict(list(clip.items())[:6]))
    assert run("video", tmp_path / "a", "--source", source, *options) == 0
    write_files(source, clip)
    add = CodeFile.add

    def add_and_die(*arguments):
        add(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CodeFile, "add", add_and_die)
        assert run("video", tmp_path / "a", "--source", source, *options) == 130
    for output in ("a", "b"):
        assert run("video", tmp_path / output, "--source", source, *options) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_rest_of_one_frame_is_left_out_and_a_clip_of_one_is_skipped(tmp_path, capsys):
    clip = {f"b/{n}.png": gray(10 * n) for n in range(5)}
    source = write_files(tmp_path / "f", clip | {"one/1.png": gray(0)})
    assert run("video", tmp_path / "a", "--source", source, "--pictures", "--frames_per_line", 4) == 0
    assert names_below(tmp_path / "a/video") == [f"b/000000_00{n}.png" for n in range(4)]
    assert "skipped 1: it has one frame (the first is video/one" in capsys.readouterr().err
    # the source is a clip itself
    assert run("video", tmp_path / "b", "--source", source / "b", "--pictures") == 0
    assert names_below(tmp_path / "b/video") == [f"b/000000_00{n}.png" for n in range(5)]
    (source / "b/deeper").mkdir()
    assert run("video", tmp_path / "c", "--source", source / "b/deeper/..", "--pictures") == 0
    assert names_below(tmp_path / "c/video") == names_below(tmp_path / "b/video")


def test_frames_of_animations(tmp_path, capsys):
    levels = [0, 50, 100, 150, 200, 250]
    files = {"a.gif": gif(levels), "still.gif": gif([9]), "bad.gif": b"GIF89a damaged"}
    source = write_files(tmp_path / "f", files)
    assert run("video", tmp_path / "a", "--source", source, "--pictures", "--frames_per_line", 3) == 0
    names = names_below(tmp_path / "a/video")
    assert names == [f"a/{start:06d}_00{n}.png" for start in (0, 3) for n in range(3)]
    assert [level_of(tmp_path / "a/video" / name) for name in names] == pytest.approx(levels, abs=3)
    error = capsys.readouterr().err
    assert "skipped 1: it has one frame" in error and "skipped 1: a picture cannot be read" in error


def test_frames_of_a_line_are_changed_alike(tmp_path):
    source = write_files(tmp_path / "f", {f"c/{n}.png": gray(60 * n) for n in range(3)})
    assert run("video", tmp_path / "a", "--source", source, "--pictures", "--augment", 3) == 0
    whites = []
    for copy in (1, 2, 3):
        frames = [pixels(tmp_path / f"a/video/c/000000_copy{copy}_00{n}.png") for n in range(3)]
        corners = [(frame - 60 * n) / (255 - 60 * n) for n, frame in enumerate(frames)]
        assert np.abs(corners[0] - corners[2]).max() < 0.02
        whites.append(frames[0].tobytes())
    assert len(set(whites)) > 1


def test_pictures_of_folders_and_shards(tmp_path, vqgan, capsys):
    shard = write_tar(
        tmp_path / "00000.tar", {"0.jpg": png(COLOURS[0]), "0.txt": b"", "0.json": b"{}", "1.png": b"bad"}
    )
    source = write_files(
        tmp_path / "f", {"a.png": png(COLOURS[1]), "a.jpg": png(COLOURS[2]), "b/c.webp": png(COLOURS[3])}
    )
    options = ["--source", source, shard, "--pictures", "--vqgan", vqgan, "--pictures_per_line", 3]
    assert run("pictures", tmp_path / "a", *options) == 0
    error = capsys.readouterr().err
    assert "made 4 of 5 pictures" in error
    assert "skipped 1: a picture cannot be read (the first is pictures/00000/1;" in error
    assert names_below(tmp_path / "a/pictures") == ["00000/0.png", "f/a.png", "f/a_2.png", "f/b/c.png"]
    found = codes_of(tmp_path / "a/vision/pictures")
    length = len(found[1])
    assert [len(line) for line in found] == [3 * length, length]
    assert (pixels(tmp_path / "a/pictures/f/a.png")[12, 12] == COLOURS[2]).all()


def test_names_that_are_no_utf_8_are_listed(tmp_path):
    name = os.fsdecode(b"\xff")
    source = write_files(tmp_path / "f", {f"{name}1.png": gray(3), f"{name}2.png": b"", "a.png": gray(9)})
    for _ in range(2):
        assert run("pictures", tmp_path / "a", "--source", source, "--pictures") == 0
        assert names_below(tmp_path / "a/pictures") == ["a.png", f"{name}1.png"]
        assert (tmp_path / "a/skipped.txt").read_bytes() == b"pictures/\xff2: a picture cannot be read\n"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("video", ["--frames_per_line", 1], "--frames_per_line is 1; expected 2 to"),
        ("pictures", ["--pictures_per_line", 0], "--pictures_per_line is 0; expected 1 to"),
        ("video", [], "holds no consecutive frames"),
        ("pictures", [], "holds no pictures without labels"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, kind, options, message):
    source = write_files(tmp_path / "f", {"a.txt": b""})
    assert run(kind, tmp_path / "a", "--source", source, "--pictures", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_lines_are_joined(tmp_path, capsys):
    for name, count in (("a", 5), ("b", 2)):
        write_token_file(tmp_path / f"{name}.bin", [[number, number + 1] for number in range(count)])
    inputs = ["--input", str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    output = tmp_path / "new/c.bin"
    assert main(["delvm-join", *inputs, "--output", str(output), "--lines", "3"]) == 0
    assert f"joined 7 lines to 3 in {output}" in capsys.readouterr().err
    expected = [[0, 1, 1, 2, 2, 3], [3, 4, 4, 5, 0, 1], [1, 2]]
    assert [line.tolist() for line in TokenFile(output, 9)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "a.bin"], "--output a.bin: is one of the files to join; choose another name"),
        (["--output", "b.txt"], "b.txt: files of codes end in .bin"),
        (["--output", "b.bin", "--lines", "0"], "--lines is 0; expected 1 to"),
        (["--output", "b.bin", "--input", "none.bin"], "none.bin.meta: no such file"),
    ],
)
def test_wrong_joins_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    write_token_file("a.bin", [[1, 2]])
    assert main(["delvm-join", "--input", "a.bin", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert np.load("a.bin.meta").tolist() == [[0, 2]] and not (tmp_path / "b.bin").exists()
