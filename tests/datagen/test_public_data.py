import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mindvlm.core.errors import UserError
from mindvlm.datagen.public_data import prepare
from mindvlm.models.registry import public_data
from mindvlm.processing.samples.public_data import Exchange, Item, PublicData, Unusable, text_of
from mindvlm.tools import make_data
from mindvlm.training.datasets.registry import choose_datasets, read_registry
from tests.models.slime.test_public_data import write_download


def exchange(item, rng):
    if item.content.get("bad"):
        raise Unusable(item.content["bad"])
    texts = text_of(item.content, "question"), rng.choice(["one", "two", "three", "four"])
    return Exchange(texts, item.content.get("image"), f"tree/{item.content.get('image')}")


def data_of(*contents: dict, **changes) -> PublicData:
    items = [Item(f"n{number}", content) for number, content in enumerate(contents)]
    options = {"title": "Made", "page": "the page", "needs": {"images": "the images"}}
    return PublicData(**options, read=lambda folder: items, exchange=exchange, **changes)


@pytest.fixture
def download(tmp_path):
    folder = tmp_path / "download"
    (folder / "images").mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (64, 48), (10, 200, 30)).save(folder / "images" / name)
    return folder


def question(number: int, image: str | None = "images/a.png") -> dict:
    return {"question": f"q{number}", "image": image}


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns the content and the change time of all files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_unusable_items_are_counted_by_reason(tmp_path, download):
    png = (download / "images" / "a.png").read_bytes()
    for name, content in (("empty.png", b""), ("text.png", b"not an image"), ("short.png", png[:-20])):
        (download / "images" / name).write_bytes(content)
    (download / "images" / "folder.png").mkdir()
    missing, unreadable = ("none.png", "folder.png"), ("empty.png", "text.png", "short.png")
    images = [f"images/{name}" for name in (*missing, *unreadable)]
    outside = ["../away.png", "/etc/passwd", "images/../../away.png"]
    contents = [question(number, image) for number, image in enumerate([*images, *outside])]
    contents += [{"bad": "no answer"}, {"image": "images/a.png"}, question(9), question(10, "images/b.jpg")]
    made = prepare(data_of(*contents), "made", download, tmp_path / "root")
    assert made.skipped == {
        "its image is missing": ["n0", "n1"],
        "its image cannot be read": ["n2", "n3", "n4"],
        "the name of its image leads out of the folder": ["n5", "n6", "n7"],
        "no answer": ["n8"],
        "no text under 'question'": ["n9"],
    }
    assert made.lines()[0] in (
        "skipped 3 items: its image cannot be read (the first is n2)",
        "skipped 3 items: the name of its image leads out of the folder (the first is n5)",
    )
    assert made.lines()[-1] == "skipped 1 item: no text under 'question' (the first is n9)"
    assert (made.num_items, made.num_records) == (12, 2)
    records = json.loads((tmp_path / "root" / "made.json").read_text())
    assert [(record["id"], record["image"]) for record in records] == [
        ("made-n10", "tree/images/a.png"),
        ("made-n11", "tree/images/b.jpg"),
    ]
    assert {"tree/images/a.png", "tree/images/b.jpg", "made.json", "registry.yaml"} == files_of(
        tmp_path / "root"
    ).keys()


def test_nothing_usable_is_an_error(tmp_path, download):
    with pytest.raises(UserError, match=r"no item of Made can be used; skipped 2 items: no answer \(the first is n0\)"):
        prepare(data_of({"bad": "no answer"}, {"bad": "no answer"}), "made", download, tmp_path / "root")
    with pytest.raises(UserError, match="no item of Made can be used; it holds none"):
        prepare(data_of(), "made", download, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_second_run_changes_nothing(tmp_path, download):
    data = data_of(*(question(number) for number in range(20)))
    prepare(data, "made", download, tmp_path / "root", seed=5)
    first = files_of(tmp_path / "root")
    (tmp_path / "root" / "made.json").unlink()
    prepare(data, "made", download, tmp_path / "root", seed=5)
    second = files_of(tmp_path / "root")
    assert {name: content for name, (content, _) in first.items()} == {
        name: content for name, (content, _) in second.items()
    }
    assert (
        first["tree/images/a.png"] == second["tree/images/a.png"] and first["registry.yaml"] == second["registry.yaml"]
    )
    prepare(data, "made", download, tmp_path / "root", seed=6)
    assert files_of(tmp_path / "root")["made.json"][0] != first["made.json"][0]


def test_an_interrupted_run_leaves_no_records_and_resumes(tmp_path, download):
    data = data_of(question(0), question(1, "images/b.jpg"))
    expected = tmp_path / "expected"
    prepare(data, "made", download, expected)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, "made", download, tmp_path / "root", progress=interrupt)
    assert files_of(tmp_path / "root").keys() == {"tree/images/a.png"}
    seen = []
    prepare(data, "made", download, tmp_path / "root", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert files_of(tmp_path / "root") == {
        name: (content, files_of(tmp_path / "root")[name][1]) for name, (content, _) in files_of(expected).items()
    }


def test_items_are_drawn_by_the_seed_in_their_order(tmp_path, download):
    contents = [question(number) for number in range(50)]

    def drawn(data, **options) -> list[int]:
        prepare(data, "made", download, tmp_path / "root", **options)
        return [int(record["id"][6:]) for record in json.loads((tmp_path / "root" / "made.json").read_text())]

    some = drawn(data_of(*contents), num_records=10, seed=1)
    assert some == sorted(set(some)) and len(some) == 10
    assert drawn(data_of(*contents, num_records=10), seed=1) == some
    assert drawn(data_of(*contents, num_records=10), seed=2) != some
    assert drawn(data_of(*contents, num_records=10), num_records=0) == drawn(data_of(*contents)) == list(range(50))
    assert drawn(data_of(*contents), num_records=99) == list(range(50))


def test_images_are_linked_or_copied(tmp_path, download, monkeypatch):
    source = download / "images" / "a.png"
    prepare(data_of(question(0)), "made", download, tmp_path / "linked")
    assert os.path.samefile(source, tmp_path / "linked" / "tree" / "images" / "a.png")

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prepare(data_of(question(0)), "made", download, tmp_path / "copied")
    copy = tmp_path / "copied" / "tree" / "images" / "a.png"
    assert copy.read_bytes() == source.read_bytes() and not os.path.samefile(source, copy)
    # an image in place is kept, a damaged one is replaced
    Image.new("RGB", (640, 480), (1, 2, 3)).save(source)
    before = copy.read_bytes()
    prepare(data_of(question(0)), "made", download, tmp_path / "copied")
    assert copy.read_bytes() == before
    copy.write_bytes(before[:-9])
    prepare(data_of(question(0)), "made", download, tmp_path / "copied")
    assert copy.read_bytes() == source.read_bytes()


def test_a_link_that_a_killed_run_left_is_not_written_through(tmp_path, download):
    """In a container, every run may have the same process ID."""
    folder, other = tmp_path / "root" / "tree" / "images", download / "images" / "b.jpg"
    folder.mkdir(parents=True)
    os.link(other, folder / f".{os.getpid()}.partial")
    before = other.read_bytes()
    prepare(data_of(question(0)), "made", download, tmp_path / "root")
    assert other.read_bytes() == before and os.path.samefile(download / "images" / "a.png", folder / "a.png")


def test_the_download_may_be_the_root(tmp_path, download):
    (download / "tree").mkdir()
    (download / "images").rename(download / "tree" / "images")
    data = data_of(question(0, "tree/images/a.png"))

    def in_place(item, rng):
        return Exchange(("q", "a"), item.content["image"], item.content["image"])

    data = PublicData(title="Made", page="", needs={"tree": ""}, read=data.read, exchange=in_place)
    prepare(data, "made", download, download)
    assert files_of(download).keys() == {"tree/images/a.png", "tree/images/b.jpg", "made.json", "registry.yaml"}


def test_the_registry_keeps_other_entries(tmp_path, download):
    registry = tmp_path / "registry.yaml"
    registry.write_text("# my data\nother: {images: ., annotations: other.json, weight: 2.0}")
    prepare(data_of(question(0)), "made", download, tmp_path)
    text = registry.read_text()
    assert text.startswith("# my data\nother: {images: ., annotations: other.json, weight: 2.0}\nmade:\n")
    (tmp_path / "other.json").write_text("[]")
    made, other = choose_datasets(read_registry(registry), "made+other")
    assert (made.format, made.images, other.weight) == ("llava", str(tmp_path / "."), 2.0)
    registry.write_text(text.replace("weight: 1.0", "weight: 0.5"))
    prepare(data_of(question(0)), "made", download, tmp_path)
    assert read_registry(registry)["made"].weight == 0.5
    registry.write_text("[broken")
    with pytest.raises(UserError, match="not valid YAML"):
        prepare(data_of(question(0)), "made", download, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{other: {images: ., annotations: o.json}}\n", "entry cannot be appended"),
        (b"other: {images: ., annotations: o.json}\n...\n", "entry cannot be appended"),
        ("other: {images: ., annotations: o.json}\n".encode("utf-16"), "entry cannot be appended"),
        (b"- other\n", "holds no mapping"),
        (b"[broken", "not valid YAML"),
    ],
)
def test_a_registry_that_would_be_damaged_is_refused_at_once(tmp_path, download, content, message):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "registry.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(data_of(question(0)), "made", download, tmp_path / "root")
    assert {name: data for name, (data, _) in files_of(tmp_path / "root").items()} == {"registry.yaml": content}


def test_markers_in_texts_are_removed(tmp_path, download):
    def marked(item, rng):
        return Exchange(
            ("where is <image> here?", "<image>\nright", "why?", item.content["answer"]), *["images/a.png"] * 2
        )

    data = PublicData(
        title="Made",
        page="",
        needs={},
        read=lambda folder: [Item("1", {"answer": "so"}), Item("2", {"answer": " <image>"})],
        exchange=marked,
    )
    made = prepare(data, "made", download, tmp_path / "root")
    assert made.skipped == {"a question or answer is empty": ["2"]}
    (record,) = json.loads((tmp_path / "root" / "made.json").read_text())
    texts = [turn["value"] for turn in record["conversations"]]
    assert texts == ["<image>\nwhere is  here?", "right", "why?", "so"]


def test_long_names(tmp_path, download):
    long = "é" * 125 + ".png"
    (download / "images" / "a.png").rename(download / "images" / long)
    contents = [question(0, f"images/{'x' * 300}.png"), question(1, f"images/{long}")]
    made = prepare(data_of(*contents), "made", download, tmp_path / "root")
    assert made.skipped == {"its image is missing": ["n0"]}
    assert (tmp_path / "root" / "tree" / "images" / long).is_file()


def test_records_of_others_are_kept(tmp_path, download):
    (tmp_path / "made.json").write_text("[]")
    with pytest.raises(
        UserError, match="made.json exists, but .*registry.yaml does not list it; move it away or choose"
    ):
        prepare(data_of(question(0)), "made", download, tmp_path)
    assert (tmp_path / "made.json").read_text() == "[]" and not (tmp_path / "tree").exists()


def test_an_output_that_cannot_be_written(tmp_path, download):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        for image in ("images/a.png", None):
            with pytest.raises(UserError, match=f"{root}: .*file is not a folder; choose another output"):
                prepare(data_of(question(0, image)), "made", download, root)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "tree").write_text("")
    with pytest.raises(UserError, match="a.png: cannot be written .*the same command resumes"):
        prepare(data_of(question(0)), "made", download, tmp_path / "root")
    assert files_of(tmp_path / "root").keys() == {"tree"}


def test_a_full_disk_leaves_no_part_of_an_image(tmp_path, download, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    def fill(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(UserError, match="a.png: cannot be written .No space left on device.*the same command resumes"):
        prepare(data_of(question(0)), "made", download, tmp_path / "root")
    assert not files_of(tmp_path / "root")


def test_the_command_line(tmp_path, capsys):
    download, root = write_download(tmp_path / "download", "scienceqa"), tmp_path / "root"
    command = ["slime-scienceqa", "--source", str(download), "--output", str(root)]
    assert make_data.main(command) == 0
    said = capsys.readouterr().err
    assert f"wrote 2 of 2 items as data set scienceqa; data.registry: {root}/registry.yaml\n" in said and "2/2" in said
    # the image in place is a link to it
    (download / "train" / "1" / "image.png").write_text("no image")
    assert make_data.main(command) == 0
    said = capsys.readouterr().err
    assert "skipped 1 item: its image cannot be read (the first is 1)\nwrote 1 of 2 items" in said
    assert make_data.main([*command, "--num_records", "1", "--seed", "2"]) == 0
    capsys.readouterr()
    for wrong, part in (
        (["--num_records", "-1"], "--num_records is -1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--source", str(tmp_path / "none")], "problems.json not found: ScienceQA needs problems.json, train in one"),
    ):
        assert make_data.main([*command, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and part in error and error.count("\n") == 1
    (download / "problems.json").write_text('{"1": {},\n "2": oops}')
    assert make_data.main(command) == 2
    assert f"{download}/problems.json, line 2: not JSON" in capsys.readouterr().err


def test_drawn_pages_and_records_share_a_registry(tmp_path, capsys):
    download, root, text = write_download(tmp_path / "download", "dvqa"), tmp_path / "root", tmp_path / "text.txt"
    text.write_text("some words " * 50)
    records = ["slime-dvqa", "--source", str(download), "--output", str(root)]
    pages = ["pages", "--text", str(text), "--output", str(root), "--num_images", "1", "--size", "320", "64"]
    for command in (records, pages, records, pages):
        assert make_data.main(command) == 0
    assert [(name, entry.format) for name, entry in read_registry(root / "registry.yaml").items()] == [
        ("dvqa", "llava"),
        ("root", "vary"),
    ]


def test_every_source_has_a_command(capsys):
    for (family, name), data in public_data().items():
        with pytest.raises(SystemExit) as ended:
            make_data.main([f"{family}-{name}", "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and data.title in shown and data.page in shown
        assert all(f"  {path} " in shown for path in (*data.needs, *data.takes))


def test_the_command_names_files_that_may_be_missing(capsys):
    with pytest.raises(SystemExit):
        make_data.main(["slime-geometry3k", "--help"])
    assert "  val                         optional: val.zip, unpacked" in capsys.readouterr().out
