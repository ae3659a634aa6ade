"""Every benchmark of questions on a folder of its official form, answered by a model that looks answers up."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from mindvlm.core.errors import UserError
from mindvlm.evaluation.answers import AnswerFiles
from mindvlm.evaluation.benchmarks import benchmarks, get_benchmark
from mindvlm.processing.images.loading import load_image
from mindvlm.tools.evaluate import build_parser
from tests.evaluation.official_folders import FOLDERS, write_folder

# benchmark -> answers in the order of the questions, row -> metric -> value
FIGURES = {
    "gqa": (["Yes.", "Yes", "red"],
            {"all": {"accuracy": 200 / 3}, "open": {"accuracy": 100}, "binary": {"accuracy": 50}}),
    "textvqa": (["stop", "Go!", "the stop"], {"all": {"accuracy": 100}}),
    "chartqa": (["104", "blue", "7.0"],
            {"human": {"relaxed_accuracy": 50}, "mean of parts": {"relaxed_accuracy": 75}}),
    "docvqa": (["LEE", "Ann  Leo", "x"], {"all": {"anls": 100 * (1 + 7 / 8) / 3}}),
    "pope": (["Yes", "No, no", "Yes."], {"adversarial": {"f1": 100, "accuracy": 100}, "random": {"accuracy": 0}}),
    "mme": (["Yes", "no.", "nope"], {"color": {"score": 200}, "OCR": {"score": 0}, "perception": {"score": 200}}),
    "scienceqa": (["B", "B. two", "The answer is A."],
            {"all": {"accuracy": 200 / 3}, "with picture": {"accuracy": 50}}),
    "seed": (["B", "b", "B"],
            {"all": {"accuracy": 200 / 3}, "Identity": {"accuracy": 50}, "video": {"accuracy": 100}}),
    "mmmu": (["(B)", "It is 3.", "none"],
            {"all": {"accuracy": 200 / 3}, "Art": {"accuracy": 100}, "Math": {"accuracy": 0}}),
    "mathvista": (["No", "3", "1.25"], {"all": {"accuracy": 100}, "counting": {"accuracy": 100}}),
    "mathvision": (["It is 60.", "(A)\n", "The answer is 2"], {"all": {"accuracy": 100}}),
    "amber": (["a dog", "No", "no"], {"existence": {"accuracy": 99.9}, "state": {"accuracy": 0}}),
    "page-ocr": (["the cat sat on the mat", "one two", "q"],
            {"all": {"precision": 2 / 3, "recall": (1 + 2 / 5) / 3}}),
    "scenes": (["Yes.", "yes", "2"],
            {"all": {"accuracy": 200 / 3, "majority_answer": 200 / 3}, "colour": {"accuracy": 50}}),
    "refcoco": (["[000, 000, 250, 500]", "x", "[600, 0, 750, 500]"], {"all": {"accuracy": 200 / 3}}),
}  # fmt: skip
FIGURES |= {"refcoco+": FIGURES["refcoco"], "refcocog": FIGURES["refcoco"]}
SERVED = {
    "vqav2": ("vqav2_submission.json", [{"question_id": 10, "answer": "red car"}, {"question_id": 11, "answer": "2"},
                                        {"question_id": 12, "answer": "yes"}, {"question_id": 13, "answer": ""}]),
    "vizwiz": ("vizwiz_submission.json", [{"image": "v0.jpg", "answer": "red car"}, {"image": "v1.jpg", "answer": "2"},
                                          {"image": "v2.jpg", "answer": "yes"}]),
    "mm-vet": ("mm-vet_submission.json", {"v1_0": "The red car.", "v1_1": "two", "v1_2": "Yes"}),
}  # fmt: skip
TEXTS = ["The red car.", "two", "Yes"]


class LookUp:
    """A model that answers from a list, in reverse order, after it has read the pictures."""

    def __init__(self, texts: list[str]):
        self.texts, self.asked = texts, []

    def generate_each(self, queries, num_queries, **options):
        assert options["do_sample"] is False
        found = []
        for number, (query, images) in enumerate(queries):
            self.asked.append(query)
            try:
                assert all(load_image(image).size == (24, 16) for image in images)
                found.append((number, self.texts[number]))
            except UserError as error:
                found.append((number, error))
        yield from reversed(found)


def options_of(name: str, *argv: str, score: bool = False) -> Namespace:
    return build_parser(name).parse_args([*argv, *(["--score", "x"] if score else [])])


def run(name: str, folder: Path, output: Path, texts: list[str], *argv: str):
    """Answers and scores. Returns questions, model, answers and scores."""
    output.mkdir(parents=True, exist_ok=True)
    questions = get_benchmark(name).open(folder, options_of(name, *argv))
    model, answers = LookUp(texts), {}
    for found in questions.answers(model, questions.ids, output):
        assert not found.errors
        answers |= found.answers
    return questions, model, answers, questions.score(answers, output, output)


@pytest.fixture(params=sorted(FOLDERS))
def folder(request, tmp_path) -> tuple[str, Path]:
    if request.param == "mmmu":
        pytest.importorskip("pyarrow")
    if request.param.startswith("mmbench"):
        pytest.importorskip("openpyxl")
    return request.param, write_folder(request.param, tmp_path / "data")


def test_every_benchmark_has_a_folder_here():
    assert set(FOLDERS) == {name for name in benchmarks() if not name.startswith("delvm")}


def test_three_questions_are_answered_and_scored(folder, tmp_path):
    name, data = folder
    texts, expected = FIGURES.get(name, (TEXTS, {}))
    questions, model, answers, scores = run(name, data, tmp_path / "out", texts)
    assert len(questions.ids) == len(answers) == 3
    rows = scores.tables.get(name, {})
    for row, figures in expected.items():
        for metric, value in figures.items():
            assert rows[row][metric] == pytest.approx(value, abs=1e-3), (row, metric)
            low, high = scores.intervals[name][row][metric]
            assert low <= rows[row][metric] + 1e-9 and rows[row][metric] <= high + 1e-9
    if name in SERVED:
        file, content = SERVED[name]
        assert not rows and json.loads((tmp_path / "out" / file).read_text()) == content
    assert rows or scores.files or scores.notes
    # answers of this library are read again, in any order, and with the ids of the original programs
    files = AnswerFiles(name, "m", questions)
    files.append(tmp_path / "again.jsonl", dict(reversed(answers.items())))
    files.read(tmp_path / "again.jsonl")
    assert files.answers == answers
    without_pictures = get_benchmark(name).open(data, options_of(name, score=True))
    assert without_pictures.ids == questions.ids


def test_the_help_names_what_compat_repeats():
    for name in FOLDERS:
        text = " ".join(build_parser(name).format_help().split())
        assert "--compat repeat errors of the original programs" in text
        note = get_benchmark(name).open.args[1].compat_note
        assert note in text, name


def test_missing_files_are_named_with_their_origin(folder, tmp_path):
    name, data = folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="lacks . file.*from") as error:
        get_benchmark(name).open(tmp_path / "empty", options_of(name))
    for path in (path for path in data.rglob("*") if path.is_file() and path.suffix not in (".jpg", ".png", ".txt")):
        if path.parent.name in ("SEED-Bench-image", "Art", "Math"):
            continue
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(UserError) as error:
            get_benchmark(name).open(data, options_of(name, *(["--split", "test"] if "test_v1" in path.name else [])))
        stem = path.name.split("_v1")[0]
        assert stem in str(error.value) and "from " in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(content)


def test_another_version_of_a_file_is_one_line(folder):
    name, data = folder
    for path in (path for path in data.rglob("*") if path.suffix in (".json", ".jsonl", ".tsv", ".p")):
        content = path.read_bytes()
        for other in (b"", b"{}", b"[1]", b'{"a": 1}\n', b'[{"a": 1}]', content[: len(content) // 2]):
            path.write_bytes(other)
            try:
                questions = get_benchmark(name).open(data, options_of(name))
            except UserError as error:
                assert "\n" not in str(error) and str(data) in str(error)
            else:
                assert questions.ids
        path.write_bytes(content)


def test_prompts_are_those_of_the_original_programs(tmp_path):
    def asked(name: str, *argv: str) -> list[str]:
        data = write_folder(name, tmp_path / f"{name}-data")
        return run(name, data, tmp_path / name, TEXTS * 3, *argv)[1].asked

    short = "\nAnswer the question using a single word or phrase."
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert asked("chartqa")[0] == f"How much 0?{short}"
    assert asked("gqa")[2] == f"Is it 2?{short}"
    assert asked("mme")[0] == f"Is it red?{short}"
    assert asked("scienceqa") == [
        f"{mark}Context: A hint.\nQuestion: Which {n}?\nOptions: (A) one (B) two{letter}"
        for n, mark in enumerate(["", "<image>\n", "<image>\n"])
    ]
    assert asked("amber") == [
        "Describe this image.", f"Is there a dog in this image?{short}", f"Is the sky blue in this image?{short}",
    ]  # fmt: skip
    assert asked("mmbench")[0] == f"A hint.\nWhich 0?\nA. left\nB. right{letter}"
    assert asked("mmbench-cn")[1] == "Which 1?\nA. left\nB. right\n请直接回答选项字母。"
    rounds = asked("mmbench", "--all_rounds")
    assert len(rounds) == 6 and rounds[3] == f"Which 1?\nA. right\nB. left{letter}"
    assert asked("mathvision")[2] == (f"Which?\n<image1>\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n(E) 5\n{short}")
    pytest.importorskip("pyarrow")
    assert asked("mmmu")[:2] == [
        f"What <image 1>?\n\n(A) red cat\n(B) dog\n\n{letter}", f"How many <image 1>?\n\n{short[1:]}",
    ]  # fmt: skip


def test_the_sheet_of_mmbench(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    run("mmbench", write_folder("mmbench", tmp_path / "data"), tmp_path, TEXTS)
    sheet = openpyxl.load_workbook(tmp_path / "mmbench_submission.xlsx").active
    rows = [[cell.value for cell in row] for row in sheet.iter_rows()]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert rows[1] == [0, "Which 0?", "left", "right", None, None, "The red car.", "A", "dev"]


def test_splits_without_public_answers_are_only_written(tmp_path):
    data = write_folder("docvqa", tmp_path / "data")
    scores = run("docvqa", data, tmp_path, TEXTS, "--split", "test")[-1]
    assert not scores.tables and not scores.notes
    rows = json.loads((tmp_path / "docvqa_submission.json").read_text())
    assert rows[1] == {"questionId": 101, "answer": "two"}


def test_answers_to_other_prompts_are_noted(tmp_path):
    questions, _, answers, _ = run("pope", write_folder("pope", tmp_path / "data"), tmp_path, TEXTS)
    answers["1"] = {**answers["1"], "prompt": "Why?"}
    (note,) = questions.score(answers, tmp_path, tmp_path).notes
    assert "1 answer of 3 were given to other prompts than those of pope, first '1'" in note


def test_a_pickle_cannot_run_code(tmp_path):
    data = write_folder("refcoco", tmp_path)
    (data / "refcoco/refs(unc).p").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="it holds os.system"):
        get_benchmark("refcoco").open(data, options_of("refcoco"))
