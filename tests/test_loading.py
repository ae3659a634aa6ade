"""`mindvlm.load` with overrides, with checkpoints of every naming, and with unusable files."""

import os
import warnings

import numpy as np
import pytest

import mindvlm
from mindvlm.checkpoint import MemorySource, RawTensor, open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.vary.names import HF
from mindvlm.weights.rules.planning import make_plan
from tests.models.vary.vary_names import mindocr_name
from tests.tiny_vary import (
    picture,
    tiny_config,
    tiny_weights,
    write_tiny_vary,
    write_yaml,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a complete run folder that tests read and do not change."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny_vary(folder)
    return folder


def test_overrides(folder):
    lines = []
    loaded = mindvlm.load(folder / "tiny.yaml", mode="pynative", seed=7, weights="float32", progress=lines.append)
    assert (loaded.config.mode, loaded.config.seed) == ("pynative", 7)
    assert loaded.load_seconds > 0
    assert lines == [f"loading {folder / 'tiny.safetensors'}"]
    other = folder / "other.safetensors"
    write_checkpoint(other, MemorySource(tiny_weights(tiny_config(), seed=1)))
    changed = mindvlm.load(str(folder / "tiny.yaml"), checkpoint=other, weights="float32")
    name = "mm_projector.weight"
    weights = [dict(m.model.parameters_and_names())[name].asnumpy() for m in (loaded, changed)]
    assert np.abs(weights[0] - weights[1]).max() > 0.1
    with pytest.raises(UserError, match="^unknown config key 'devise'; did you mean 'device'"):
        mindvlm.load(folder / "tiny.yaml", devise="cpu")
    with pytest.raises(UserError, match="^config key 'family' is 'blip'; expected one of vary"):
        mindvlm.load(folder / "tiny.yaml", family="blip")


def test_sixteen_bits_on_cpu_are_float32(folder):
    with pytest.warns(UserWarning, match="bfloat16 is computed in float32 on CPU"):
        loaded = mindvlm.load(folder / "tiny.yaml", dtype="bfloat16")
    assert loaded.encode_images(picture()).asnumpy().dtype == np.float32


def hugging_face(folder) -> dict[str, np.ndarray]:
    with open_checkpoint(folder / "tiny.safetensors") as native:
        view = make_plan(HF.reverse(), native.infos).view(native)
        return {name: view.read(name).to_float32() for name in view.infos}


def mindocr(folder) -> dict[str, np.ndarray]:
    tensors = {}
    for name, array in hugging_face(folder).items():
        if "c_attn" in name:
            ending = name.rpartition(".")[2]
            for part, piece in zip("qkv", np.split(array, 3), strict=True):
                tensors[f"{mindocr_name(name).partition('attn.')[0]}attention.w{part}.{ending}"] = piece
        else:
            tensors[mindocr_name(name)] = array
    return tensors


@pytest.mark.parametrize("naming, file", [(hugging_face, "hf.safetensors"), (mindocr, "mindocr.ckpt")])
def test_checkpoints_of_other_names_load_as_the_same_model(folder, naming, file):
    tensors = naming(folder)
    assert not any(name.startswith("language_model.") for name in tensors)
    write_checkpoint(folder / file, MemorySource(tensors))
    names = (file, "tiny.safetensors")
    loaded, native = (mindvlm.load(folder / "tiny.yaml", checkpoint=name, weights="float32") for name in names)
    expected = dict(native.model.parameters_and_names())
    for name, parameter in loaded.model.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), expected.pop(name).asnumpy(), err_msg=name)
    assert not expected


def break_checkpoint(folder, kind: str):
    path = folder / "broken.safetensors"
    weights = tiny_weights(tiny_config())
    if kind == "other model":
        weights = {"bert.embeddings.weight": np.zeros((3, 4), np.float32)}
    elif kind == "other shapes":
        weights["mm_projector.weight"] = np.zeros((16, 17), np.float32)
    elif kind == "incomplete":
        del weights["language_model.norm.weight"]
    elif kind == "too much":
        weights["language_model.layers.2.input_layernorm.weight"] = np.ones(32, np.float32)
    write_checkpoint(path, MemorySource(weights))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "corrupt":
        path.write_bytes(b"\x00\xff" * 500)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "absent":
        path.unlink()
    return path


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("other model", "is not a Vary checkpoint"),
        ("other shapes", "mm_projector.weight"),
        ("incomplete", "language_model.norm.weight"),
        ("too much", "language_model.layers.2.input_layernorm.weight"),
        ("truncated", ""),
        ("corrupt", ""),
        ("empty", ""),
        ("absent", "no such file"),
    ],
)
def test_a_bad_checkpoint_is_one_line_that_names_it(folder, tmp_path, kind, expected):
    path = break_checkpoint(tmp_path, kind)
    with pytest.raises(UserError) as caught:
        mindvlm.load(folder / "tiny.yaml", checkpoint=path)
    message = str(caught.value)
    assert str(path) in message and expected in message and "\n" not in message


@pytest.mark.parametrize("file", ["x.safetensors", "x.ckpt", "x.bin", "hf.safetensors"])
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float32", "holds NaN; the file is damaged or its training diverged"),
        (-np.nan, "bfloat16", "holds NaN; the file is damaged or its training diverged"),
        (np.inf, "float16", "holds infinity; its values exceeded the range of float16"),
        (-np.inf, "bfloat16", "holds infinity; the file is damaged or its training diverged"),
    ],
)
def test_nan_and_infinity_are_found_while_the_tensors_are_loaded(folder, tmp_path, file, value, dtype, message):
    name, weights = "transformer.ln_f.weight", hugging_face(folder)
    if not file.startswith("hf"):
        name, weights = "language_model.norm.weight", tiny_weights(tiny_config())
    weights[name].reshape(-1)[-1] = value
    path = tmp_path / file
    write_checkpoint(path, MemorySource({key: RawTensor.from_array(a).cast(dtype) for key, a in weights.items()}))
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("error")  # the cache of converted weights reports nothing of its own
        mindvlm.load(folder / "tiny.yaml", checkpoint=path)
    assert f"{path}: tensor {name} {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_every_tensor_is_read_once(folder, monkeypatch):
    num_bytes, preadv = [], os.preadv

    def counted(*arguments):
        num_bytes.append(preadv(*arguments))
        return num_bytes[-1]

    monkeypatch.setattr(os, "preadv", counted)
    mindvlm.load(folder / "tiny.yaml")
    with open_checkpoint(folder / "tiny.safetensors") as checkpoint:
        assert sum(num_bytes) == sum(info.num_bytes for info in checkpoint.infos.values())


def test_no_checkpoint_at_all(tmp_path):
    path = write_yaml(tmp_path, tiny_config(checkpoint=None))
    with pytest.raises(UserError, match="tiny.yaml names no checkpoint"):
        mindvlm.load(path)


def test_a_vocabulary_of_another_size(folder, tmp_path):
    config = tiny_config(processor__vocab_file="short.tiktoken", checkpoint=str(folder / "tiny.safetensors"))
    lines = (folder / "small.tiktoken").read_text().splitlines()[:-1]
    (tmp_path / "short.tiktoken").write_text("\n".join(lines))
    with pytest.raises(UserError, match="short.tiktoken: 263 tokens, expected 264"):
        mindvlm.load(write_yaml(tmp_path, config))
