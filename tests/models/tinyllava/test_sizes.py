"""The published models: numbers of tensors and parameters, from our YAML and from config.json; no memory is taken."""

import math
from pathlib import Path

import pytest
import yaml

from mindvlm.models.registry import get_family
from mindvlm.models.tinyllava import released
from mindvlm.models.tinyllava.config import TinyLlavaConfig, parse_config
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model import build_model
from mindvlm.models.tinyllava.names import infos_of
from mindvlm.nn.parameters import parameter_shapes
from tests.known_models import MODELS

CONFIGS = Path(__file__).parents[3] / "configs/tinyllava"
# tensors and parameters of the whole, parameters of the decoder and of the connector
PUBLISHED = {
    "tinyllava_phi": (877, 3_186_888_224, 2_779_632_640, 9_507_840),
    "tinyllava_stablelm": (765, 2_048_820_768, 1_644_515_328, 6_557_696),
    "tinyllava_llama": (626, 1_504_353_824, 1_100_048_384, 6_557_696),
}
YAMLS = {
    "tinyllava_3_1b.yaml": (released.phi_config, 50295, 3072),
    "tinyllava_2_0b.yaml": (released.stablelm_config, 100289, 4096),
    "tinyllava_1_5b.yaml": (released.llama_config, 32000, 2048),
    "tiny_llava_v1.yaml": (released.legacy_config, 32064, 2048),
}


def num_values(shapes: dict, prefix: str = "") -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def read_config(name: str, **changes) -> TinyLlavaConfig:
    return parse_config({**yaml.safe_load((CONFIGS / name).read_text()), **changes}, CONFIGS / name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_of_the_published_files(name):
    model = MODELS[name]
    shapes = parameter_shapes(build_model(from_hf_config(model.released_config())))
    num_tensors, whole, decoder, connector = PUBLISHED[name]
    assert (len(shapes), num_values(shapes)) == (num_tensors, whole)
    assert num_values(shapes, "language_model.") == decoder
    assert num_values(shapes, "mm_projector.") == connector
    tower = {name: shape for name, shape in shapes.items() if name.startswith("vision_tower.")}
    assert (len(tower), num_values(tower)) == (421, 397_747_744)
    assert shapes == {name: info.shape for name, info in model.released_infos().items()}


@pytest.mark.parametrize("first", [None, -1, 0, 2])
def test_freezing_leaves_the_names(first):
    config = from_hf_config(released.legacy_config())
    config.tune.vision_tower_from_layer = first
    model = build_model(config)
    assert [name for name, _ in model.parameters_and_names()] == [p.name for p in model.get_parameters()]
    tower = [p.name for p in model.trainable_params() if p.name.startswith("vision_tower.")]
    layers = {int(name.split(".")[3]) for name in tower if ".encoder." in name}
    # the last of 24 layers and the norm behind it have no part in the features
    assert layers == (set() if first is None else set(range(max(first, 0), 23)))
    assert any("embeddings" in name for name in tower) == (first == -1)
    assert not any("post_layernorm" in name for name in tower)


def test_totals_of_the_first_model():
    """596 tensors; the decoder has 64 more rows than that of the 1.5B, the tower is the whole CLIP."""
    config = released.legacy_config()
    shapes = parameter_shapes(build_model(from_hf_config(config)))
    decoder = PUBLISHED["tinyllava_llama"][2] + 2 * 64 * 2048
    assert (len(shapes), num_values(shapes)) == (596, decoder + 303_507_456 + 6_295_552) == (596, 1_410_113_536)
    assert num_values(shapes, "language_model.") == decoder
    assert num_values(shapes, "vision_tower.") == 303_507_456
    assert num_values(shapes, "mm_projector.") == 6_295_552
    assert shapes["vision_tower.embeddings.position_embedding.weight"] == (577, 1024)
    assert shapes == {name: info.shape for name, info in infos_of(from_hf_config(config)).items()}


@pytest.mark.parametrize("name", YAMLS)
def test_our_yaml_is_the_published_config(name):
    """But for the rows of the vocabulary that no token has."""
    describe, vocab_size, max_length = YAMLS[name]
    config = read_config(name)
    expected = from_hf_config(describe())
    assert config.model.language_model.vocab_size == vocab_size
    expected.language_model.vocab_size = vocab_size
    expected.language_model.max_position_embeddings = None
    assert config.model == expected
    assert config.model.max_length == max_length
    assert {path.name for path in CONFIGS.glob("*.yaml")} >= YAMLS.keys()


def test_the_family_is_found_by_its_name():
    family = get_family("tinyllava")
    assert family.parse_config is parse_config and family.build is build_model
