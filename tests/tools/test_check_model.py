"""`mindvlm-check`: a whole run, and planted faults of config, files and tokenizer."""

import json
import os
import subprocess
import sys

import pytest

from mindvlm.api import load
from mindvlm.core.errors import UserError
from mindvlm.tools import preflight
from tests.tiny_vary import VOCAB_SIZE, tiny_config, tiny_weights, write_tiny_opt, write_tiny_vary, write_yaml
from tests.tools.checked import NAMES, assert_failed, checker, found, statuses

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def config_path(tmp_path):
    return write_tiny_vary(tmp_path)


@pytest.fixture
def check(monkeypatch, capsys):
    return checker(monkeypatch, capsys)


def test_a_run_that_can_start(check, config_path):
    status, out, err = check("--config_path", config_path)
    assert (status, err) == (0, "")
    assert list(found(out)) == NAMES
    assert statuses(out) == dict.fromkeys(NAMES, "ok")
    assert out.splitlines()[-1] == "ready"
    for text in ("tiny.safetensors: ", "small.tiktoken: ", f"{VOCAB_SIZE} ids", "<imgpad>", "float32", "CPU with"):
        assert text in out
    count = sum(array.size for array in tiny_weights(tiny_config()).values())
    assert f"{count:,} parameters" in out


def test_a_vary_tiny(check, tmp_path):
    status, out, err = check("--config_path", write_tiny_opt(tmp_path))
    assert (status, err) == (0, ""), out
    assert "vocab.json" in out and "merges.txt" in out


def test_the_shipped_model_as_a_process():
    command = [sys.executable, "-m", "mindvlm.tools.check_model", "--num_images", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert "vary_nano" in done.stdout and "with 2 pictures" in done.stdout


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"model__image_token_len": 9}, "image_token_len is 9"),
        ({"sed": 1}, "did you mean 'seed'"),
        ({"mode": "eager"}, "'mode' is 'eager'"),
        ({"model__language_model": None}, "language_model"),
    ],
)
def test_a_config_that_cannot_be(check, config_path, change, expected):
    write_yaml(config_path.parent, tiny_config(**change))
    status, out, err = check("--config_path", config_path)
    assert (status, err) == (2, "error: 1 of 9 checks failed: config; the lines above say why\n")
    assert statuses(out) == dict.fromkeys(NAMES, "skipped") | {"config": "FAILED"}
    assert expected in found(out)["config"][0][1]
    assert found(out)["memory"] == [("skipped", "needs the model parameters and the device")]


def test_a_config_that_is_not_there(check, tmp_path):
    status, out, err = check("--config_path", tmp_path / "none.yaml")
    assert status == 2 and "none.yaml does not exist" in found(out)["config"][0][1]


WITHOUT_CHECKPOINT = {"files": "FAILED", "weights": "skipped", "dtype": "skipped"}


@pytest.mark.parametrize(
    "content, name, expected",
    [
        (None, "tiny.safetensors", "no such file or folder"),
        (LFS_POINTER, "tiny.safetensors", "Git LFS pointer"),
        (b"", "tiny.safetensors", "tiny.safetensors"),
        (b"weights", "tiny.onnx", "unknown kind of checkpoint '.onnx'"),
    ],
)
def test_a_checkpoint_that_cannot_be_read(check, config_path, content, name, expected):
    path = config_path.parent / name
    (config_path.parent / "tiny.safetensors").unlink()
    if content is not None:
        path.write_bytes(content)
    write_yaml(config_path.parent, tiny_config(checkpoint=name))
    assert_failed(check("--config_path", config_path), WITHOUT_CHECKPOINT, name, expected)


def test_a_missing_checkpoint_names_the_command_that_makes_it(check, config_path):
    path = config_path.parent / "tiny.safetensors"
    path.unlink()
    status, out, _ = check("--config_path", config_path)
    [line] = [text for state, text in found(out)["files"] if state == "FAILED"]
    assert line.endswith(f"mindvlm-convert --torch_ckpt_path FOLDER --mindspore_ckpt_path {path}")
    with pytest.raises(UserError, match="make this file of a published folder: mindvlm-convert"):
        load(config_path)


def test_a_truncated_checkpoint(check, config_path):
    path = config_path.parent / "tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert_failed(check("--config_path", config_path), WITHOUT_CHECKPOINT, "tiny.safetensors", "truncated")


def test_no_checkpoint(check, config_path):
    write_yaml(config_path.parent, tiny_config(checkpoint=None))
    assert_failed(check("--config_path", config_path), WITHOUT_CHECKPOINT, "names no checkpoint")


@pytest.mark.parametrize(
    "content, expected",
    [(None, "not found"), (LFS_POINTER, "Git LFS pointer"), (b"", "empty"), ("folder", "holds"), ("pipe", "regular")],
)
def test_a_tokenizer_file_that_cannot_be_read(check, config_path, content, expected):
    path = config_path.parent / "small.tiktoken"
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    result = check("--config_path", config_path)
    assert_failed(result, {"files": "FAILED", "tokenizer": "skipped"}, "small.tiktoken", expected)
    assert found(result[1])["files"][0][0] == "ok"


def test_both_files_missing_are_both_named(check, config_path):
    for name in ("tiny.safetensors", "small.tiktoken"):
        (config_path.parent / name).unlink()
    expected = WITHOUT_CHECKPOINT | {"tokenizer": "skipped"}
    assert_failed(check("--config_path", config_path), expected, "tiny.safetensors", "small.tiktoken")


def test_a_damaged_rank_file(check, config_path):
    path = config_path.parent / "small.tiktoken"
    path.write_text(path.read_text().replace(" 7\n", " 8\n"))
    assert_failed(check("--config_path", config_path), {"tokenizer": "FAILED"}, "line 8")


def test_a_tokenizer_of_another_size(check, config_path):
    path = config_path.parent / "small.tiktoken"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    assert_failed(check("--config_path", config_path), {"tokenizer": "FAILED"}, "small.tiktoken", "expected")


def test_a_tokenizer_that_does_not_give_the_text_back(check, config_path, monkeypatch):
    monkeypatch.setattr(preflight, "ROUND_TRIP_TEXT", "cafe\u0301")
    assert_failed(check("--config_path", config_path), {"tokenizer": "FAILED"}, "caf\u00e9")


@pytest.mark.parametrize(
    "content, expected",
    [('{"im_patch_token": 3}', "has im_patch_token 3"), ("{", "cannot be read"), ('{"im_start_token": null}', "None")],
)
def test_a_config_json_that_says_another_id(check, config_path, content, expected):
    (config_path.parent / "config.json").write_text(content)
    assert_failed(check("--config_path", config_path), {"tokenizer": "FAILED"}, "config.json", expected)


def test_a_config_json_that_says_the_same(check, config_path):
    # the order of the compact tokens: end of text, turns, start, end, placeholder
    ids = {"im_start_token": VOCAB_SIZE - 3, "im_end_token": VOCAB_SIZE - 2, "im_patch_token": VOCAB_SIZE - 1}
    (config_path.parent / "config.json").write_text(json.dumps(ids))
    assert check("--config_path", config_path)[0] == 0
