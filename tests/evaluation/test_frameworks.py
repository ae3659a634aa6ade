"""lmms-eval and VLMEvalKit, as PyPI has them, ask a tiny model two questions."""

import base64
import csv
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import mindvlm
from tests.evaluation.framework_environments import environment
from tests.tiny_tinyllava import write_tiny_tinyllava

pytestmark = pytest.mark.slow
QUESTION = "What colour is it?"
COLOURS = ("Red", "Blue")
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: "{{{{answer}}}}"
"""
TASKS = {
    "colours": "generation_kwargs: {max_new_tokens: 3}\nmetric_list: [{metric: exact_match, aggregation: mean}]\n",
    "turns": "doc_to_messages: !function utils.turns\ngeneration_kwargs: {max_new_tokens: 3}\n"
    "metric_list: [{metric: exact_match, aggregation: mean}]\n",
    "choices": "output_type: multiple_choice\ndoc_to_choice: [Red, Blue]\nmetric_list: [{metric: acc}]\n",
    "rounds": "output_type: generate_until_multi_round\ngeneration_kwargs: {max_new_tokens: 3}\n"
    "process_results: !function utils.last\nmetric_list: [{metric: last, aggregation: mean, higher_is_better: true}]\n",
}
UTILS = """
def visual(doc):
    return [doc["image"]]


def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=0, previous_round_info=None):
    if previous_output is None:
        return doc["question"]
    return visual(doc), f"Really {previous_output[-1]}?", round_idx == 2, previous_output, None


def last(doc, results):
    return {"last": float(results[0][-1] == doc["answer"])}


def turns(doc):
    picture = {"type": "image", "url": doc["image"]}
    return [
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, picture]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": doc["question"]}]},
    ]
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    longer = {"max_position_embeddings": 1024, "tokenizer_model_max_length": 1024}
    return write_tiny_tinyllava(tmp_path_factory.mktemp("model"), **longer)


@pytest.fixture(scope="module")
def model(model_folder):
    return mindvlm.load(model_folder, mode="pynative", device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    return [folder / f"{colour}.png" for colour in COLOURS]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=variables)


@pytest.fixture(scope="module")
def lmms_eval(model_folder, pictures, tmp_path_factory):
    """Returns a function that runs tasks and returns their samples and everything that was printed."""
    commands = environment("lmms_eval")
    folder = tmp_path_factory.mktemp("lmms_eval")
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"question": QUESTION, "image": str(path), "answer": path.stem} for path in pictures]
    rows.append({**rows[0], "image": str(folder / "missing.png")})
    for name, kind in TASKS.items():
        lines = TASK.format(folder=folder)
        if name != "colours":
            lines = lines.replace("questions.jsonl", "sound.jsonl")
        (tasks / f"{name}.yaml").write_text(f"task: {name}{lines}{kind}")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sound.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (tasks / "utils.py").write_text(UTILS)

    def run_tasks(*names: str, options: tuple[str, ...] = ()) -> tuple[dict[str, list[dict]], str]:
        output = folder / "-".join(names)
        command = [str(commands / "lmms-eval"), "eval", "--model", "mindvlm", "--tasks", ",".join(names)]
        command += ["--model_args", f"config_path={model_folder},mode=pynative,device=cpu", "--log_samples"]
        command += ["--include_path", str(tasks), "--output_path", str(output), *options]
        done = run(*command, HF_HOME=str(folder / "cache"))
        printed = done.stdout + done.stderr
        samples = {}
        for name in names:
            files = list(output.glob(f"**/*_samples_{name}.jsonl"))
            assert files, printed[-3000:]
            samples[name] = [json.loads(line) for line in files[0].read_text().splitlines()]
        return samples, printed

    return run_tasks


def test_lmms_eval_asks_with_messages(lmms_eval, model, pictures):
    samples, printed = lmms_eval("colours", "turns")
    answers = [model.chat(QUESTION, path, max_new_tokens=3) for path in pictures]
    assert [sample["filtered_resps"] for sample in samples["colours"]] == [*answers, ""]
    counts = {"input_tokens": answers[0].num_prompt_tokens, "output_tokens": answers[0].num_new_tokens}
    assert samples["colours"][0]["token_counts"] == [counts]
    assert "missing.png" in printed and "cannot be answered, its answer is empty" in printed
    answers = [model.chat(QUESTION, path, [("Look:<image>", "yes")], max_new_tokens=3) for path in pictures]
    assert [sample["filtered_resps"] for sample in samples["turns"]] == answers


def test_lmms_eval_asks_for_options_and_in_rounds(lmms_eval, model, pictures):
    samples, _ = lmms_eval("choices", "rounds", options=("--force_simple",))
    for sample, path in zip(samples["choices"], pictures, strict=True):
        losses = [-model.reply_probabilities(QUESTION, colour, path)[0].mean() for colour in COLOURS]
        assert [float(loss) for loss, _ in sample["filtered_resps"]] == pytest.approx(losses)
        assert sample["acc"] == (min(zip(losses, COLOURS, strict=True))[1] == path.stem)
    for sample, path in zip(samples["rounds"], pictures, strict=True):
        first = model.chat(QUESTION, path, max_new_tokens=3)
        second = model.chat(f"Really {first}?", path, max_new_tokens=3)
        assert sample["filtered_resps"] == [first, second]


def write_choices(table: Path, questions: list[str], pictures: list[Path]) -> None:
    """Writes a benchmark of VLMEvalKit with two options, of which each is right in turn."""
    rows = [["index", "question", "A", "B", "answer", "image"]]
    for number, (question, path) in enumerate(zip(questions, pictures, strict=True)):
        content = io.BytesIO()
        Image.open(path).convert("RGB").save(content, "JPEG", quality=95)
        picture = base64.b64encode(content.getvalue()).decode()
        rows.append([str(number), question, *COLOURS, "AB"[number % 2], picture])
    table.parent.mkdir()
    table.write_text("".join("\t".join(row) + "\n" for row in rows))


def choice_prompt(question: str) -> str:
    """Returns the prompt that VLMEvalKit makes of such a question."""
    options = "".join(f"{letter}. {colour}\n" for letter, colour in zip("AB", COLOURS, strict=True))
    return f"Question: {question}\nOptions:\n{options}Please select the correct answer from the options above. \n"


def read_predictions(table: Path) -> dict[str, str]:
    """Returns index -> answer of a table of VLMEvalKit."""
    with open(table, encoding="utf-8", newline="") as file:
        return {row["index"]: row["prediction"] for row in csv.DictReader(file, delimiter="\t")}


def test_vlmevalkit_asks(model_folder, model, pictures, tmp_path):
    commands = environment("vlmeval")
    write_choices(tmp_path / "data" / "COLOURS.tsv", [QUESTION] * len(pictures), pictures)
    command = [
        str(commands / "python"),
        "-m",
        "mindvlm.tools.vlmevalkit",
        "--config_path",
        str(model_folder),
        "--mode",
        "pynative",
    ]
    command += ["--max_new_tokens", "3", "--name", "tiny", "--", "--judge", "exact_matching"]
    command += ["--work-dir", str(tmp_path / "out"), "--data", "COLOURS"]
    variables = {"LMUData": str(tmp_path / "data"), "PRED_FORMAT": "tsv"}

    done = run(*command, **variables)

    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (file,) = (tmp_path / "out").glob("tiny/**/tiny_COLOURS.tsv")
    dumped = sorted((tmp_path / "data" / "images" / "COLOURS").iterdir())
    answers = [model.chat(choice_prompt(QUESTION), path, max_new_tokens=3) for path in dumped]
    assert list(read_predictions(file).values()) == answers

    done = run(*command, "NONE", **variables)
    assert done.returncode == 1 and "warning: NONE has no score: invalid_dataset" in done.stderr
