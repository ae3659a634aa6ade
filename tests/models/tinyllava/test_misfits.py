"""Checkpoints that do not fit the model: what is missing or of another kind is named, with the remedy."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mindvlm
from mindvlm.convert.convert_weight import main
from mindvlm.core.config import resolve_path
from mindvlm.core.errors import UserError
from mindvlm.models.loading import separate_parts
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.training.initial_weights import lay_checkpoints
from mindvlm.weights.rules.findings import ConversionError
from tests.models.tinyllava.test_names import (
    bench_tensors,
    config_of,
    view,
)
from tests.models.tinyllava.trainer_files import (
    opened_tensors,
    save_torch,
    write_parts,
)
from tests.processing.text.small_pieces import write_piece_files
from tests.tiny_tinyllava import TOWER, hf_config, hf_tensors, write_tiny_tinyllava


@pytest.mark.parametrize("names", ["model.mm_projector", "mm_projector"])
@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("left", ["bias", "2.weight", "2."])
def test_half_a_connector_over_a_base(tmp_path, names, has_config, left):
    tensors = bench_tensors("llama")
    source = save_torch(tensors, tmp_path / "base.bin")
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    connector = {name.replace("model.mm_projector", names): v for name, v in tensors.items() if "mm_projector" in name}
    half = save_torch({n: v for n, v in connector.items() if left not in n}, tmp_path / "mm_projector.bin")
    with pytest.raises(ConversionError, match="mm_projector"):
        opened_tensors(source, half)


def test_a_decoder_with_fewer_layers_over_a_base(tmp_path):
    tensors = bench_tensors("llama")
    base = save_torch(tensors, tmp_path / "base.bin")
    shorter = save_torch(
        {n: v for n, v in tensors.items() if "layers.1." not in n and "tower" not in n}, tmp_path / "a.bin"
    )
    with pytest.raises(ConversionError, match=r"a.bin replaces half of a part .*language_model.layers.1"):
        opened_tensors(base, shorter)


def linear_connector(tensors: dict) -> dict[str, np.ndarray]:
    return {f"model.mm_projector.{end}": tensors[f"model.mm_projector.0.{end}"] for end in ("weight", "bias")}


@pytest.mark.parametrize("has_config", [True, False])
def test_a_linear_connector_over_a_model_with_an_mlp(tmp_path, has_config):
    tensors = bench_tensors("llama")
    base = save_torch(tensors, tmp_path / "base.bin")
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    linear = save_torch(linear_connector(tensors), tmp_path / "linear.bin")
    said = (
        r"of another type \(linear connector\) than the model's \(MLP of 2 layers\); give the matching one, or correct"
    )
    with pytest.raises(ConversionError, match=said):
        opened_tensors(base, linear)


def write_misfit(folder: Path, **changes) -> Path:
    """A folder of a tiny TinyLLaVA whose tensors lack those with a word of `without`, and have those of `more`."""
    without, more = changes.pop("without", "nothing"), changes.pop("more", {})
    model = write_tiny_tinyllava(folder, **changes)
    tensors = {n: v for n, v in load_file(model / "model.safetensors").items() if without not in n}
    save_file({**tensors, **more}, model / "model.safetensors")
    return model


def said_by_load_and_convert(model: Path, capsys) -> tuple[str, str]:
    with pytest.raises(UserError) as error:
        mindvlm.load(model, mode="pynative")
    status = main(["--torch_ckpt_path", str(model), "--mindspore_ckpt_path", str(model / "out.ckpt")])
    said = capsys.readouterr()
    assert "\n" not in str(error.value) and (status == 2) == bool(said.err)
    return str(error.value), said.err or said.out


def test_a_head_tied_to_the_embeddings(tmp_path, capsys):
    for said in said_by_load_and_convert(write_misfit(tmp_path, without="lm_head"), capsys):
        assert (
            "missing lm_head.weight" in said
            and "saved with the head tied to the token embeddings; save it with" in said
        )


@pytest.mark.parametrize(("num_rows", "said"), [(336, "set vocab_size to 336"), (324, "resize_token_embeddings(330)")])
def test_tables_with_another_number_of_rows(tmp_path, capsys, num_rows, said):
    rows = {name: np.zeros((num_rows, 32), np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    model = write_misfit(tmp_path, more=rows)
    assert main(["--torch_ckpt_path", str(model), "--mindspore_ckpt_path", str(model / "out.ckpt")]) == 2
    assert said in capsys.readouterr().err
    if num_rows < 330:
        with pytest.raises(UserError, match="take the tokenizer and config.json of these weights"):
            mindvlm.load(model, mode="pynative")


def test_a_connector_that_lies_beside_the_weights(tmp_path, capsys):
    model = write_misfit(tmp_path, without="mm_projector")
    assert "holds no connector; if a training saved it alone" in said_by_load_and_convert(model, capsys)[0]
    connector = {n: v for n, v in hf_tensors(hf_config("llama"), "llama").items() if "mm_projector" in n}
    beside = save_torch(connector, model / "mm_projector.bin")
    loaded, converted = said_by_load_and_convert(model, capsys)
    assert "holds no connector; mm_projector.bin beside it does, join both: mindvlm-convert" in loaded
    assert f"missing parts: connector; {beside} was not read, give it as a further source" in converted
    # the command of the message
    command = loaded.split("mindvlm-convert ")[1].replace("FOLDER", str(tmp_path / "joined")).split()
    assert main(command) == 0
    assert len(mindvlm.load(tmp_path / "joined", mode="pynative").chat("the cup", max_new_tokens=1).ids) == 1


def test_a_folder_with_only_a_connector(tmp_path):
    """As the first stage of LLaVA leaves it: the command of the message makes a model of it."""
    model = write_misfit(tmp_path)
    tensors = load_file(model / "model.safetensors")
    expected = mindvlm.load(model, mode="pynative").chat("the cup", max_new_tokens=4).ids
    (model / "model.safetensors").unlink()
    alone = {"mm_vision_tower": None, "vision_config": None, "model_type": "llama"}
    parts = write_parts(
        tmp_path / "parts", tensors, config={**json.loads((model / "config.json").read_text()), **alone}
    )
    write_piece_files(parts[0])
    save_torch({name: value for name, value in tensors.items() if "mm_projector" in name}, model / "mm_projector.bin")
    with pytest.raises(
        UserError, match="mm_projector.bin: holds only the connector; join it with its decoder"
    ) as error:
        mindvlm.load(model, mode="pynative")
    command = str(error.value).split("mindvlm-convert ")[1]
    for word, path in (("DECODER", parts[0]), ("TOWER", parts[1]), ("FOLDER", tmp_path / "joined")):
        command = command.replace(word, str(path))
    assert main(command.split()) == 0
    joined = tmp_path / "joined"
    assert (joined / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert mindvlm.load(joined, mode="pynative").chat("the cup", max_new_tokens=4).ids == expected


def test_a_tower_that_is_not_there(tmp_path, monkeypatch):
    model = write_misfit(tmp_path, without="vision_tower", mm_vision_tower="some/siglip")
    with pytest.raises(
        UserError, match=f"holds no vision tower; config.json names 'some/siglip', searched as {model}/some/siglip and "
    ):
        mindvlm.load(model, mode="pynative")
    config = json.loads((model / "config.json").read_text())
    del config["vision_config"]
    (model / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "~/odd"}))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=f"'~/odd', which is not a known tower, and there is no {tmp_path}/odd/config.json"
    ):
        mindvlm.load(model, mode="pynative")
    tower = {n: v for n, v in hf_tensors(hf_config("llama"), "llama").items() if "vision_tower" in n}
    (tmp_path / "odd").mkdir()
    save_file(
        {n.removeprefix("model.vision_tower.vision_tower."): v for n, v in tower.items()},
        tmp_path / "odd/model.safetensors",
    )
    (tmp_path / "odd/config.json").write_text(json.dumps(TOWER))
    for options in ({}, {"vision_tower": "~/odd"}):
        assert len(mindvlm.load(model, mode="pynative", **options).chat("the cup", max_new_tokens=1).ids) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (linear_connector, r"has no tensor of this model, it has 2 tensors \(mm_projector.weight"),
        (
            lambda t: {n: v for n, v in t.items() if "mm_projector.0" in n},
            r"has half of a connector, without 2 .*mm_projector.\*.weight",
        ),
    ],
)
def test_training_starts_from_a_whole_connector(tmp_path, make, said):
    tensors = bench_tensors("llama")
    paths = [save_torch(tensors, tmp_path / "base.bin"), save_torch(make(tensors), tmp_path / "a.bin")]
    shapes = {name: info.shape for name, info in view(tensors).infos.items()}
    with ExitStack() as stack, pytest.raises(UserError, match=f"init.weights: .*a.bin {said}"):
        lay_checkpoints(stack, list(map(str, paths)), shapes)


def test_a_main_file_with_the_layer_that_the_model_deletes(tmp_path):
    """A SigLIP that was joined with all its layers."""
    model = write_tiny_tinyllava(tmp_path)
    tensors = load_file(model / "model.safetensors")
    expected = mindvlm.load(model, mode="pynative").chat("the cup", max_new_tokens=4).ids
    last = {n.replace("layers.2.", "layers.3."): v for n, v in tensors.items() if "vision_model.encoder.layers.2." in n}
    save_file({**tensors, **last}, model / "model.safetensors")
    assert mindvlm.load(model, mode="pynative").chat("the cup", max_new_tokens=4).ids == expected


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_unknown_tensor_does_not_make_it_another_model(prefix):
    """All names of a Llama are StableLM-2's too, which has more."""
    tensors = {f"{prefix}{name}": value for name, value in bench_tensors("llama").items()}
    with pytest.raises(ConversionError, match="tinyllava_llama model: 1 unexpected; first: unexpected extra.weight"):
        view({**tensors, f"{prefix}extra.weight": np.zeros(3, np.float32)})


def test_paths_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = write_misfit(tmp_path / "home")
    assert mindvlm.load("~/home/model", mode="pynative").config.checkpoint == str(model)
    assert opened_tensors("~/home/model").keys() == opened_tensors(model).keys()
    config = read_config("~/home/model", {"vision_tower": "~/home/model", "adapter": Path("~/a")})
    assert (config.vision_tower, config.adapter) == (str(model), f"{tmp_path}/a")
    assert resolve_path("~/home/model", tmp_path / "elsewhere" / "a.yaml") == str(model)
    with pytest.raises(UserError, match="~nobody-of-this-name/model: no such file"):
        opened_tensors("~nobody-of-this-name/model")


def test_a_tower_of_a_yaml_that_is_not_there(tmp_path):
    config = SimpleNamespace(vision_tower=str(tmp_path / "tower"))
    with pytest.raises(UserError, match=f"vision_tower {tmp_path}/tower: no such file or folder; set vision_tower to"):
        separate_parts(config, get_family("tinyllava"))
