"""`mindvlm-make-data delvm-pairs`: tiny downloads in the layouts of Rain13K, GoPro and BasicSR."""

import numpy as np
import pytest

from tests.models.delvm.made_data.tiny_downloads import (
    COLOURS,
    contents,
    names_below,
    pixels,
    png,
    run,
    write_files,
    write_lmdb,
)


def rain(**others):
    files = {f"input/{name}.png": png(COLOURS[0]) for name in ("1", "2")}
    return files | {f"target/{name}.jpg": png(COLOURS[1]) for name in ("1", "2")} | others


def check_pair(folder, name):
    for kind, colour in (("img", COLOURS[0]), ("label", COLOURS[1])):
        assert (pixels(folder / f"{name}_{kind}.png")[12, 12] == colour).all()


def test_two_folders_of_the_same_names(tmp_path, capsys):
    source = write_files(tmp_path / "Rain13K", rain() | {"other/1.png": png(COLOURS[2]), "readme.txt": b""})
    assert run("pairs", tmp_path / "a", "--source", source, "--pictures", "--task", "deraining") == 0
    assert "made 2 of 2 pairs" in capsys.readouterr().err
    assert names_below(tmp_path / "a") == [f"deraining/{n}_{kind}.png" for n in "12" for kind in ("img", "label")]
    check_pair(tmp_path / "a/deraining", "1")
    # another pair of folders
    options = ["--folders", "target", "input"]
    assert run("pairs", tmp_path / "b", "--source", source, "--pictures", *options) == 0
    assert (pixels(tmp_path / "b/pairs/1_label.png")[12, 12] == COLOURS[0]).all()


def test_folders_below_those_of_clips(tmp_path):
    files = {f"GOPR{clip}/{side}/{n:06d}.png": png(COLOURS[side == "sharp"])
             for clip in (1, 2) for side in ("blur", "sharp", "blur_gamma") for n in (3, 4)}  # fmt: skip
    source = write_files(tmp_path / "GoPro", files)
    options = ["--pictures", "--folders", "blur", "sharp", "--augment", 2]
    assert run("pairs", tmp_path / "a", "--source", source, *options) == 0
    names = names_below(tmp_path / "a/pairs")
    assert len(names) == 24 and names[:2] == ["GOPR1/000003_copy1_img.png", "GOPR1/000003_copy1_label.png"]
    check_pair(tmp_path / "a/pairs", "GOPR2/000004")
    for copy in (1, 2):
        # both have the white corner at the same place
        one, two = (pixels(tmp_path / f"a/pairs/GOPR1/000003_copy{copy}_{kind}.png") for kind in ("img", "label"))
        assert ((one == 255).all(-1) == (two == 255).all(-1)).all() and (one != two).any()


def test_lmdbs_give_the_same_pairs_as_folders(tmp_path):
    pytest.importorskip("lmdb")
    folder = write_files(tmp_path / "f", {f"{side}/{name}": content for side, colour in (("in", 0), ("out", 1))
                                          for name, content in (("1.png", png(COLOURS[colour])),)})  # fmt: skip
    base = tmp_path / "db"
    base.mkdir()
    for side, colour in (("in", 0), ("out", 1)):
        write_lmdb(base / f"{side}.lmdb", {"1.png": png(COLOURS[colour])})
    assert run("pairs", tmp_path / "a", "--source", folder, "--pictures", "--folders", "in", "out") == 0
    assert run("pairs", tmp_path / "b", "--source", base, "--pictures", "--folders", "in.lmdb", "out.lmdb") == 0
    assert contents(tmp_path / "a/pairs") == contents(tmp_path / "b/pairs")


def test_a_missing_key_or_a_damaged_picture_is_skipped(tmp_path, capsys):
    pytest.importorskip("lmdb")
    base = tmp_path / "db"
    base.mkdir()
    names = [f"{n}.png" for n in range(4)]
    pictures = {name: png(COLOURS[0]) for name in names}
    write_lmdb(base / "input", pictures | {"1.png": b"damaged", "3.png": png(COLOURS[0], (41, 30))})
    write_lmdb(base / "target", {name: png(COLOURS[1]) for name in names if name != "2.png"}, names)
    assert run("pairs", tmp_path / "a", "--source", base, "--pictures") == 0
    assert "made 1 of 4 pairs" in capsys.readouterr().err
    assert (tmp_path / "a/skipped.txt").read_text().splitlines() == [
        "pairs/1: a picture cannot be read",
        "pairs/2: a key of meta_info.txt is not in the LMDB",
        "pairs/3: its pictures differ in size",
    ]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            rain(**{"input/3.png": png(COLOURS[0])}),
            [],
            "3 is in input, but not in target (1 of 3 have no partner); add",
        ),
        (rain(**{"target/3.png": png(COLOURS[0])}), [], "3 is in target, but not in input (1 of 3 have no partner)"),
        (rain(**{"target/1.png": png(COLOURS[0])}), [], "two pictures are named target/1; remove one of them"),
        (rain(), ["--folders", "input", "input"], "--folders names 'input' twice"),
        (rain(), ["--folders", "in", "out"], "holds no pictures below folders named 'in' and 'out'; correct"),
        (rain(), ["--task", "a/b"], "--task is 'a/b'; expected a name of letters"),
        (rain(), ["--task", ".."], "--task is '..'; expected a name of letters"),
        (rain(), ["--task", "vision"], "--task is 'vision'; expected a name of letters, digits, '_', '-' and '.', but"),
        ({}, [], "holds no pictures below folders named 'input' and 'target'"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, files, options, message):
    source = tmp_path / "Rain"
    source.mkdir()
    write_files(source, files)
    assert run("pairs", tmp_path / "a", "--source", source, "--pictures", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_pictures_are_brought_to_squares_as_in_prompts(tmp_path):
    from mindvlm.models.delvm.processor import DelvmProcessor, DelvmProcessorConfig

    source = write_files(tmp_path / "Rain", rain())
    assert run("pairs", tmp_path / "a", "--source", source, "--pictures") == 0
    expected = DelvmProcessor(DelvmProcessorConfig(size=16)).squared(source / "input/1.png")
    assert (pixels(tmp_path / "a/pairs/1_img.png") == np.asarray(expected)).all()
