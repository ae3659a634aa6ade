"""`mindvlm-evaluate` on a tiny DeLVM: answers, resuming, scores against values computed here, and refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mindvlm
from mindvlm.evaluation import picture_metrics
from mindvlm.evaluation.benchmarks import get_benchmark
from mindvlm.models.delvm.scenes import draw_pair
from mindvlm.models.delvm.token_files import write_token_file
from mindvlm.tools import evaluate as tool
from tests.tiny_delvm import write_training
from tests.tiny_vary import write_tiny_vary

NUM_CODES, EDGE, NUM_PAIRS = 40, 8, 4
KINDS = "picture", "reconstruction"
LINES = {"rain": [64, 100, 20, 64], "blur": [50]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The checkpoint of a training, pairs of two tasks, and files of codes."""
    root = tmp_path_factory.mktemp("evaluate")
    write_training(root / "delvm")
    for task in ("edges", "rain"):
        (root / "pairs" / task).mkdir(parents=True)
        for number in range(NUM_PAIRS):
            for kind, picture in zip(("img", "label"), draw_pair(task, number, seed=4, size=64), strict=True):
                picture.resize((EDGE, EDGE), Image.Resampling.NEAREST).save(root / f"pairs/{task}/{number}_{kind}.png")
    rng = np.random.default_rng(0)
    for task, lengths in LINES.items():
        (root / "codes" / task).mkdir(parents=True)
        write_token_file(root / f"codes/{task}/train.bin", [rng.integers(0, NUM_CODES, n).tolist() for n in lengths])
    return root


@pytest.fixture
def run(folders, tmp_path, capsys, monkeypatch):
    """The tool as a function of its arguments to (status, out, err)."""
    monkeypatch.chdir(tmp_path)

    def evaluate(*argv, model=folders / "delvm") -> tuple[int, str, str]:
        chosen = ["--config_path", model, "--mode", "pynative", "--device", "cpu"] if model else []
        status = tool.main([str(argument) for argument in (*chosen, *argv)])
        return status, *capsys.readouterr()

    return evaluate


def results(folder: str = "evaluation/delvm-pictures") -> dict:
    return json.loads(Path(folder, "results.json").read_text())


def lines(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "answers.jsonl").read_text().splitlines()]


PICTURES = ("--benchmark", "delvm-pictures", "--num_prompts", "2")
CODES = ("--benchmark", "delvm-codes")


def test_codes(run, folders):
    status, out, err = run(*CODES, "--data", folders / "codes", "--batch_size", "2")
    assert status == 0 and "4 of 4 questions" in err
    model = mindvlm.load(folders / "delvm", device="cpu", mode="pynative")
    files = {task: (folders / f"codes/{task}/train.bin").read_text().splitlines() for task in LINES}
    for task, lengths in LINES.items():
        sums = []
        for line, length in zip(files[task], lengths, strict=True):
            if length < 50:
                continue
            codes = np.array(json.loads(line)["tokens"], np.int32)
            logits = model.engine.logits(codes[None]).asnumpy()[0].astype(np.float64)
            losses = np.log(np.exp(logits).sum(-1))[:-1] - logits[np.arange(length - 1), codes[1:]]
            counted = codes[1:] != 0
            hits = (logits[:-1].argmax(-1) == codes[1:])[counted].sum()
            sums.append((losses[counted].sum(), hits, counted.sum()))
        total = np.sum(sums, 0)
        batches = [np.sum(sums[start : start + 2], 0) for start in range(0, len(sums), 2)]
        found = results("evaluation/delvm-codes")["tasks"][task]["model"]
        assert (found["sentences"], found["tokens"]) == (len(sums), total[2])
        assert found["loss"] == pytest.approx(np.mean([loss / count for loss, _, count in batches]), abs=1e-4)
        assert found["accuracy"] == pytest.approx(total[1] / total[2], abs=1e-4)
        assert found["perplexity"] == pytest.approx(np.exp(total[0] / total[2]), rel=1e-4)
        assert f"## {task}" in out
    counting = run(*CODES, "--data", folders / "codes", "--count_code_0", "--output", "all")
    assert counting[0] == 0
    assert results("all")["tasks"]["blur"]["model"]["tokens"] == 49


def test_pictures(run, folders):
    status, out, err = run(*PICTURES, "--data", folders / "pairs", "--grid", "1")
    assert status == 0 and "4 of 4 questions" in err
    # a row of each task: two examples, question, prediction and truth, at least 128 pixels wide
    assert Image.open("evaluation/delvm-pictures/grid.png").size == (7 * 132 + 4, 2 * 148 + 4)
    answers = {answer["question_id"]: answer for answer in lines("evaluation/delvm-pictures")}
    assert len(answers) == 4 and all(key.startswith(("edges/", "rain/")) for key in answers)
    options = tool.build_parser("delvm-pictures").parse_args(["--num_prompts", "2"])
    shown = get_benchmark("delvm-pictures").open(folders / "pairs", options).prompts["edges"]
    asked = [key for key in answers if key.startswith("edges/")]
    names = [*asked, *(f"edges/{picture.name[0]}" for picture, _ in shown)]
    assert sorted(names) == [f"edges/{number}" for number in range(NUM_PAIRS)]
    model = mindvlm.load(folders / "delvm", device="cpu", mode="pynative")
    queries, labels = ([folders / f"pairs/{key}_{kind}.png" for key in asked] for kind in ("img", "label"))
    errors = []
    for key, label, expected in zip(asked, labels, model.complete(queries, shown), strict=True):
        predicted, again = (Image.open(Path("evaluation/delvm-pictures", answers[key][kind])) for kind in KINDS)
        assert predicted.tobytes() == expected.tobytes()
        assert again.tobytes() == model.decode(model.encode([label]))[0].tobytes()
        errors.append(picture_metrics.mean_squared_error(*map(np.asarray, (predicted, Image.open(label)))))
    edges = results()["tasks"]["edges"]
    assert list(edges) == ["prediction", "copy of the nearest example's label", "reconstruction of the label"]
    assert edges["prediction"]["mse"] == pytest.approx(np.mean(errors), abs=1e-4)
    # edges are masks of two colours, rain has none
    assert {"miou", "line_f1", "foreground_iou"} <= edges["prediction"].keys()
    assert results()["tasks"]["rain"]["prediction"].keys() == {"pictures", "mse", "psnr", "ssim"}
    assert "| prediction " in out


def test_a_copy_scores_as_the_label_that_it_is(run, folders, tmp_path):
    """Of queries that equal an example, the nearest label is the true one; answers made elsewhere are scored."""
    rows = []
    for number in range(NUM_PAIRS):
        name = f"made{number}.png"
        Image.open(folders / f"pairs/edges/{number}_label.png").save(tmp_path / name)
        rows.append({"question_id": f"edges/{number}", "picture": name})
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = tmp_path / "shown"
    shown.mkdir()
    for number in range(NUM_PAIRS):
        for kind in ("img", "label"):
            Image.open(folders / f"pairs/edges/{number}_{kind}.png").save(shown / f"x{number}_{kind}.png")
    options = ("--data", folders / "pairs/edges", "--prompt_pairs", shown, "--score", "made.jsonl")
    status, out, err = run("--benchmark", "delvm-pictures", *options, "--threshold", "200", model=None)
    assert status == 0, err
    found = results(".")["tasks"]["edges"]
    for row in ("prediction", "copy of the nearest example's label"):
        assert found[row] == {
            "pictures": 4, "miou": 1, "line_f1": 1, "foreground_iou": 1, "mse": 0, "psnr": 100, "ssim": 1,
        }  # fmt: skip
    assert len(found) == 2 and "reconstruction" not in out
    Image.new("RGB", (EDGE + 8, EDGE + 8)).save(tmp_path / "large.png")
    for kind in KINDS:
        text = "".join(
            json.dumps({"reconstruction": row["picture"], **row, kind: "large.png"}) + "\n" for row in rows[:1]
        )
        others = "".join(json.dumps({"reconstruction": row["picture"], **row}) + "\n" for row in rows[1:])
        (tmp_path / "made.jsonl").write_text(text + others)
        status, _, err = run("--benchmark", "delvm-pictures", *options, model=None)
        assert status == 2 and "pictures of edges have the sizes [(8, 8, 3), (16, 16, 3)]" in err


def test_a_killed_run_resumes(run, folders, monkeypatch):
    whole = run(*PICTURES, "--data", folders / "pairs/rain", "--output", "whole")
    monkeypatch.setattr("mindvlm.evaluation.benchmark.BATCH_SIZE", 1)
    run(*PICTURES, "--data", folders / "pairs/rain", "--output", "killed")
    path = Path("killed/answers.jsonl")
    first = path.read_bytes()
    path.write_bytes(first[:-30])
    status, out, err = run(*PICTURES, "--data", folders / "pairs/rain", "--output", "killed")
    assert status == 0 and "line is not finished and is left out; its question is asked again" in err
    assert "1 of 2 questions are answered" in err and "1 of 1 questions" in err
    assert out == whole[1]
    assert path.read_bytes().startswith(first.splitlines(keepends=True)[0])
    assert sorted(map(str, lines("killed"))) == sorted(map(str, lines("whole")))
    again = run(*PICTURES, "--data", folders / "pairs/rain", "--output", "killed")
    assert again[1] == out and "a second" not in again[2]


def test_a_broken_picture_costs_its_question(run, folders, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for path in (folders / "pairs/rain").iterdir():
        (pairs / path.name).write_bytes(path.read_bytes())
    for number in range(NUM_PAIRS):
        Image.open(pairs / f"{number}_img.png").save(pairs / f"more{number}_img.png")
        Image.open(pairs / f"{number}_label.png").resize((EDGE, EDGE)).save(pairs / f"more{number}_label.png")
    asked = [path for path in pairs.glob("more*_label.png")][:2]
    prompts = folders / "pairs/rain"
    asked[0].write_bytes(b"no picture")
    Image.new("RGB", (EDGE, EDGE + 1)).save(asked[1])
    status, out, err = run("--benchmark", "delvm-pictures", "--data", pairs, "--prompt_pairs", prompts)
    assert status == 1
    assert err.count("cannot be answered") == 2 and "8x8 pixels but" in err and "8x9; give both the same size" in err
    assert "2 questions of 8 have no answer and are not scored" in err
    assert results()["answered"] == 6


def test_what_another_run_made_is_refused(run, folders, tmp_path):
    run(*PICTURES, "--data", folders / "pairs", "--num_queries", "1")
    status, _, err = run(*PICTURES, "--data", folders / "pairs", "--seed", "5")
    assert status == 2 and "line 1 was made with seed 0, not 5; choose another --output" in err
    write_training(tmp_path / "delvm", seed=3)
    status, _, err = run(*PICTURES, "--data", folders / "pairs", model=tmp_path / "delvm")
    assert status == 2 and "is of the model 'delvm@" in err
    status, _, err = run(*PICTURES, "--data", folders / "pairs", "--weights", "int8")
    assert status == 2 and re.search(r"is of the model 'delvm@(\w+)', not 'delvm@\1:int8'", err)
    status, _, err = run(*PICTURES, "--data", folders / "pairs", "--weights", "int7")
    assert status == 2 and err.startswith("error: weights is 'int7'; expected one of auto") and err.count("\n") == 1
    status, _, err = run(*CODES, "--data", folders / "codes", "--output", "evaluation/delvm-pictures")
    assert status == 2 and "was made with benchmark 'delvm-pictures', not 'delvm-codes'" in err
    status, _, err = run(*PICTURES, "--data", folders / "pairs/rain", "--output", "evaluation/delvm-pictures")
    assert status == 2 and "answers 'edges/" in err and "no question of --data" in err


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text * 2, "again; remove one of the two lines"),
        (lambda text: text.replace("question_id", "id"), "line 1 is no answer with a question_id"),
        (lambda text: "{\n" + text, "line 1 is no answer"),
        (lambda text: "[]\n", "line 1 is no answer"),
        (lambda text: '{"question_id": [1]}\n', "line 1 is no answer"),
        (lambda text: re.sub('"correct": [0-9]+', '"correct": Infinity', text), "has no numbers loss, correct and"),
        (lambda text: text.replace('"loss"', '"lost"'), "has no numbers loss, correct and tokens"),
        (lambda text: text.replace("delvm@", "other@", 1), "answers of delvm@"),
        (lambda text: "", "holds no answers"),
    ],
)
def test_a_file_of_answers_that_cannot_be_scored(run, folders, change, message):
    run(*CODES, "--data", folders / "codes")
    path = Path("evaluation/delvm-codes/answers.jsonl")
    path.write_text(change(path.read_text()))
    status, _, err = run(*CODES, "--data", folders / "codes", "--score", path, model=None)
    assert status == 2 and message in err and err.count("\n") == 1


def test_missing_answers_are_said(run, folders):
    run(*CODES, "--data", folders / "codes")
    path = Path("evaluation/delvm-codes/answers.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + '{"question')
    status, _, err = run(*CODES, "--data", folders / "codes", "--score", path, model=None)
    assert status == 1
    assert "the last line is not finished" in err and "1 question of 4 has no answer" in err


def test_data_that_cannot_be_used(run, folders, tmp_path):
    def refusal(*argv, **options) -> str:
        status, _, err = run(*argv, **options)
        assert status == 2 and err.count("\n") == 1
        return err

    pairs = folders / "pairs"
    (tmp_path / "empty").mkdir()
    assert "holds no pairs NAME_img.png" in refusal(*PICTURES, "--data", tmp_path / "empty")
    assert "no such folder" in refusal(*PICTURES, "--data", tmp_path / "none")
    few = refusal("--benchmark", "delvm-pictures", "--data", pairs / "rain", "--num_prompts", "4")
    assert "holds 4 pairs, too few for 4 examples and a question" in few
    assert "all pairs are examples" in refusal(
        "--benchmark", "delvm-pictures", "--data", pairs / "rain", "--prompt_pairs", pairs / "rain"
    )
    assert "holds no task 'snow'; it has edges, rain" in refusal(*PICTURES, "--data", pairs, "--tasks", "snow")
    assert "--threshold is 256; expected 0 to 255" in refusal(*PICTURES, "--data", pairs, "--threshold", "256")
    assert "--num_prompts has no effect" in refusal(*PICTURES, "--data", pairs, "--prompt_pairs", pairs)
    many = tmp_path / "many" / "rain"
    many.mkdir(parents=True)
    for number in range(300):
        for kind in ("img", "label"):
            (many / f"{number}_{kind}.png").hardlink_to(pairs / "rain" / f"0_{kind}.png")
    crowded = run(*PICTURES[:2], "--data", pairs / "rain", "--prompt_pairs", many)
    assert crowded[0] == 2 and "rain: 300 example pairs, a question and its label exceed the context of" in crowded[2]
    codes = tmp_path / "codes"
    codes.mkdir()
    assert "holds no files of codes" in refusal(*CODES, "--data", codes)
    write_token_file(codes / "a.bin", [[1] * 20])
    assert "holds no sentence of 50 codes" in refusal(*CODES, "--data", codes)
    write_token_file(codes / "a.bin", [[1] * 20 + [NUM_CODES] * 40])
    assert f"has the code {NUM_CODES}; expected" in run(*CODES, "--data", codes)[2]
    (codes / "a.bin").write_text("")
    assert "is truncated: it has 0 bytes" in run(*CODES, "--data", codes)[2]
    np.save(tmp_path / "index.npy", np.zeros((0, 2), np.int64))
    (tmp_path / "index.npy").rename(codes / "a.bin.meta")
    assert "holds no lines" in refusal(*CODES, "--data", codes)


def test_a_command_that_cannot_be(run, folders, tmp_path):
    def refusal(*argv, **options) -> str:
        status, _, err = run(*argv, **options)
        assert status == 2 and err.count("\n") == 1
        return err

    pairs = folders / "pairs"
    vary = write_tiny_vary(tmp_path)
    assert "asks for pictures but" in refusal(*PICTURES, "--data", pairs, model=vary)
    refused = refusal("--benchmark", "vqa", "--data", pairs)
    assert "no such benchmark; expected one of" in refused and "delvm-codes, delvm-pictures" in refused
    assert "--benchmark is missing" in refusal("--data", pairs)
    assert "--data is missing" in refusal(*CODES)
    assert "--config_path is missing" in refusal(*CODES, "--data", pairs, model=None)
    assert "--score uses no model" in refusal(*CODES, "--data", pairs, "--score", "x.jsonl")
    assert "cannot be read" in refusal(*CODES, "--data", folders / "codes", "--score", "x.jsonl", model=None)
    assert "--batch_size is 0" in refusal(*CODES, "--data", folders / "codes", "--batch_size", "0")
    (tmp_path / "taken").write_text("")
    assert "--output taken" in refusal(*CODES, "--data", folders / "codes", "--output", "taken")


def test_the_list(run):
    status, out, _ = run("--list", model=None)
    assert status == 0 and "delvm-codes: loss, accuracy" in out and "TASK/NAME_img.png" in out
