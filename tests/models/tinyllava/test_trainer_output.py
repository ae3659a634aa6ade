"""Files of training programs: parts in separate folders, an adapter beside them, and names inside wrappers."""

import json
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import mindvlm
from mindvlm.convert.convert_weight import main
from mindvlm.core.errors import UserError
from mindvlm.training.initial_weights import lay_checkpoints
from mindvlm.weights.opened import open_native
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.planning import make_plan
from tests.known_models import ALL
from tests.models.tinyllava.test_factory_folder import write_factory_folder
from tests.models.tinyllava.test_names import (
    assert_equal,
    bench_tensors,
    config_of,
    factory_names,
    legacy_names,
    read_all,
    view,
)
from tests.models.tinyllava.test_transformers_5 import llava
from tests.models.tinyllava.trainer_files import (
    LAYOUTS,
    assert_close,
    factors,
    merged,
    opened_tensors,
    save_torch,
    shorter_tower,
    split_factory,
    write_adapter,
    write_parts,
)
from tests.tiny_tinyllava import write_tiny_tinyllava


@pytest.mark.parametrize("dialect", ["phi", "llama"])
def test_the_sub_folders_of_factory(tmp_path, dialect):
    tensors = write_factory_folder(tmp_path / "out", dialect)
    whole = opened_tensors(tmp_path / "out")
    split_factory(tmp_path / "out", tensors)
    assert_equal(opened_tensors(tmp_path / "out"), whole)


def test_the_lora_output_of_factory_is_base_and_adapter_together(tmp_path, capsys):
    tensors = write_factory_folder(tmp_path / "out", "llama")
    split_factory(tmp_path / "out", tensors, base_layer=True)
    pairs = factors(tensors)
    named = {f"base_model.model.language_model.{name}": value for name, value in pairs.items()}
    write_adapter(tmp_path / "out", named)
    expected = merged(tensors, pairs)
    assert_close(opened_tensors(tmp_path / "out"), expected)
    assert_close(opened_tensors(tmp_path / "out", merge_lora=tmp_path / "out"), expected)
    # a part alone finds the adapter in the folder above
    parts = [tmp_path / "out" / part for part in ("language_model", "vision_tower", "connector")]
    assert_close(opened_tensors(*parts), expected)
    # the adapter belongs to the trained connector beside it, not to another base
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(UserError, match="out: holds the whole model .*without another base: mindvlm-convert"):
        opened_tensors(tmp_path / "base.safetensors", merge_lora=tmp_path / "out")
    other = write_adapter(tmp_path / "other", named)
    with pytest.raises(UserError, match="holds an adapter of its own, and .*other is another"):
        opened_tensors(tmp_path / "out", merge_lora=other)
    assert (
        main(
            ["--torch_ckpt_path", str(tmp_path / "out"), "--mindspore_ckpt_path", str(tmp_path / "a.ckpt"), "--verify"]
        )
        == 0
    )
    assert f"merged: {tmp_path / 'out'}, changes 2 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(("dialect", "model_type"), [("phi", "phi"), ("llama", "llama"), ("stablelm", "stablelm")])
def test_parts_of_which_the_decoder_has_a_config(tmp_path, dialect, model_type):
    tensors = bench_tensors(dialect)
    config = {**config_of(dialect, tower=None), "model_type": model_type}
    paths = write_parts(tmp_path, tensors, config=config)
    with open_native(paths, ALL) as opened:
        assert opened.model.name == f"tinyllava_{dialect}" and not opened.absent_parts
        assert_equal(read_all(opened.source), read_all(view(tensors)))
        assert opened.sizes.endswith("projectors, vision_tower checked against the rest only")
    # sizes that contradict the decoder's are found without a description of the connector
    save_torch(
        {"mm_projector.0.weight": np.zeros((31, 16), np.float32), "mm_projector.0.bias": np.zeros(31, np.float32)},
        paths[2],
    )
    with pytest.raises(ConversionError, match="does not fit together"):
        opened_tensors(*paths)


def test_the_config_of_a_part_is_not_written_for_the_whole(tmp_path, capsys):
    config = {**config_of("phi", tower=None), "model_type": "phi"}
    paths = write_parts(tmp_path, bench_tensors("phi"), config=config)
    target = ["--to", "hf", "--mindspore_ckpt_path", str(tmp_path / "new")]
    assert main(["--torch_ckpt_path", *map(str, paths), *target]) == 0
    assert "decoder does not describe projectors, vision_tower; put the config.json" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_the_config_above_the_parts_describes_the_whole(tmp_path):
    folder = tmp_path / "out"
    split_factory(folder, write_factory_folder(folder, "llama"))
    parts = [str(folder / part) for part in ("language_model", "vision_tower", "connector")]
    target = ["--to", "hf", "--mindspore_ckpt_path", str(tmp_path / "new"), "--verify"]
    assert main(["--torch_ckpt_path", *parts, *target]) == 0
    assert (tmp_path / "new/config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert mindvlm.load(tmp_path / "new", mode="pynative").chat("the cup", max_new_tokens=1).ids


def test_a_part_given_as_the_model_is_named(tmp_path):
    folder = tmp_path / "out"
    split_factory(folder, write_factory_folder(folder, "llama"))
    with pytest.raises(UserError, match=f"only a part of a model; give {folder}, which holds the model in parts"):
        mindvlm.load(folder / "language_model")
    shutil.rmtree(folder / "language_model")
    with pytest.raises(UserError, match=f"only vision_tower, connector of .*LANGUAGE_MODEL {folder}/vision_tower"):
        mindvlm.load(folder)


def test_what_a_training_saves_without_a_tokenizer_is_named(tmp_path):
    """An output folder of LLaVA with a connector alone, or with an adapter."""
    model = write_tiny_tinyllava(tmp_path)
    tensors = load_file(model / "model.safetensors")
    connector = {name: value for name, value in tensors.items() if "mm_projector" in name}
    save_torch(connector, tmp_path / "connector-only/mm_projector.bin")
    pairs = {f"base_model.model.{name}": value for name, value in factors(tensors).items()}
    write_adapter(tmp_path / "lora", pairs)
    for folder, said in (("connector-only", "holds only the connector; join it"), ("lora", "is a LoRA adapter, not")):
        shutil.copy(model / "config.json", tmp_path / folder)
        with pytest.raises(UserError, match=said):
            mindvlm.load(tmp_path / folder)


def test_a_config_beside_the_connector_describes_the_whole(tmp_path):
    """As the first stage of LLaVA leaves it: a whole config.json beside mm_projector.bin."""
    tensors = bench_tensors("phi")
    paths = write_parts(tmp_path, tensors, config={**config_of("phi", tower=None), "model_type": "phi"})
    (tmp_path / "config.json").write_text(json.dumps(config_of("phi")))
    with open_native(paths, ALL) as opened:
        assert opened.sizes == f"those of {tmp_path / 'config.json'}"
    tensors["model.mm_projector.2.weight"] = np.zeros((32, 33), np.float32)
    write_parts(tmp_path, tensors, config=None)
    with pytest.raises(ConversionError, match="mm_projector.2.weight"):
        opened_tensors(*paths)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module.module.", "_orig_mod.module.", "base_model.model."]
)
@pytest.mark.parametrize("layout", [dict, factory_names, legacy_names, lambda tensors: read_all(view(tensors))])
def test_wrappers_around_all_names(tmp_path, prefix, layout, capsys):
    tensors = layout(bench_tensors("llama", tower="clip"))
    path = save_torch({prefix + name: value for name, value in tensors.items()}, tmp_path / "in.bin")
    arguments = ["--torch_ckpt_path", str(path), "--mindspore_ckpt_path", str(tmp_path / "a.ckpt"), "--verify"]
    assert main(arguments) == 0
    said = capsys.readouterr().out.split("names without ")[1].split(", gives")[0]
    assert set(said.replace(" and ", "").split(".")) == set(prefix.split("."))
    assert_equal(opened_tensors(tmp_path / "a.ckpt"), read_all(view(tensors)))


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_wrappers_inside_a_file_with_one_key(tmp_path, key):
    tensors = bench_tensors("phi")
    inside = {f"module.{name}": torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({key: inside, "epoch": 3}, tmp_path / "in.bin")
    assert_equal(opened_tensors(tmp_path / "in.bin"), read_all(view(tensors)))


def test_a_prefix_that_no_wrapper_is_known_to_add(tmp_path):
    tensors = {f"student.{name}": value for name, value in bench_tensors("phi").items()}
    assert_equal(read_all(view(tensors)), read_all(view(bench_tensors("phi"))))


def test_a_prefix_that_one_name_lacks_stays(tmp_path):
    tensors = {f"module.{name}": value for name, value in bench_tensors("phi").items()}
    tensors["lm_head.weight"] = tensors.pop("module.lm_head.weight")
    with pytest.raises(UserError, match="module.model.embed_tokens"):
        view(tensors)


def test_parts_inside_wrappers_keep_their_own_prefix():
    tower = {name: value for name, value in bench_tensors("phi").items() if "vision_tower" in name}
    assert_equal(read_all(view({f"module.{name}": value for name, value in tower.items()})), read_all(view(tower)))


@pytest.mark.parametrize("place", ["model.layers.0.", "model.vision_tower.", "model.mm_projector."])
@pytest.mark.parametrize("word", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_words_of_wrappers_inside_names(word, place):
    """A program wraps a part of the model, or a block."""
    tensors = bench_tensors("llama")
    compiled = {name.replace(place, place + word): value for name, value in tensors.items()}
    assert_equal(read_all(view(compiled)), read_all(view(tensors)))


@pytest.mark.parametrize("title", [name for name in LAYOUTS if name != "native"])
@pytest.mark.parametrize("shorten", [dict, shorter_tower])
def test_every_layout_and_back(title, shorten):
    tensors = bench_tensors("llama", tower="clip")
    named = shorten(LAYOUTS[title](tensors))
    native = view(named)
    assert native.plan.table.name == (f"transformers 5, {title}" if shorten is shorter_tower else title)
    assert_equal(read_all(native), read_all(view(tensors)))
    assert_equal(read_all(make_plan(native.plan.table.reverse(), native.infos).view(native)), named)


def test_the_state_of_a_llava_in_memory_has_these_names():
    """torch.save(model.state_dict()) with the names of the installed transformers."""
    state = {name: value.detach().numpy() for name, value in llava().state_dict().items()}
    native = view(state)
    assert native.plan.table.name.endswith("transformers llava in memory") and not native.plan.absent_parts


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_output_of_factory_answers(tmp_path, with_adapter):
    folder = tmp_path / "out"
    tensors = write_factory_folder(folder, "llama")
    split_factory(folder, tensors, base_layer=with_adapter)
    if with_adapter:
        pairs = factors(tensors)
        write_adapter(folder, {f"base_model.model.language_model.{name}": value for name, value in pairs.items()})
    answer = mindvlm.load(folder, mode="pynative").chat("the cup", max_new_tokens=4)
    expected = merged(tensors, pairs) if with_adapter else read_all(view(tensors))
    save_file(expected, tmp_path / "whole.safetensors")
    for part in ("language_model", "vision_tower", "connector", "adapter_config.json", "adapter_model.bin"):
        path = folder / part
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "whole.safetensors").rename(folder / "model.safetensors")
    assert mindvlm.load(folder, mode="pynative").chat("the cup", max_new_tokens=4).ids == answer.ids


def test_training_starts_from_the_parts_of_factory(tmp_path):
    folder = tmp_path / "out"
    tensors = write_factory_folder(folder, "llama")
    split_factory(folder, tensors)
    shapes = {name: info.shape for name, info in view(tensors).infos.items()}
    with ExitStack() as stack:
        places = lay_checkpoints(
            stack, [str(folder / part) for part in ("language_model", "vision_tower", "connector")], shapes
        )
        assert_equal({name: place.source.read(name).data for name, place in places.items()}, read_all(view(tensors)))
