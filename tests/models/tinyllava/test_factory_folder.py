"""A checkpoint of TinyLLaVA Factory, whose Phi has a head with a bias, from its folder to an answer."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import mindvlm
from mindvlm.nn.linear import BiasedHead
from tests.models.tinyllava.test_names import factory_names
from tests.processing.text.small_pieces import write_piece_files
from tests.tiny_tinyllava import DIALECTS, SIZES, TOWER, VOCAB_SIZE, hf_tensors

NUM_ROWS = VOCAB_SIZE + 6
TEXT = {
    "phi": {**DIALECTS["phi"], "model_type": "phi"},
    "stablelm": {**DIALECTS["stablelm"], "model_type": "stablelm"},
    "llama": {**DIALECTS["llama"], "model_type": "llama"},
}


def write_factory_folder(folder, dialect: str):
    """The folder, and its tensors under TinyLLaVABench's names; the decoder has more rows than tokens."""
    sizes = {key: value for key, value in SIZES.items() if not key.startswith(("mm_", "image_"))}
    text = {**sizes, **TEXT[dialect], "vocab_size": NUM_ROWS}
    config = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "text_config": text,
        "vision_config": TOWER,
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "tokenizer_model_max_length": 256,
    }
    tensors = hf_tensors(config, dialect)
    write_piece_files(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(factory_names(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("dialect", TEXT)
def test_a_folder_is_loaded(tmp_path, dialect):
    tensors = write_factory_folder(tmp_path / "model", dialect)
    model = mindvlm.load(tmp_path / "model", mode="pynative", weights="float32")
    values = {name: parameter.asnumpy() for name, parameter in model.model.parameters_and_names()}
    assert len(values) == len(tensors)
    head = tensors["lm_head.weight"][:VOCAB_SIZE]
    np.testing.assert_array_equal(values["language_model.lm_head.weight"], head)
    # all layers of the tower are there; the feature is that of the layer before the last, without its first token
    assert "vision_tower.encoder.layers.3.mlp.fc1.weight" in values
    assert (model.config.model.vision_select_layer, model.config.model.image_token_len) == (-2, 3)
    assert isinstance(model.model.language_model.lm_head, BiasedHead) == (dialect == "phi")
    if dialect == "phi":
        np.testing.assert_array_equal(values["language_model.lm_head.bias"], tensors["lm_head.bias"][:VOCAB_SIZE])
        assert len(model.chat("the cup", max_new_tokens=1).ids) == 1
