"""lmms-eval and VLMEvalKit ask `mindvlm-serve` through their models for APIs, as docs/serving.md says."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

import mindvlm
from mindvlm.tools import make_data
from tests.evaluation.framework_environments import ROOT, environment
from tests.evaluation.test_frameworks import choice_prompt, read_predictions, run, write_choices
from tests.serving.running import wait_for

pytestmark = pytest.mark.slow
CONFIG = ROOT / "configs" / "tinyllava" / "tinyllava_nano.yaml"
NUM_QUESTIONS = 40
TASK = """
task: shapes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
UTILS = """
from PIL import Image


def visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")]
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[dict]:
    """Questions about drawn scenes, and the answers of the library."""
    folder = tmp_path_factory.mktemp("scenes")
    arguments = ["--name", "scenes", "--output", str(folder), "--num_images", str(NUM_QUESTIONS), "--seed", "3"]
    assert make_data.main(["benchmark", *arguments]) == 0
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        picture = folder / "images" / row["image"]
        # VLMEvalKit enlarges those of less than 100 pixels
        Image.open(picture).resize((144, 144), Image.Resampling.NEAREST).save(picture)
        row |= {"question": row["text"], "picture": str(picture)}
    return rows


@pytest.fixture(scope="module")
def model():
    return mindvlm.load(CONFIG, mode="pynative", device="cpu")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a server of TinyLLaVA-nano."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "mindvlm.tools.serve", "--config_path", str(CONFIG), "--port", "0"]
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_for(lambda: "listening on" in log.read_text(), 120)
        (found,) = re.findall(r"listening on (http://\S+)", log.read_text())

        def is_ready() -> bool:
            try:
                return urllib.request.urlopen(found.replace("/v1", "/health"), timeout=5).status == 200
            except OSError:
                return False

        wait_for(is_ready, 300)
        yield found
    finally:
        server.terminate()
        assert server.wait(60) == 0, log.read_text()[-2000:]


@pytest.mark.parametrize("kind", ["openai", "async_openai"])
def test_lmms_eval(kind, url, questions, model, tmp_path):
    commands = environment("lmms_eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "shapes.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    command = [str(commands / "lmms-eval"), "eval", "--model", kind, "--model_args", "model_version=tinyllava_nano"]
    command += ["--tasks", "shapes", "--include_path", str(tmp_path / "tasks"), "--log_samples"]

    done = run(
        *command, "--output_path", str(tmp_path / "out"), OPENAI_API_BASE=url, OPENAI_API_KEY="none",
        HF_HOME=str(tmp_path / "cache"),
    )  # fmt: skip

    files = list((tmp_path / "out").glob("**/*_samples_shapes.jsonl"))
    assert files, (done.stdout + done.stderr)[-3000:]
    samples = [json.loads(line) for line in files[0].read_text().splitlines()]
    answers = [model.chat(row["question"], row["picture"], max_new_tokens=16) for row in questions]
    assert [sample["filtered_resps"] for sample in samples] == answers
    assert samples[0]["token_counts"][0]["output_tokens"] == answers[0].num_new_tokens
    right = sum(str(answer).lower() == row["answer"].lower() for answer, row in zip(answers, questions, strict=True))
    (results,) = (tmp_path / "out").glob("**/*_results.json")
    figures = json.loads(results.read_text())["results"]["shapes"]
    assert figures["exact_match,none"] == pytest.approx(right / len(questions)) and right > len(questions) / 2


def test_vlmevalkit(url, questions, model, tmp_path):
    commands = environment("vlmeval")
    table = tmp_path / "data" / "SHAPES.tsv"
    write_choices(table, [row["question"] for row in questions], [Path(row["picture"]) for row in questions])
    command = [str(commands / "python"), "-m", "vlmeval.run", "--base-url", url, "--model", "tinyllava_nano"]
    command += [
        "--key",
        "none",
        "--max-tokens",
        "16",
        "--data",
        "SHAPES",
        "--judge",
        "exact_matching",
        "--work-dir",
        str(tmp_path / "out"),
    ]

    done = run(*command, LMUData=str(tmp_path / "data"), PRED_FORMAT="tsv")

    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (file,) = (tmp_path / "out").glob("**/*_SHAPES.tsv")
    # VLMEvalKit sends the pictures of the table as JPEG once more
    expected = {}
    for number, row in enumerate(questions):
        sent = tmp_path / "sent.jpg"
        Image.open(tmp_path / "data" / "images" / "SHAPES" / f"{number}.png").save(sent)
        expected[str(number)] = str(model.chat(choice_prompt(row["question"]), sent, max_new_tokens=16))
    assert read_predictions(file) == expected
