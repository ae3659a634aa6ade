"""The torch reference of TinyLLaVA against transformers' classes and the recorded arrays of the original program."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mindvlm.checkpoint import open_checkpoint
from mindvlm.convert.random_weights import random_tensor
from mindvlm.convert.reference.clip import build_tower
from mindvlm.convert.reference.connectors import build_connector
from mindvlm.convert.reference.tinyllava import ReferenceTinyLlava
from mindvlm.convert.reference.tinyllava_stages import bench_name
from mindvlm.models.hf.towers import read_tower
from mindvlm.models.tinyllava.hf_config import connector_config, from_hf_config
from mindvlm.models.tinyllava.names import KINDS
from mindvlm.models.tinyllava.released import legacy_config, llama_config, phi_config
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID
from mindvlm.weights.config_json import ConfigTable
from mindvlm.weights.recognise import native_view
from mindvlm.weights.rules.planning import make_plan
from tests.golden_files import golden_json, golden_path
from tests.golden_readers.case import Case
from tests.golden_readers.tinyllava_scenario import IGNORED, PLACEHOLDER, find_scenarios
from tests.hf_shapes import tinyllava_shapes
from tests.known_models import MODELS, TINYLLAVA
from tests.models.tinyllava.test_dialects import clip, llama, phi, random_ids, randomised, siglip, stablelm
from tests.models.tinyllava.test_names import config_of as tiny_config

BOUND = 1e-5
TEXT = {key: value for key, value in llama_config().items() if "vision" not in key}
PEERS = {"phi": phi, "stablelm": stablelm, "llama": llama}
CASES = {"llama": "llama", "phi": "phi", "stablelm": "stablelm", "llama_clip": "llama", "llama_clip_hf": "llama"}


def assert_close(actual: torch.Tensor, expected, bound: float = BOUND) -> None:
    actual, expected = np.asarray(actual.detach()), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.linalg.norm((actual - expected).ravel()) / np.linalg.norm(expected.ravel())
    assert error <= bound, f"{error:.2e}"


@pytest.mark.parametrize("dialect", PEERS)
def test_decoders_are_those_of_transformers(dialect):
    """Logits of a whole pass, with a cache, behind padding on the left; the bias of Phi's head is kept."""
    peer = randomised(PEERS[dialect]())
    config = from_hf_config(peer.config.to_dict())
    config.language_model.head_bias = dialect == "phi"
    model = ReferenceTinyLlava.from_state(config, peer.state_dict(), device="cpu")
    ids = torch.from_numpy(random_ids(2, 35)).long()
    with torch.no_grad():
        assert_close(model(ids).logits, peer(ids).logits.numpy(), 2e-6)
        mask = torch.ones(2, 35, dtype=torch.long)
        mask[1, :4] = 0
        padded = peer(ids, attention_mask=mask, position_ids=torch.arange(35)[None]).logits
        assert_close(model(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()], 2e-6)
        steps = model.generate(ids, max_new_tokens=3)
        again = peer(torch.cat([ids, steps.ids[:, :2]], 1)).logits[:, -3:]
    assert_close(torch.stack(steps.logits, 1), again, 2e-6)


@pytest.mark.parametrize("make", [siglip, clip])
def test_towers_are_those_of_transformers(make):
    """31 pixels hold two patches and a rest."""
    peer = randomised(make())
    tower = build_tower(read_tower(ConfigTable(peer.config.to_dict())))
    state = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in peer.state_dict().items()}
    tower.load_state_dict({name: value for name, value in state.items() if ".head." not in name})
    pixels = torch.randn(2, 3, 31, 31)
    with torch.no_grad():
        expected = peer(pixels, output_hidden_states=True).hidden_states
        states = tower.hidden_states(pixels)
        for actual, wanted in zip(states, expected, strict=True):
            assert_close(actual, wanted, 2e-6)
        assert_close(tower.features(pixels), expected[-2][:, 1:], 2e-6)
        assert_close(tower.pooled(states[-1]), peer.get_submodule(prefix_of(peer)).post_layernorm(expected[-1][:, 0]))


def prefix_of(peer: torch.nn.Module) -> str:
    """Returns the model inside the class of transformers; releases keep it in different places."""
    return "vision_model" if hasattr(peer, "vision_model") else ""


@pytest.mark.parametrize("dialect", PEERS)
@pytest.mark.parametrize("tower", ["siglip", "clip", None])
@pytest.mark.parametrize("connector", ["linear", "mlp3x_gelu", "resampler", "identity"])
def test_parameters_are_those_of_the_layout(dialect, tower, connector):
    config = tiny_config(dialect, tower=tower, connector=connector)
    model = ReferenceTinyLlava.from_seed(from_hf_config(config), 0, device="cpu")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == tinyllava_shapes(config, dialect)
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(model.state_dict()[name], random_tensor(name, shapes[name], 0))


def test_placeholders_and_features_must_be_equal_in_number():
    config = from_hf_config(tiny_config("llama", tower="clip"))
    model = ReferenceTinyLlava.from_seed(config, 0, device="cpu")
    ids = torch.tensor([[1, *[PLACEHOLDER_ID] * 4, 5]])
    pixels = torch.randn(1, 3, 30, 30)
    features = model.encode_images(pixels)
    torch.testing.assert_close(model(ids, [pixels]).merged_embeds[:, 1:5], features)
    with pytest.raises(ValueError, match="3 image placeholders for 4 feature rows"):
        model(ids[:, 2:], [pixels])
    with pytest.raises(ValueError, match="4 image placeholders for 0 feature rows"):
        model(ids, [None])


@pytest.mark.parametrize(
    ("config", "num_tokens"),
    [
        (llama_config(), 729),
        (legacy_config(), 576),
        ({**legacy_config(), "vision_feature_select_strategy": "full"}, 577),
        ({"model_type": "tinyllava", "text_config": TEXT, "vision_config": {"model_type": "siglip_vision_model"}}, 728),
        ({**phi_config(), "mm_projector_type": "resampler"}, 128),
    ],
)
def test_tokens_of_an_image(config, num_tokens):
    assert from_hf_config(config).image_token_len == num_tokens


def bench_state(case: Case) -> dict[str, torch.Tensor]:
    """The weights under TinyLLaVABench's names, in float32."""
    if case.config["model_type"] != "llava":
        return {name: value.float() for name, value in load_file(case.weights).items()}
    with open_checkpoint(case.weights) as checkpoint:
        native = native_view(checkpoint, TINYLLAVA)
        back = make_plan(MODELS["tinyllava_llama"].hf.reverse(), native.infos).view(native)
        return {name: torch.from_numpy(back.read(name).to_float32()) for name in back.infos}


@pytest.mark.parametrize("name", CASES)
def test_every_recorded_scenario(name):
    case = Case.open(golden_path(f"tinyllava/{name}"))
    tower = case.documents.get("vision_config.json")
    described = {**case.config, **({"vision_config": tower} if tower else {})}
    state, compared = bench_state(case), set()
    for listed in case.documents["scenarios.json"]["scenarios"]:
        options = case.documents["scenarios.json"]["scenarios"][listed]
        config = from_hf_config({**described, "mm_vision_select_feature": options.get("tower_select", "patch")})
        model = ReferenceTinyLlava.from_state(config, state, device="cpu")
        placeholder = case.config.get("image_token_index", PLACEHOLDER)
        scenarios = find_scenarios(case, image_token_len=config.image_token_len, placeholder=placeholder)
        scenario = next(one for one in scenarios if one.name == listed)
        if scenario.max_length is None:
            compared |= compare(model, scenario, case.outputs)
    assert {item.split(".")[1] for item in compared} >= {
        "vision_features", "connector_output", "merged_embeds", "logits", "loss", "greedy_ids", "greedy_step_logits",
    }  # fmt: skip


def compare(model: ReferenceTinyLlava, scenario, outputs: dict[str, np.ndarray]) -> set[str]:
    """Compares what is recorded for one scenario; returns the names of the arrays."""
    ids = torch.from_numpy(scenario.as_recorded(scenario.padded(scenario.rows, 0))).long()
    valid = torch.from_numpy(scenario.valid)
    labels = None
    if scenario.labels:
        labels = torch.from_numpy(scenario.as_recorded(scenario.padded(scenario.labels, IGNORED)))
    known, images = {}, None
    if scenario.pixels is not None:
        pixels = torch.from_numpy(scenario.pixels)
        features = model.tower_features(pixels)
        connected = model.model.mm_projector(features)
        known = {"vision_features": features, "connector_output": connected}
        counts = [(row == PLACEHOLDER_ID).sum().item() // connected.shape[1] for row in ids]
        images = list(pixels[scenario.used].split(counts))
    with torch.no_grad():
        output = model(ids, images, attention_mask=valid.long(), labels=labels)
    known |= {"loss": output.loss} if labels is not None else {}
    at_valid = {
        "merged_embeds": output.merged_embeds,
        "last_hidden_state": output.last_hidden,
        "logits": output.logits,
    }
    compared = set()
    for item, array in {**known, **at_valid}.items():
        key = f"{scenario.name}.{item}"
        if key in outputs:
            recorded = torch.from_numpy(outputs[key])
            assert_close(array[valid] if item in at_valid else array, recorded[valid] if item in at_valid else recorded)
            compared.add(key)
    if f"{scenario.name}.greedy_ids" in outputs:
        num_tokens = outputs[f"{scenario.name}.greedy_ids"].shape[1]
        made = model.generate(ids, images, max_new_tokens=num_tokens)
        np.testing.assert_array_equal(made.ids, outputs[f"{scenario.name}.greedy_ids"])
        assert_close(torch.stack(made.logits, 1), outputs[f"{scenario.name}.greedy_step_logits"])
        compared |= {f"{scenario.name}.{item}" for item in ("greedy_ids", "greedy_step_logits")}
    return compared


def test_recorded_connectors():
    entries = golden_json("tinyllava/connectors/config.json")
    folder = golden_path("tinyllava/connectors")
    weights = load_file(folder / "weights.safetensors")
    inputs, outputs = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    for kind, config in entries.items():
        connector = build_connector(
            connector_config(ConfigTable(config)), config["mm_hidden_size"], config["hidden_size"]
        )
        own = {name.split("/", 1)[1]: value.float() for name, value in weights.items() if name.startswith(f"{kind}/")}
        connector.load_state_dict({name.removeprefix("model.mm_projector."): value for name, value in own.items()})
        assert_close(connector(torch.from_numpy(inputs["x"])), outputs[f"{kind}.output"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_names_of_every_layout_lead_to_those_of_the_reference(kind):
    """The reference knows them by prefixes of its own."""
    unused = ("language_model.lm_head.bias", "image_newline")
    infos = {name: info for name, info in kind.example_infos().items() if name not in unused}
    bench = kind.tables[1]
    for table in kind.tables[1:]:
        for name in filter(table.part_of, infos):
            published = table.sources_of(name)[0]
            assert bench_name(published) == bench.sources_of(name)[0], (table.name, published)
