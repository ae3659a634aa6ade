"""`mindvlm-predict` with a TinyLLaVA folder: what bad questions and bad folders get, and what is no error."""

import dataclasses
import json

import pytest
import yaml

import mindvlm
from mindvlm.models.run_config import read_config
from tests.tiny_tinyllava import TOWER, write_tiny_tinyllava
from tests.tiny_vary import picture
from tests.tools.refusals import assert_refused


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder that tests may read but not change."""
    return write_tiny_tinyllava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def ask(run, model, monkeypatch, tmp_path):
    """The tool with that folder, which is loaded once, and a question."""
    loaded = mindvlm.load(model, mode="pynative")
    monkeypatch.setattr(mindvlm, "load", lambda *_, **__: loaded)
    picture().save(tmp_path / "a.png")

    def run_tool(query, *, images=1):
        pictures = ["--image_dir", *[tmp_path / "a.png"] * images] if images else []
        return run("--config_path", model, "--query", query, "--max_new_tokens", 1, *pictures)

    return run_tool


def test_a_question_about_a_picture_without_one_is_text(ask):
    status, out, err = ask("What is in this picture?", images=0)
    assert status == 0 and out and "1 new" in err


@pytest.mark.parametrize(
    ("query", "images", "expected"),
    [
        ("<image> and <image>?", 1, "1 image for 2 <image> markers: give one image per marker"),
        ("what is an <image> tag?", 0, "0 images for 1 <image> marker"),
        ("<image-placeholder>", 0, "0 images for 1 <image> marker:"),
    ],
)
def test_pictures_and_markers_that_differ(ask, query, images, expected):
    assert_refused(ask(query, images=images), expected)


def test_several_pictures_in_one_question(ask, run):
    status, out, err = ask("<image-placeholder> and <image>: what differs?", images=2)
    assert status == 0 and out.count("\n") == 1 and "a.png" not in out and "1 new" in err
    assert_refused(ask("<image-placeholder> and <image>?", images=3), "3 images for 2 <image> markers")


def test_more_pictures_than_markers(model):
    loaded = mindvlm.load(model, mode="pynative")
    for asked in (lambda *row: loaded.chat(*row), lambda query, images: loaded.generate([query], [images])):
        with pytest.raises(mindvlm.UserError, match="2 images for 1 <image> marker"):
            asked("<image> what?", [picture(), picture(1)])


def test_an_unknown_template_lists_the_known_ones(model, run, tmp_path):
    data = dataclasses.asdict(read_config(model))
    data["processor"]["template"] = "vicuna"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    result = run("--config_path", tmp_path / "tiny.yaml", "--query", "the cup")
    assert_refused(result, "'vicuna' is unknown; known are", "vicuna_v1", "llama_2", "phi")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"intermediate_size": 50}, ["mlp.gate_proj.weight", "[48, 32], the model has [50, 32]"]),
        ({"num_hidden_layers": 3}, ["missing model.layers.2.input_layernorm.weight"]),
        ({"num_hidden_layers": 1}, ["unexpected model.layers.1.", "the model has no such parameter"]),
        ({"num_key_value_heads": 4}, ["self_attn.k_proj.weight", "[16, 32], the model has [32, 32]"]),
        (
            {"mm_projector_type": "linear"},
            ["model.mm_projector.weight", "(MLP of 2 layers) than the model's (linear connector)", "mm_projector_type"],
        ),
        (
            {"vision_config": {**TOWER, "image_size": 42}},
            ["position_embedding.weight", "[4, 16], the model has [9, 16]"],
        ),
        ({"vocab_size": 300}, ["330 tokens, but the model has embeddings for 300", "use the tokenizer"]),
    ],
)
def test_a_config_that_the_weights_contradict(run, tmp_path, changes, expected):
    folder = write_tiny_tinyllava(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    has_own_remedy = {"vocab_size", "mm_projector_type"} & set(changes)
    remedy = [] if has_own_remedy else [f"correct the sizes in {path}, or use the weights that match it"]
    assert_refused(run("--config_path", folder, "--query", "the cup"), str(folder), *expected, *remedy)
