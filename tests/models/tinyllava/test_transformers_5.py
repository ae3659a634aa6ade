"""Folders as transformers 5 saves them: towers without `vision_model.` before their names, and the way back."""

import json

import pytest
import transformers
from safetensors.numpy import load_file

from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model import build_model
from mindvlm.nn.parameters import parameter_shapes
from mindvlm.weights.opened import open_native
from tests.known_models import ALL
from tests.models.tinyllava.test_dialects import SIZES, TOWER, clip, llama, phi, siglip, stablelm
from tests.models.tinyllava.test_names import assert_equal, read_all

TEXT = {key: TOWER[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}


def llava() -> transformers.LlavaForConditionalGeneration:
    text, tower = transformers.LlamaConfig(**SIZES), transformers.CLIPVisionConfig(**TOWER)
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=59)
    return transformers.LlavaForConditionalGeneration(config)


def whole_siglip() -> transformers.SiglipModel:
    text = {**TEXT, "vocab_size": 60, "num_hidden_layers": 1, "max_position_embeddings": 16}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=TOWER))


@pytest.mark.parametrize("make", [phi, stablelm, llama, siglip, clip, llava, whole_siglip])
def test_a_saved_folder(tmp_path, make):
    make().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    model = build_model(from_hf_config(json.loads((tmp_path / "config.json").read_text())))
    with open_native([tmp_path], ALL) as opened:
        infos = {name: info.shape for name, info in opened.source.infos.items()}
        if "siglip" in make.__name__:
            # the layer that TinyLLaVABench deletes
            infos = {name: shape for name, shape in infos.items() if ".layers.2." not in name}
        assert infos == parameter_shapes(model)
        assert_equal(
            read_all(opened.way_back().view(opened.source)),
            {name: value for name, value in saved.items() if name not in opened.inputs[0].plan.dropped},
        )
