import json

import pytest

from mindvlm.core.errors import UserError
from mindvlm.datagen.charts import ChartMaker, ChartOptions
from mindvlm.datagen.dataset import _Job, make_dataset
from mindvlm.tools import make_data
from mindvlm.training.datasets.registry import choose_datasets, read_registry

OPTIONS = ChartOptions(size=[256, 256])


def make(folder, num_images=6, **options):
    return make_dataset(ChartMaker, OPTIONS, folder, num_images=num_images, **{"seed": 3, **options})


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "registry.yaml"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_processes_and_interruptions_change_nothing(tmp_path, monkeypatch):
    counts = []
    assert make(tmp_path / "one", progress=counts.append) == 6 and counts == [0, 1, 2, 3, 4, 5, 6]
    assert make(tmp_path / "two", num_workers=2) == 6
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole

    real_make, calls = _Job.make, []

    def stop_at_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real_make(*arguments)

    monkeypatch.setattr(_Job, "make", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "three")
    monkeypatch.setattr(_Job, "make", real_make)
    assert not (tmp_path / "three" / "annotations.json").exists()
    with open(tmp_path / "three" / ".annotations.partial", "a") as file:
        file.write('[2, {"imag')
    assert make(tmp_path / "three") == 4
    assert contents(tmp_path / "three") == whole


def test_a_finished_folder_is_only_added_to(tmp_path):
    make(tmp_path / "a", 4)
    assert make(tmp_path / "a", 4) == 0
    assert make(tmp_path / "a", 6) == 2
    make(tmp_path / "b", 6)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (tmp_path / "a" / "images" / "000" / "000001.png").unlink()
    assert make(tmp_path / "a", 6) == 1


def test_the_registry_leads_to_the_pictures(tmp_path):
    make(tmp_path / "charts 图")
    (entry,) = choose_datasets(read_registry(tmp_path / "charts 图" / "registry.yaml"), "charts_图")
    records = json.loads(open(entry.annotations, encoding="utf-8").read())
    assert len(records) == 6
    for record in records:
        assert (tmp_path / "charts 图" / record["image"]).is_file()
        assert record["conversations"][0]["value"].startswith("<image>\n")


def test_other_options_are_refused(tmp_path):
    make(tmp_path / "a", 1)
    with pytest.raises(UserError, match="holds pictures made with seed 3, not 4; delete it or choose another output"):
        make(tmp_path / "a", 1, seed=4)
    with pytest.raises(UserError, match=r"made with size \[256, 256\], not \[300, 256\]"):
        make_dataset(ChartMaker, ChartOptions(size=[300, 256]), tmp_path / "a", num_images=1, seed=3)
    job = tmp_path / "a" / ".job.json"
    description = json.loads(job.read_text())
    assert description.pop("version") == 2
    # an earlier version drew charts in another style and recorded none
    job.write_text(json.dumps(description))
    with pytest.raises(UserError, match="made with version 1, not 2; delete it or choose another output"):
        make(tmp_path / "a", 1)
    (tmp_path / "b" / "images").mkdir(parents=True)
    (tmp_path / "b" / "annotations.json").write_text("[]")
    with pytest.raises(UserError, match="holds other data"):
        make(tmp_path / "b", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make(tmp_path / "file", 1)


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("Some words to set, and more of them.\n" * 50)
    command = ["pages", "--text", str(tmp_path / "book.txt"), "--output", str(tmp_path / "out"), "--num_images", "2"]
    assert make_data.main([*command, "--size", "300", "200", "--workers", "1", "--image_format", "jpg"]) == 0
    said = capsys.readouterr().err
    assert "made 2 of 2 images; data.registry:" in said and "2/2" in said
    assert (tmp_path / "out" / "images" / "000" / "000001.jpg").is_file()
    assert make_data.main([*command[:2], str(tmp_path / "none.txt"), *command[3:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: text file") and error.count("\n") == 1
    assert make_data.main(["charts", "--output", str(tmp_path / "c"), "--num_images", "0"]) == 2


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        make_data.main(["--help"])
    assert ended.value.code == 0 and "mindvlm-make-data charts --languages en zh" in capsys.readouterr().out
