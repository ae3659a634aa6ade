"""Vary-tiny: sizes of the released weights, both spellings, the tied output layer and the recorded checkpoint."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindvlm.checkpoint import MemorySource, open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.vary import names
from mindvlm.models.vary.hf_config import vary_tiny_config, vary_toy_config
from mindvlm.weights.config_json import read_config
from mindvlm.weights.lora.config import read_adapter_config
from mindvlm.weights.recognise import detect_model
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.planning import make_plan
from tests import hf_shapes
from tests.known_models import ALL
from tests.models.vary.vary_names import SMALL_TINY, TINY, infos, random_tensors, tiny_shapes


@pytest.mark.parametrize("tower", ["vision_tower_2", "vision_tower"])
def test_sizes_of_the_released_weights(tower):
    shapes = hf_shapes.tiny_shapes(vary_tiny_config(), tower=tower)
    assert shapes == tiny_shapes(TINY, tower)
    assert len(shapes) == 378 and shapes["model.decoder.embed_positions.weight"] == (4098, 768)


def test_the_released_model_has_its_output_layer_once():
    released = names.TINY.released_infos()
    assert len(released) == 377 and "language_model.lm_head.weight" not in released
    assert sum(info.num_elements for info in released.values()) == 223_165_440
    assert sum(name.startswith("vision_vocabulary.") for name in released) == 179


def test_every_rule_is_used():
    for table, tower in ((names.TINY_HF, "vision_tower_2"), (names.TINY_HF_VISION_TOWER, "vision_tower")):
        plan = make_plan(table, infos(tiny_shapes(SMALL_TINY, tower)))
        assert not plan.unused_rules and not plan.absent_parts and plan.aliases == ("lm_head.weight",)


def test_names_of_the_decoder():
    tensors = random_tensors(tiny_shapes(SMALL_TINY))
    source = MemorySource(tensors)
    view = make_plan(names.TINY_HF, source.infos).view(source)
    layer = "model.decoder.layers.1."
    for old, new in {
        "model.decoder.embed_tokens.weight": "embed_tokens.weight",
        "model.decoder.embed_positions.weight": "embed_positions.weight",
        "model.decoder.final_layer_norm.bias": "norm.bias",
        layer + "self_attn_layer_norm.weight": "layers.1.input_layernorm.weight",
        layer + "final_layer_norm.weight": "layers.1.post_attention_layernorm.weight",
        layer + "self_attn.out_proj.bias": "layers.1.self_attn.o_proj.bias",
        layer + "self_attn.k_proj.weight": "layers.1.self_attn.k_proj.weight",
        layer + "fc2.weight": "layers.1.mlp.fc2.weight",
    }.items():
        assert view.read(f"language_model.{new}").data.tobytes() == tensors[old].data.tobytes()


def test_an_untied_output_layer_is_an_error_that_names_both():
    tensors = random_tensors(tiny_shapes(SMALL_TINY))
    tensors["lm_head.weight"] = random_tensors({"a": (20, 6)}, seed=4)["a"]
    source = MemorySource(tensors, "file.bin")
    view = make_plan(names.TINY_HF, source.infos).view(source)
    with pytest.raises(UserError, match=r"file.bin: model.decoder.embed_tokens.weight and lm_head.weight are one"):
        view.read("language_model.embed_tokens.weight")


def test_both_spellings_in_one_file_are_named():
    shapes = tiny_shapes(SMALL_TINY) | tiny_shapes(SMALL_TINY, "vision_tower")
    with pytest.raises(ConversionError, match="file.bin mixes .* first: duplicate model.vision_tower.*pos_embed"):
        detect_model(ALL, infos(shapes)).detect_table(infos(shapes), "file.bin")


def test_the_recorded_checkpoint(golden_dir):
    folder = golden_dir("vary/tiny_opt")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with open_checkpoint(folder / "weights.safetensors") as source:
        assert hf_shapes.tiny_shapes(config) == {name: info.shape for name, info in source.infos.items()}
        model = detect_model(ALL, source.infos, folder_config=config)
        assert model.name == "vary_tiny" and model.detect_table(source.infos) is names.TINY_HF
        view = make_plan(names.TINY_HF, source.infos, model.target_infos(folder)).view(source)
        assert len(view.infos) == 91
        back = make_plan(view.plan.reverse_table(), view.infos).view(view)
        assert back.infos == source.infos
        for name in source.infos:
            assert np.array_equal(back.read(name).data, source.read(name).data)


class TestConfigBesideTheWeights:
    def write(self, folder, config):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    def test_it_describes_the_model(self, tmp_path):
        assert names.TINY.target_infos(tmp_path) is None
        assert names.TINY.target_infos(self.write(tmp_path, vary_tiny_config())) == names.TINY.released_infos()

    def test_of_another_model_it_says_nothing(self, tmp_path):
        assert names.TINY.target_infos(self.write(tmp_path, {"model_type": "clip"})) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"hidden_size": "large"},
            {"hidden_size": None},
            {"hidden_size": 0},
            {"hidden_size": True},
            {"hidden_size": 768.0},
            {"hidden_size": 10**400},
            {"ffn_dim": "a\nb" * 1000},
            {"vocab_size": {"a": 1}},
            {"num_hidden_layers": 10**12},
            {"num_hidden_layers": -1},
            {"word_embed_proj_dim": 512},
            {"word_embed_proj_dim": 10**400},
            {"do_layer_norm_before": False},
            {"do_layer_norm_before": "yes"},
            {"tie_word_embeddings": False},
            {"vision_high_config": {"depth": 10**12}},
            {"vision_high_config": {"num_heads": 0}},
            {"vision_high_config": {"image_size": 1000}},
            {"vision_high_config": {"image_size": [1024, "1024"]}},
            {"vision_high_config": {"image_size": [1024] * 3}},
            {"vision_high_config": {"mlp_ratio": float("nan")}},
            {"vision_high_config": {"mlp_ratio": float("inf")}},
            {"vision_high_config": {"global_attn_indexes": 2}},
            {"vision_high_config": {"global_attn_indexes": [1] * 10_000}},
            {"vision_high_config": 3},
            {"vision_high_config": None},
        ],
    )
    def test_what_it_cannot_describe_is_one_line_that_names_the_key(self, tmp_path, change):
        with pytest.raises(UserError, match="is not a valid Vary-tiny config") as caught:
            names.TINY.target_infos(self.write(tmp_path, {**vary_tiny_config(), **change}))
        message = str(caught.value).removeprefix(str(tmp_path))
        key = next(iter(change))
        inner = change[key] if key == "vision_high_config" and isinstance(change[key], dict) else {key: None}
        assert next(iter(inner)) in message
        assert "\n" not in message and len(message) < 300 and "Error" not in message and "None" not in message

    @pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers"])
    def test_a_missing_key_is_named(self, tmp_path, key):
        config = {name: value for name, value in vary_tiny_config().items() if name != key}
        with pytest.raises(
            UserError, match=rf"config.json: is not a valid Vary-tiny config \(lacks '{key}'\); move it"
        ):
            names.TINY.target_infos(self.write(tmp_path, config))

    @settings(max_examples=200)
    @given(st.data())
    def test_any_values_are_described_or_one_line(self, tmp_path_factory, data):
        values = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(-2, 2000)
        values |= st.lists(values, max_size=3)
        model, config = data.draw(st.sampled_from([(names.TOY, vary_toy_config()), (names.TINY, vary_tiny_config())]))
        for _ in range(data.draw(st.integers(1, 4))):
            section = data.draw(st.sampled_from([config, *(v for v in config.values() if isinstance(v, dict))]))
            section[data.draw(st.sampled_from([key for key in section if key != "model_type"]))] = data.draw(values)
        try:
            model.target_infos(self.write(tmp_path_factory.mktemp("config"), config))
        except UserError as error:
            assert "\n" not in str(error)

    @pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\udcff", '{"a": 1, "a": 2}', " " * 2**20 + "{}"])
    def test_what_is_no_json_object_is_one_line(self, tmp_path, text):
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match="config.json: .*repair it or move it away$") as caught:
            names.TINY.target_infos(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
    @pytest.mark.parametrize("kind", ["device", "fifo", "folder", "link to nothing"])
    def test_special_files_are_refused_unread(self, tmp_path, name, kind):
        path = tmp_path / name
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "device" else "nothing")
        with pytest.raises(UserError, match=f"{name}: not a regular file; "):
            read_config(tmp_path) if name == "config.json" else read_adapter_config(path)

    @pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
    def test_a_small_memory_for_nested_tables(self, tmp_path, name):
        path = tmp_path / name
        path.write_text('{"a": [' + ",".join(["{}"] * 300_000) + "]}")
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match=f"{name}: "):
                read_config(tmp_path) if name == "config.json" else read_adapter_config(path)
            assert tracemalloc.get_traced_memory()[1] < 8e6
        finally:
            tracemalloc.stop()

    def test_a_link_to_a_file_is_followed(self, tmp_path):
        self.write(tmp_path, {"model_type": "vary"}).joinpath("config.json").rename(tmp_path / "blob")
        (tmp_path / "config.json").symlink_to("blob")
        assert read_config(tmp_path) == {"model_type": "vary"}
