"""The command line: what it prints where, exit statuses, JSON lines, chat, and every error as one line."""

import base64
import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from mindvlm.tools import predict_llm
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import picture, tiny_model

QUICK = ["--mode", "pynative", "--max_new_tokens", "2"]


def json_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_picture_with_a_fresh_model(folder, images, run):
    status, out, err = run(
        "--image_dir", images / "a.png", "--config_path", folder / "tiny.yaml", "--query", "hi", *QUICK
    )
    model = tiny_model()
    expected = model.chat("hi", str(images / "a.png"), max_new_tokens=2)
    assert (status, out) == (0, f"{expected}\n")
    assert f"loading {folder / 'tiny.safetensors'}" in err
    assert f"{expected.num_prompt_tokens} prompt tokens, 2 new (max_new_tokens)" in err
    for stage in ("compile", "vision", "prefill", "decode", "tokens/s"):
        assert stage in err


def test_a_checkpoint_folder_is_converted_once(images, run, tmp_path, monkeypatch):
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "cache"))
    model = write_tiny_tinyllava(tmp_path)
    command = ["--config_path", model, "--image_dir", images / "a.png", "--query", "hi", *QUICK]
    without, first, second = run(*command, "--no_cache"), run(*command), run(*command)
    assert [status for status, _, _ in (without, first, second)] == [0, 0, 0]
    assert without[1] == first[1] == second[1]
    texts = [err.partition(" prompt tokens")[0] for _, _, err in (without, first, second)]
    assert [text.count("converting ") for text in texts] == [0, 1, 0]
    assert [text.count(f"{tmp_path / 'cache'}") for text in texts] == [0, 1, 1]
    monkeypatch.setenv("MINDVLM_CACHE", str(images / "a.png"))
    status, out, err = run(*command)
    assert (status, out) == (0, without[1])
    assert err.startswith("warning: converted weights are not kept: ") and err.count("\n") == 3


def test_one_picture_with_output(loaded, images, run, tmp_path):
    status, out, _ = run("--image_dir", images / "a.png", "--output", tmp_path / "out.jsonl", "--max_new_tokens", 3)
    answer = tiny_model().chat(predict_llm.DEFAULT_QUERY, str(images / "a.png"), max_new_tokens=3)
    assert (status, out) == (0, f"{answer}\n")
    (record,) = json_lines(tmp_path / "out.jsonl")
    assert record["image"] == str(images / "a.png") and record["query"] == predict_llm.DEFAULT_QUERY
    assert (record["text"], record["stop_reason"]) == (str(answer), "max_new_tokens")
    assert (record["num_prompt_tokens"], record["num_new_tokens"]) == (answer.num_prompt_tokens, 3)
    assert set(record["seconds"]) == {"load", "compile", "vision", "prefill", "decode"}
    assert record["tokens_per_second"] > 0
    assert set(record) == {
        "image", "query", "text", "num_prompt_tokens", "num_new_tokens", "seconds", "tokens_per_second", "stop_reason",
        "time", "model", "settings", "file", "path",
    }  # fmt: skip


def test_several_pictures(loaded, images, run):
    paths = [str(images / name) for name in ("c.JPG", "a.png")]
    status, out, err = run("--image_dir", *paths, "--max_new_tokens", 2)
    answers = [tiny_model().chat(predict_llm.DEFAULT_QUERY, path, max_new_tokens=2) for path in paths]
    assert (status, err) == (0, "")
    assert out == "".join(f"{path}: {answer}\n" for path, answer in zip(paths, answers, strict=True))


def test_several_pictures_in_one_question(loaded, images, run, tmp_path):
    paths, query = [str(images / name) for name in ("c.JPG", "a.png")], "<image> and <image>: what differs?"
    answer = tiny_model().chat(query, paths, max_new_tokens=2)
    status, out, err = run("--image_dir", *paths, "--query", query, "--max_new_tokens", 2)
    assert (status, out) == (0, f"{answer}\n") and f"{answer.num_prompt_tokens} prompt tokens" in err
    output = tmp_path / "out.jsonl"
    assert run("--image_dir", *paths, "--query", query, "--max_new_tokens", 2, "--output", output)[:2] == (0, out)
    (record,) = json_lines(output)
    assert (record["image"], record["text"]) == (paths, str(answer))


def test_one_marker_asks_about_each_picture(loaded, images, run):
    paths = [str(images / name) for name in ("c.JPG", "a.png")]
    answers = [tiny_model().chat("<image> what?", path, max_new_tokens=2) for path in paths]
    _, out, _ = run("--image_dir", *paths, "--query", "<image> what?", "--max_new_tokens", 2)
    assert out == "".join(f"{path}: {answer}\n" for path, answer in zip(paths, answers, strict=True))


def test_one_question_about_a_folder_with_a_broken_picture(loaded, images, run, tmp_path):
    for name in ("c.JPG", "notes.txt"):
        (images / name).unlink()
    query, output = "<image> and <image>?", tmp_path / "out.jsonl"
    status, out, err = run("--image_dir", images, "--query", query, "--output", output)
    (record,) = json_lines(output)
    assert (status, out, err) == (1, "", f"error: {record['error']}\n") and "b.png" in err
    assert record["image"] == [str(images / "a.png"), str(images / "b.png")]


def test_a_folder_goes_on_after_a_broken_picture(loaded, images, run, tmp_path):
    output = tmp_path / "out.jsonl"
    status, out, err = run("--image_dir", images, "--output", output, "--max_new_tokens", 2)
    assert status == 1
    records = json_lines(output)
    assert [os.path.basename(record["image"]) for record in records] == ["a.png", "b.png", "c.JPG"]
    assert ["error" in record for record in records] == [False, True, False]
    assert "b.png" in records[1]["error"] and "text" not in records[1]
    assert f"error: {records[1]['error']}" in err and "1 of 3 pages failed" in err
    assert "b.png" not in out and "Traceback" not in err


def test_a_folder_with_one_broken_picture_is_recorded_too(loaded, images, run, tmp_path):
    for name in ("a.png", "c.JPG"):
        (images / name).unlink()
    status, out, _ = run("--image_dir", images, "--output", tmp_path / "out.jsonl")
    assert (status, out) == (1, "")
    assert "error" in json_lines(tmp_path / "out.jsonl")[0]


@pytest.mark.parametrize(("ending", "file_format"), [("jfif", "JPEG"), ("JP2", "JPEG2000"), ("avif", "AVIF")])
def test_other_endings_in_a_folder_are_read(loaded, run, tmp_path, ending, file_format):
    Image.init()
    if file_format not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {file_format}")
    picture(0).save(tmp_path / f"a.{ending}", file_format)
    status, out, err = run("--image_dir", tmp_path, "--max_new_tokens", 2)
    assert (status, err) == (0, "") and out


def test_what_pillow_does_not_read_in_a_folder_is_named(loaded, images, run, tmp_path):
    (images / "b.png").unlink()
    (images / "b.HEIC").write_bytes(b"\0\0\0\x24ftypheic" + bytes(50))
    (images / "d.svg").write_bytes(b"<svg/>")
    output = tmp_path / "out.jsonl"
    status, _, err = run("--image_dir", images, "--output", output, "--max_new_tokens", 2)
    errors = [record.get("error", "") for record in json_lines(output)]
    assert status == 1 and ["HEIC" in error for error in errors] == [False, True, False]
    assert f"{images}: left out d.svg" in err


def test_sources_of_one_picture(loaded, images, run, monkeypatch):
    monkeypatch.setenv("HOME", str(images))
    data = base64.b64encode((images / "a.png").read_bytes()).decode()
    expected = run("--image_dir", images / "a.png", "--max_new_tokens", 2)[1]
    for source in ("~/a.png", (images / "a.png").as_uri(), f"data:image/png;base64,{data}"):
        assert run("--image_dir", source, "--max_new_tokens", 2)[:2] == (0, expected)


def test_text_only(loaded, run):
    status, out, _ = run("--query", "hello", "--max_new_tokens", 2)
    assert (status, out) == (0, f"{tiny_model().chat('hello', max_new_tokens=2)}\n")


def test_an_empty_answer_is_said_to_be_empty(loaded, run, monkeypatch):
    model = tiny_model()
    stop_id = model.processor.stop_ids[0]
    with monkeypatch.context() as patch:
        patch.setattr(model.engine.sampler, "choose", lambda logits, running: [stop_id] * len(model.engine.slots))
        status, out, err = run("--query", "hello")
    assert (status, out) == (0, "\n") and "1 new (stop_token), the answer is empty, " in err
    assert "empty" not in run("--query", "hello", "--max_new_tokens", 2)[2]


def test_options_reach_model_and_generation(loaded, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = {}
    model = tiny_model()
    chat = model.chat
    monkeypatch.setattr(model, "chat", lambda *a, **options: asked.update(options) or chat(*a, **options))
    options = ["--do_sample", "no", "--temperature", "0.5", "--top_k", "3", "--top_p", "0.9", "--seed", "4"]
    options += ["--repetition_penalty", "1.2", "--no_repeat_ngram_size", "3", "--stop", "x", "--stop", "yz"]
    options += ["--max_new_tokens", "2", "--checkpoint", "w.ckpt", "--device", "cpu", "--dtype", "float32"]
    options += ["--no_cache", "--max_repeated_tokens", "9"]
    assert run("--query", "hello", "--config_path", "my.yaml", *options)[0] == 0
    ((path, overrides),) = loaded
    assert (path, overrides) == (
        "my.yaml",
        {"cache": False, "checkpoint": str(tmp_path / "w.ckpt"), "device": "cpu", "dtype": "float32"},
    )
    assert asked == {
        "stream": True, "do_sample": False, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4,
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "stop_strings": ["x", "yz"], "max_new_tokens": 2,
        "max_repeated_tokens": 9,
    }  # fmt: skip


def test_ctrl_c_elsewhere(loaded, run, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model(), "chat", interrupted)
    assert run("--query", "hello") == (130, "", "interrupted\n")


def test_what_was_answered_before_ctrl_c_is_kept(loaded, run, images, tmp_path, monkeypatch):
    model = tiny_model()
    read = model.pictures

    def interrupted(image):
        if "c.JPG" in image:
            raise KeyboardInterrupt
        return read(image)

    monkeypatch.setattr(model, "pictures", interrupted)
    status, _, _ = run("--image_dir", images, "--output", tmp_path / "out.jsonl", "--max_new_tokens", 2)
    assert status == 130 and len(json_lines(tmp_path / "out.jsonl")) == 2


def test_a_terminal_of_few_characters(loaded, monkeypatch):
    answer = tiny_model().chat("hello", max_new_tokens=8)
    assert not answer.isascii()
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert predict_llm.main(["--query", "hello", "--max_new_tokens", "8"]) == 0
    assert raw.getvalue().decode("ascii") == f"{answer}\n".encode("ascii", "replace").decode()


def test_as_a_process_only_the_answer_is_on_standard_output(folder, images):
    command = [sys.executable, "-m", "mindvlm.tools.predict_llm", "--config_path", str(folder / "tiny.yaml"), *QUICK]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [*command, "--image_dir", str(images / "a.png"), "--dtype", "bfloat16"],
        capture_output=True, timeout=120, env=environment,
    )  # fmt: skip
    answer = tiny_model().chat(predict_llm.DEFAULT_QUERY, str(images / "a.png"), max_new_tokens=2)
    assert (done.returncode, done.stdout.decode()) == (0, f"{answer}\n")
    lines = [line for line in done.stderr.decode().splitlines() if "native kernels" not in line]
    assert lines[0] == "warning: dtype bfloat16 is computed in float32 on CPU"
    assert lines[1].startswith("loading ") and "prompt tokens" in lines[2] and len(lines) == 3


def test_as_a_process_a_reader_that_went_away_is_no_traceback(folder, images):
    command = [sys.executable, "-m", "mindvlm.tools.predict_llm", "--config_path", str(folder / "tiny.yaml"), *QUICK]
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [*command, "--image_dir", str(images / "a.png"), str(images / "c.JPG")],
            stdout=write_end, stderr=subprocess.PIPE, timeout=120,
        )  # fmt: skip
    finally:
        os.close(write_end)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr.decode() and "BrokenPipe" not in done.stderr.decode()
