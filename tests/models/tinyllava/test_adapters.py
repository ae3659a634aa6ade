"""Adapters on bases of every layout, with a connector beside them, and what PEFT itself writes."""

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file

from mindvlm.convert.convert_weight import main
from mindvlm.core.errors import UserError
from mindvlm.weights.lora.merging import adapted_view
from mindvlm.weights.rules.findings import ConversionError
from tests.known_models import TINYLLAVA
from tests.models.tinyllava.test_names import (
    bench_tensors,
    factory_names,
    read_all,
    view,
)
from tests.models.tinyllava.test_transformers_5 import llava
from tests.models.tinyllava.trainer_files import (
    ADAPTED,
    LAYOUTS,
    adapter_names,
    assert_close,
    factors,
    merged,
    opened_tensors,
    save_torch,
    write_adapter,
)


@pytest.mark.parametrize("base", LAYOUTS)
@pytest.mark.parametrize("named", LAYOUTS)
def test_adapters_of_one_layout_on_a_base_of_another(tmp_path, base, named):
    tensors = bench_tensors("llama", tower="clip")
    pairs = factors(tensors)
    source = save_torch(LAYOUTS[base](tensors), tmp_path / "base.bin")
    adapter = write_adapter(tmp_path / "adapter", adapter_names(named, pairs))
    expected = merged(tensors, pairs)
    assert_close(opened_tensors(source, merge_lora=adapter), expected)
    with adapted_view(view(tensors), adapter, TINYLLAVA) as loaded:
        assert_close(read_all(loaded), expected)


def test_an_adapter_of_a_base_whose_head_has_a_bias(tmp_path):
    """TinyLLaVABench has no name for it, but names the adapter."""
    tensors = bench_tensors("phi", head_bias=True)
    pairs = factors(tensors)
    source = save_torch(factory_names(tensors), tmp_path / "base.bin")
    adapter = write_adapter(tmp_path / "adapter", adapter_names("Hugging Face", pairs))
    actual = opened_tensors(source, merge_lora=adapter)
    assert_close(
        {name: value for name, value in actual.items() if name != "language_model.lm_head.bias"}, merged(tensors, pairs)
    )
    np.testing.assert_array_equal(actual["language_model.lm_head.bias"], tensors["lm_head.bias"])


CONNECTOR_SPELLINGS = (
    "model.mm_projector",
    "mm_projector",
    "base_model.model.mm_projector",
    "base_model.model.model.mm_projector",
    "module.model.mm_projector",
    "module.base_model.model.model.mm_projector",
    "connector._connector",
    "base_model.model.connector._connector",
    "_connector",
)


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
@pytest.mark.parametrize("spelling", CONNECTOR_SPELLINGS)
def test_the_connector_beside_an_adapter(tmp_path, spelling, ending):
    tensors = bench_tensors("llama")
    pairs = factors(tensors)
    adapter = write_adapter(tmp_path / "adapter", adapter_names("Hugging Face", pairs))
    trained = {name: value + 1 for name, value in tensors.items() if "mm_projector" in name}
    beside = {name.replace("model.mm_projector", spelling): value for name, value in trained.items()}
    file = adapter / f"non_lora_trainables{ending}"
    save_torch(beside, file) if ending == ".bin" else save_file(beside, file)
    source = save_torch(tensors, tmp_path / "base.bin")
    expected = merged({**tensors, **trained}, pairs)
    assert_close(opened_tensors(source, merge_lora=adapter), expected)
    arguments = ["--torch_ckpt_path", str(source), "--merge_lora", str(adapter), "--verify"]
    assert (
        main([*arguments, "--mindspore_ckpt_path", str(tmp_path / "a.ckpt"), "--report", str(tmp_path / "a.json")]) == 0
    )
    # a part of the connector is not enough
    for left in (".bias", "2.weight"):
        half = {name: value for name, value in beside.items() if not name.endswith(left)}
        save_torch(half, file) if ending == ".bin" else save_file(half, file)
        with pytest.raises(
            ConversionError, match=f"non_lora_trainables{ending} replaces half of a module.*mm_projector"
        ):
            opened_tensors(source, merge_lora=adapter)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("mm_projector.bin", "model.mm_projector."),
        ("mm_projector.safetensors", "mm_projector."),
        ("connector/pytorch_model.bin", "_connector."),
        ("connector/model.safetensors", "_connector."),
        ("non_lora_trainables.bin", "base_model.model.model.mm_projector.modules_to_save.sft."),
    ],
)
def test_the_connector_in_another_file_beside_an_adapter(tmp_path, name, prefix):
    tensors = bench_tensors("llama")
    pairs = factors(tensors)
    adapter = write_adapter(tmp_path / "adapter", adapter_names("Hugging Face", pairs))
    trained = {key: value + 1 for key, value in tensors.items() if "mm_projector" in key}
    beside = {key.replace("model.mm_projector.", prefix): value for key, value in trained.items()}
    file = adapter / name
    file.parent.mkdir(exist_ok=True)
    save_torch(beside, file) if file.suffix == ".bin" else save_file(beside, file)
    source = save_torch(tensors, tmp_path / "base.bin")
    assert_close(opened_tensors(source, merge_lora=adapter), merged({**tensors, **trained}, pairs))
    # what was trained with the adapter overrides a connector from before
    last = {key: value + 2 for key, value in tensors.items() if "mm_projector" in key}
    save_torch(last, adapter / "non_lora_trainables.bin")
    assert_close(opened_tensors(source, merge_lora=adapter), merged({**tensors, **last}, pairs))
    with pytest.raises(UserError, match="non_lora_trainables.bin: holds parts that were trained completely, not an"):
        opened_tensors(source, merge_lora=adapter / "non_lora_trainables.bin")


@pytest.mark.parametrize(
    ("layers", "said"), [([""], r"\(linear connector\)"), (["0.", "2.", "4."], r"\(MLP of 3 layers\)")]
)
def test_a_connector_of_another_type_beside_an_adapter(tmp_path, layers, said):
    tensors = bench_tensors("llama")
    adapter = write_adapter(tmp_path / "adapter", adapter_names("Hugging Face", factors(tensors)))
    beside = {f"model.mm_projector.{i}weight": np.ones((32, 16 if i in ("", "0.") else 32), np.float32) for i in layers}
    beside |= {name.replace("weight", "bias"): np.ones(32, np.float32) for name in beside}
    save_torch(beside, adapter / "non_lora_trainables.bin")
    source = save_torch(tensors, tmp_path / "base.bin")
    with pytest.raises(UserError, match=rf"non_lora_trainables.bin: does not fit .* {said} than .*\(MLP of 2 layers\)"):
        opened_tensors(source, merge_lora=adapter)


def test_other_parts_beside_an_adapter_are_named(tmp_path):
    tensors = bench_tensors("llama")
    adapter = write_adapter(tmp_path / "adapter", adapter_names("Hugging Face", factors(tensors)))
    source = save_torch(tensors, tmp_path / "base.bin")
    save_torch({"model.mm_resampler.weight": np.ones(3, np.float32)}, adapter / "non_lora_trainables.bin")
    with pytest.raises(UserError, match="non_lora_trainables.bin: changes tensors .* the first is model.mm_resampler"):
        opened_tensors(source, merge_lora=adapter)
    norm = {"base_model.model.model.norm.weight": np.full(32, 2.0, np.float32)}
    save_torch(norm, adapter / "non_lora_trainables.bin")
    assert (opened_tensors(source, merge_lora=adapter)["language_model.norm.weight"] == 2).all()


@pytest.mark.parametrize("scale", [1, 1e-3])
def test_an_adapter_is_not_merged_twice(tmp_path, capsys, scale):
    """The values tell it, and the text entry of a converted file where the change is too small."""
    tensors = bench_tensors("llama")
    pairs = {name: scale * value for name, value in factors(tensors).items()}
    adapter = write_adapter(tmp_path / "adapter", adapter_names("Hugging Face", pairs))
    source = save_torch(tensors, tmp_path / "base.bin")
    arguments = ["--merge_lora", str(adapter), "--mindspore_ckpt_path"]
    assert main(["--torch_ckpt_path", str(source), *arguments, str(tmp_path / "once.safetensors")]) == 0
    assert (
        main(["--torch_ckpt_path", str(tmp_path / "once.safetensors"), *arguments, str(tmp_path / "twice.ckpt")]) == 2
    )
    assert "once.safetensors: holds the adapter" in capsys.readouterr().err and not (tmp_path / "twice.ckpt").exists()


@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16"])
def test_a_base_that_may_hold_a_small_adapter(tmp_path, capsys, dtype):
    """A torch file has no text entries; the connector that was trained with the adapter hints at it."""
    tensors = bench_tensors("llama")
    pairs = {name: 1e-3 * value for name, value in factors(tensors).items()}
    adapter = write_adapter(tmp_path / "adapter", adapter_names("Hugging Face", pairs))
    trained = {name: value + 0.1 for name, value in tensors.items() if "mm_projector" in name}
    save_torch(trained, adapter / "non_lora_trainables.bin")
    source, once = save_torch(tensors, tmp_path / "base.bin"), tmp_path / "once.bin"
    arguments = ["--merge_lora", str(adapter), "--dtype", dtype, "--mindspore_ckpt_path"]
    assert main(["--torch_ckpt_path", str(source), *arguments, str(once)]) == 0
    assert "may hold" not in capsys.readouterr().err
    assert main(["--torch_ckpt_path", str(once), *arguments, str(tmp_path / "twice.bin")]) == 0
    assert "once.bin may hold the adapter" in capsys.readouterr().err
    # a change of zero can be merged again
    write_adapter(adapter, adapter_names("Hugging Face", {name: 0 * value for name, value in pairs.items()}))
    assert main(["--torch_ckpt_path", str(once), *arguments, str(tmp_path / "twice.bin")]) == 0
    assert "may hold" not in capsys.readouterr().err


def test_a_model_with_an_adapter_that_was_not_merged(tmp_path):
    tensors = bench_tensors("llama")
    inside = {f"base_model.model.{name}": value for name, value in tensors.items()}
    for name in ADAPTED:
        inside[f"base_model.model.{name}.base_layer.weight"] = inside.pop(f"base_model.model.{name}.weight")
    pairs = {f"base_model.model.{n}".replace(".weight", ".default.weight"): v for n, v in factors(tensors).items()}
    unmerged = save_torch({**inside, **pairs}, tmp_path / "a.bin")
    with pytest.raises(UserError, match="holds a model and 4 factors of a LoRA adapter that was not merged"):
        opened_tensors(unmerged)
    with pytest.raises(UserError, match="is a LoRA adapter, not a model"):
        opened_tensors(save_torch(pairs, tmp_path / "b.bin"))
    # the base alone is not what was trained
    base = save_torch(inside, tmp_path / "c/c.bin")
    with pytest.raises(UserError, match="c.bin: the base of a LoRA adapter, without what was trained .*--merge_lora"):
        opened_tensors(base)
    adapter = write_adapter(tmp_path / "adapter", adapter_names("Hugging Face", factors(tensors)))
    assert_close(opened_tensors(base, merge_lora=adapter), merged(tensors, factors(tensors)))
    # nor is a model with copies of what was trained completely
    copies = {name.replace("mm_projector.", "mm_projector.modules_to_save.default."): v for name, v in tensors.items()}
    with pytest.raises(UserError, match="inside PEFT, with an adapter that was not merged .*merge_and_unload"):
        opened_tensors(save_torch(copies, tmp_path / "d.bin"))


@pytest.mark.parametrize("prefix", ["llava.", "module.", "model."])
def test_an_adapter_trained_inside_a_wrapper(tmp_path, prefix):
    tensors = bench_tensors("llama")
    pairs = factors(tensors)
    adapter = write_adapter(tmp_path / "adapter", {f"base_model.model.{prefix}{n}": v for n, v in pairs.items()})
    trained = {name: value + 1 for name, value in tensors.items() if "mm_projector" in name}
    save_torch({f"{prefix}{name}": value for name, value in trained.items()}, adapter / "non_lora_trainables.bin")
    source = save_torch(tensors, tmp_path / "base.bin")
    assert_close(opened_tensors(source, merge_lora=adapter), merged({**tensors, **trained}, pairs))


@pytest.mark.parametrize("name", ["default", "ocr"])
def test_what_peft_writes_for_a_llava(tmp_path, name):
    """The adapter has the names in memory, and those of `save_pretrained` are the base's."""
    model = llava()
    model.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "state.bin")
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"]
    )
    adapted = peft.get_peft_model(model, config, adapter_name=name)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    torch.save(adapted.state_dict(), tmp_path / "unmerged.bin")
    torch.save(adapted.merge_and_unload().state_dict(), tmp_path / "merged.bin")
    expected = opened_tensors(tmp_path / "merged.bin")
    for base in ("base", "state.bin"):
        assert_close(opened_tensors(tmp_path / base, merge_lora=tmp_path / "adapter"), expected)
    with pytest.raises(UserError, match="holds the adapter"):
        opened_tensors(tmp_path / "merged.bin", merge_lora=tmp_path / "adapter")
    with pytest.raises(UserError, match="factors of a LoRA adapter that was not merged"):
        opened_tensors(tmp_path / "unmerged.bin")
