"""`mindvlm-make-data delvm-segmentation` on tiny downloads in the layout of SA-1B."""

import fcntl
import json

import numpy as np
import pytest

from mindvlm.models.delvm.made_data.outputs import CodeFile
from mindvlm.models.delvm.token_files import TokenFile
from tests.models.delvm.made_data.tiny_downloads import (
    COLOURS,
    contents,
    masks_json,
    names_below,
    pixels,
    png,
    run,
    sa1b,
    write_files,
    write_tar,
)

NUM_CODES = 40
ADD = CodeFile.add


def killed_after(count):
    """Returns a method that is interrupted within a line after `count` calls."""
    left = [None] * count

    def add_or_die(self, item, rows):
        if not left:
            self._file.write(b'"a')
            raise KeyboardInterrupt
        left.pop()
        ADD(self, item, rows)

    return add_or_die


@pytest.fixture
def vqgan(monkeypatch):
    """A stand-in for a VQGAN, whose four codes are colours of a picture."""

    def encode(pictures):
        assert 1 <= len(pictures) <= 8
        batch.append(len(pictures))
        small = np.stack([np.asarray(picture)[4::8, 4::8, 0] for picture in pictures])
        return (small.reshape(-1, 4) % NUM_CODES).astype(np.int32)

    batch = []
    encode.size, encode.vocab_size, encode.num_codes, encode.batch_size, encode.batch = 16, NUM_CODES, 4, 8, batch
    monkeypatch.setattr("mindvlm.models.delvm.made_data.downloads.open_encoder", lambda arguments: encode)
    return encode


def test_pictures_and_masks_become_six_aligned_pairs(tmp_path, capsys):
    source = write_files(tmp_path / "sa", sa1b())
    assert run("segmentation", tmp_path / "a", "--source", source, "--pictures") == 0
    assert "made 18 of 18 pairs in" in capsys.readouterr().err
    stems = [f"{name}_crop{part}" for name in ("sa_1", "sa_10", "sa_2") for part in range(1, 7)]
    expected = [f"segmentation/{stem}_{kind}.png" for stem in stems for kind in ("img", "label")]
    assert names_below(tmp_path / "a") == sorted(expected)
    # 30 x 30 pixels from the left of 40 x 30: the large mask has 10 columns, the small one most of the first
    label = pixels(tmp_path / "a/segmentation/sa_1_crop1_label.png")
    large, small = label[0, 3], label[8, 0]
    assert (label[:, 7:] == 0).all() and (label[:, 2:4] == large).all() and large.any() and (large != small).any()
    assert (label[6:14, 0] == small).all() and (small != 0).any()
    picture = pixels(tmp_path / "a/segmentation/sa_1_crop1_img.png")
    assert np.abs(picture[12, 12] - COLOURS[0]).max() < 8 and (picture[1, 1] > 240).all()
    # the right crop begins at column 10, where no mask is
    assert (pixels(tmp_path / "a/segmentation/sa_1_crop2_label.png") == 0).all()
    other = pixels(tmp_path / "a/segmentation/sa_2_crop1_label.png")
    assert (other[0, 3] != large).any()


def test_folders_and_tar_files_give_the_same_and_another_seed_other_colours(tmp_path):
    source = write_files(tmp_path / "sa", sa1b())
    archive = write_tar(tmp_path / "sa.tar", sa1b())
    assert run("segmentation", tmp_path / "a", "--source", source, "--pictures") == 0
    assert run("segmentation", tmp_path / "b", "--source", archive, "--pictures") == 0
    assert run("segmentation", tmp_path / "c", "--source", source, "--pictures", "--seed", 2) == 0
    one, two, three = (contents(tmp_path / name / "segmentation") for name in "abc")
    assert one == two
    assert {name for name in one if one[name] != three[name]} == {
        f"sa_{name}_crop{part}_label.png" for name in (1, 2, 10) for part in (1, 3, 4, 6)
    }


def test_what_cannot_be_used_is_skipped_and_listed(tmp_path, capsys):
    files = sa1b() | {
        "alone.jpg": png(COLOURS[0]),
        "widow.json": masks_json(),
        "empty.jpg": png(COLOURS[0]),
        "empty.json": masks_json(annotations=[]),
        "cut.jpg": png(COLOURS[0])[:90],
        "cut.json": masks_json(),
        "big.jpg": png(COLOURS[0], (50, 30)),
        "big.json": masks_json(),
        "over.jpg": png(COLOURS[0]),
        "text.jpg": png(COLOURS[0]),
        "text.json": b"no json",
        "notes.txt": b"",
    }
    files["over.json"] = masks_json(annotations=[{"segmentation": {"size": [30, 40], "counts": [0, 1201]}}])
    source = write_files(tmp_path / "sa", files)
    assert run("segmentation", tmp_path / "a", "--source", source, "--pictures") == 0
    error = capsys.readouterr().err
    assert "made 18 of 60 pairs" in error
    listed = (tmp_path / "a/skipped.txt").read_text().splitlines()
    assert sorted(listed) == [
        "segmentation/alone: it has no .json of masks",
        "segmentation/big: a mask has another size than its picture",
        "segmentation/cut: a picture cannot be read",
        "segmentation/empty: it has no masks",
        "segmentation/over: the runs of a mask overrun its size",
        "segmentation/text: its .json has no list of annotations with masks",
        "segmentation/widow: it has no picture",
    ]
    assert f"skipped 1: it has no masks (the first is segmentation/empty; {tmp_path}/a/skipped.txt lists all)" in error
    # repaired files are added, and the list is shorter
    write_files(source, {"over.json": masks_json(), "cut.jpg": png(COLOURS[0])})
    assert run("segmentation", tmp_path / "a", "--source", source, "--pictures") == 0
    assert "made 12 of 60 pairs" in capsys.readouterr().err
    assert len((tmp_path / "a/skipped.txt").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.jpg": png(COLOURS[0])}, [], "no item can be used: skipped 1: it has no .json of masks"),
        ({"a.jpg": png(COLOURS[0]), "a.json": masks_json(first=1300)}, [], "no item can be used: skipped 1: a run of"),
        ({"readme.txt": b""}, [], "holds no pictures of SA-1B"),
        (sa1b(), ["--augment", -1], "--augment is -1; expected 0 to 1000"),
        (sa1b(), ["--size", 8], "--size is 8; expected 16 to 4096"),
        (sa1b(), ["--num_items", 0], "--num_items is 0; expected 1 to"),
        (sa1b(), ["--pairs_per_line", 0], "--pairs_per_line is 0; expected 1 to"),
        (sa1b(), ["--vqgan", "nowhere"], "--vqgan nowhere: is no folder with the config.json of a VQGAN"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(tmp_path, capsys, files, options, message):
    source = write_files(tmp_path / "sa", files)
    assert run("segmentation", tmp_path / "a", "--source", source, "--pictures", *options) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and message in error


def test_nothing_to_write_is_refused(tmp_path, capsys):
    source = write_files(tmp_path / "sa", sa1b())
    assert run("segmentation", tmp_path / "a", "--source", source) == 2
    assert "nothing to write: give --vqgan FOLDER for codes, --pictures for PNG files" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert run("segmentation", source / "a", "--source", source, "--pictures") == 2
    assert f"--output {source}/a: lies in --source {source}; choose a folder outside" in capsys.readouterr().err


def test_a_killed_run_and_a_grown_download_give_the_bytes_of_one_run(tmp_path, vqgan, monkeypatch, capsys):
    source = write_files(tmp_path / "sa", sa1b(("a", "b", "c")) | {"bb.jpg": b"damaged", "bb.json": masks_json()})
    options = ["--source", source, "--vqgan", "folder", "--augment", 1]
    assert run("segmentation", tmp_path / "a", *options) == 0
    file = TokenFile(tmp_path / "a/vision/segmentation/train.bin", NUM_CODES)
    # six pairs a line: those of a picture, then their copies
    length = file.lengths[0] // 12
    assert file.lengths.tolist() == [12 * length] * 6
    records = [json.loads(line) for line in open(tmp_path / "a/vision/segmentation/items.jsonl")]
    assert records == [{"item": name, "codes": [2 * length] * 12} for name in "abc"]
    assert vqgan.batch == [8] * 9
    whole = contents(tmp_path / "a")
    # killed while it keeps one more item than each of these numbers
    for counts in ((0,), (1, 1), (2,)):
        output = tmp_path / f"killed{counts[0]}"
        for count in counts:
            monkeypatch.setattr(CodeFile, "add", killed_after(count))
            assert run("segmentation", output, *options) == 130
            monkeypatch.setattr(CodeFile, "add", ADD)
            assert not (output / "vision/segmentation/train.bin").exists()
        assert run("segmentation", output, *options) == 0
        assert contents(output) == whole
    # a finished run changes nothing; the first items, then all, give the same
    before = (tmp_path / "a/vision/segmentation/train.bin").stat().st_mtime_ns
    assert run("segmentation", tmp_path / "a", *options) == 0
    assert (tmp_path / "a/vision/segmentation/train.bin").stat().st_mtime_ns == before
    assert "made 0 of 48 pairs" in capsys.readouterr().err
    assert run("segmentation", tmp_path / "b", *options, "--num_items", 2) == 0
    assert len(TokenFile(tmp_path / "b/vision/segmentation/train.bin", NUM_CODES)) == 4
    assert run("segmentation", tmp_path / "b", *options) == 0
    assert contents(tmp_path / "b") == whole
    # pictures that come later lie between those that were there
    held = {name: (source / name).read_bytes() for name in ("b.jpg", "b.json")}
    for name in held:
        (source / name).unlink()
    assert run("segmentation", tmp_path / "c", *options) == 0
    assert run("segmentation", tmp_path / "c", *options, "--pictures") == 0
    write_files(source, held)
    assert run("segmentation", tmp_path / "c", *options) == 0
    for name in ("train.bin", "train.bin.meta", "items.jsonl"):
        assert contents(tmp_path / "c")[f"vision/segmentation/{name}"] == whole[f"vision/segmentation/{name}"]


def test_damaged_results_and_other_options_are_refused(tmp_path, vqgan, capsys):
    source = write_files(tmp_path / "sa", sa1b())
    options = ["--source", source, "--vqgan", "folder"]
    assert run("segmentation", tmp_path / "a", *options, "--num_items", 1) == 0
    record = tmp_path / "a/vision/segmentation/items.jsonl"
    known = record.read_text()
    for damage in (known.replace("[", "[2, "), "no json"):
        record.write_text(damage)
        assert run("segmentation", tmp_path / "a", *options) == 2
        assert "items.jsonl: damaged or of another train.bin; delete" in capsys.readouterr().err
    record.write_text(known)
    for content in (b"[[1, 2]]\n", b"\xff\t\n"):
        write_files(record.parent, {".codes.partial": content})
        assert run("segmentation", tmp_path / "a", *options) == 2
        assert ".codes.partial: damaged; delete it" in capsys.readouterr().err
    with open(record.with_name(".codes.partial"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run("segmentation", tmp_path / "a", *options) == 2
        assert ".codes.partial: another process writes it; wait for it" in capsys.readouterr().err
    record.with_name(".codes.partial").unlink()
    for changes, message in (
        (["--seed", 3], "was made with seed 1, not 3"),
        (["--augment", 3], "was made with augment 0, not 3"),
        (["--pairs_per_line", 3], "was made with pairs_per_line 6, not 3"),
        (["--source", source, source], "was made with source"),
    ):
        assert run("segmentation", tmp_path / "a", *options, *changes) == 2
        assert message in capsys.readouterr().err
    assert run("segmentation", tmp_path / "a", *options) == 0
