"""The benchmarks that `mindvlm-make-data benchmark` writes are read as the public ones, and are balanced."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mindvlm.evaluation.benchmarks import get_benchmark
from mindvlm.evaluation.comparison import draw_comparison, read_panels
from mindvlm.tools import make_data
from mindvlm.tools.evaluate import build_parser
from tests.datagen.test_scenes import EDGE, seen_things, true_answer

NUM_IMAGES = 48


def written(name: str, folder: Path, seed: int = 5) -> Path:
    arguments = ["benchmark", "--name", name, "--output", str(folder), "--num_images", str(NUM_IMAGES)]
    assert make_data.main([*arguments, "--seed", str(seed)]) == 0
    return folder


def opened(name: str, folder: Path, *options: str):
    return get_benchmark(name).open(folder, build_parser(name).parse_args(list(options)))


def truth_of(name: str, question) -> str:
    return {"mme": lambda: question.truth[1].lower(), "scenes": lambda: question.truth[0]}.get(
        name, lambda: question.truth
    )()


@pytest.mark.parametrize("name", ["scenes", "pope", "mme", "gqa"])
def test_true_answers_score_full_marks(name, tmp_path):
    questions = opened(name, written(name, tmp_path / "data"))
    texts = {key: truth_of(name, one) for key, one in questions.questions.items()}
    answers = {key: {"text": text, "prompt": questions.questions[key].prompt} for key, text in texts.items()}

    figures = questions.score(answers, tmp_path, tmp_path).tables[name]

    row, metric = get_benchmark(name).headline
    assert figures[row][metric] == {"mme": 1000}.get(name, 100)
    assert all(path.is_file() for one in questions.questions.values() for path in one.images)


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_yes_and_no_are_equally_frequent(name, tmp_path):
    questions = opened(name, written(name, tmp_path / "data"))
    counts = Counter((one.group, truth_of(name, one)) for one in questions.questions.values())
    groups = {group for group, _ in counts}
    assert len(groups) == {"pope": 3, "mme": 5}[name]
    assert all(counts[group, "yes"] == counts[group, "no"] > 0 for group in groups)


def test_labels_are_true_of_the_written_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("mindvlm.datagen.benchmark_folders.SIZE", EDGE)
    folder = written("pope", tmp_path / "data")
    import numpy as np

    for category in ("random", "popular", "adversarial"):
        for line in (folder / f"coco/coco_pope_{category}.json").read_text().splitlines():
            row = json.loads(line)
            things = seen_things(np.asarray(Image.open(folder / "val2014" / row["image"])))
            assert true_answer(row["text"], things, "") == row["label"]
            if row["label"] == "no":
                colour, shape = row["text"].removesuffix(" in the image?").split()[-2:]
                shared = (colour in {one["colour"] for one in things}) + (shape in {one["shape"] for one in things})
                assert ("random", "popular", "adversarial")[shared] == category


def test_a_seed_gives_the_same_files(tmp_path):
    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first = content(written("scenes", tmp_path / "a"))
    assert first == content(written("scenes", tmp_path / "b")) != content(written("scenes", tmp_path / "c", seed=6))


def test_blind_shows_one_gray_picture_and_refuses_other_answers(tmp_path):
    folder = written("scenes", tmp_path / "data")
    seeing, blind = opened("scenes", folder), opened("scenes", folder, "--blind")

    assert {one.images for one in blind.questions.values()} == {(folder / "gray.png",)}
    assert len({one.images for one in seeing.questions.values()}) == NUM_IMAGES
    assert blind.settings["blind"] and not seeing.settings["blind"]
    assert len(set(Image.open(folder / "gray.png").getdata())) == 1


@pytest.mark.parametrize("change", [["--seed", "6"], ["--name", "pope"]])
def test_a_folder_of_other_data_is_kept(change, tmp_path, capsys):
    folder = written("scenes", tmp_path / "data")
    before = sorted(folder.rglob("*"))
    capsys.readouterr()

    arguments = ["benchmark", "--output", str(folder), "--num_images", "2", "--seed", "5", *change]
    assert make_data.main(arguments) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line and "choose another output" in line and sorted(folder.rglob("*")) == before


def test_drawn_figures_stand_beside_no_published_ones(tmp_path):
    results = {"benchmark": "pope", "model": "nano@1", "tasks": {"pope": {"mean of categories": {"f1": 90.0}}}}
    for name, more in (("seen", {}), ("made", {"drawn": True}), ("guessed", {"drawn": True, "blind": True})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results | more))

    panels = read_panels([tmp_path / name for name in ("seen", "made", "guessed")])

    assert [bar.label for bar in panels["pope (drawn)"]] == ["nano", "nano, blind"]
    assert len(panels["pope"]) > 1
    pytest.importorskip("matplotlib")
    titles = [axis.get_title(loc="left") for axis in draw_comparison(panels).axes]
    assert titles == ["pope mean of categories f1", "pope (drawn) mean of categories f1"]


def test_lines_are_read_as_pages(tmp_path):
    questions = opened("page-ocr", written("page-ocr", tmp_path / "data"))
    answers = {key: {"text": one.truth, "prompt": one.prompt} for key, one in questions.questions.items()}

    assert len(answers) == NUM_IMAGES
    assert questions.score(answers, tmp_path, tmp_path).tables["page-ocr"]["all"]["edit_distance"] == 0
