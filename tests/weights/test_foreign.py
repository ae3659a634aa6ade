"""Weights that a program quantized or divided are named as such, with the way to whole ones."""

import numpy as np
import pytest
import torch

import mindvlm
from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.models.registry import convertible_models
from mindvlm.weights.lora.adapter import open_adapter
from mindvlm.weights.opened import open_native
from tests.tiny_vary import tiny_config, tiny_weights, write_tiny_vary
from tests.weights.lora.adapters import write_adapter

NAME = "language_model.layers.0.mlp.up_proj"


def refused_everywhere(folder, path) -> str:
    """Returns the message of loading and of converting, which is the same."""
    with pytest.raises(UserError) as loading:
        mindvlm.load(folder / "tiny.yaml", checkpoint=path)
    with pytest.raises(UserError) as converting, open_native([path], convertible_models()):
        pass
    messages = {str(loading.value), str(converting.value)}
    assert len(messages) == 1
    return messages.pop()


@pytest.mark.parametrize(
    ("added", "program"),
    [
        (("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
        (("SCB", "weight_format"), "bitsandbytes"),
        (("qweight", "qzeros", "scales", "g_idx"), "GPTQ or Marlin"),
        (("qweight", "qzeros", "scales"), "AWQ or GPTQ"),
        (("B", "s", "workspace"), "GPTQ or Marlin"),
        (("qweight", "scales", "workspace", "g_idx"), "GPTQ or Marlin"),
        (("weight_scales",), "EETQ"),
        (("_weight_qdata", "_weight_scale"), "torchao"),
        (("weight:qdata", "weight:scale"), "torchao"),
        (("codes", "codebooks", "scales"), "AQLM"),
        (("W_q", "zero", "scale"), "HQQ, quanto or EXL2"),
        (("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors or FP8"),
    ],
)
def test_quantized_weights(tmp_path, added, program):
    write_tiny_vary(tmp_path)
    weights = tiny_weights(tiny_config())
    weights[f"{NAME}.weight"] = np.zeros((5, 1), np.uint8)
    weights |= {f"{NAME}.{name}": np.ones(3, np.float32) for name in added}
    path = tmp_path / "quantized.safetensors"
    write_checkpoint(path, MemorySource(weights))
    message = refused_everywhere(tmp_path, path)
    assert message.startswith(f"{path}: weights quantized by {program} (tensor {NAME}.")
    assert "; give the same model in float16, bfloat16 or float32" in message
    assert ("dequantize()" in message) == (program == "bitsandbytes")


def test_integer_weights(tmp_path):
    write_tiny_vary(tmp_path)
    path = tmp_path / "int8.safetensors"
    weights = tiny_weights(tiny_config())
    write_checkpoint(path, MemorySource(weights | {f"{NAME}.weight": weights[f"{NAME}.weight"].astype(np.int8)}))
    assert f"tensor {NAME}.weight is int8, as in quantized weights; give the same" in refused_everywhere(tmp_path, path)


def test_placeholders_of_zero_3(tmp_path):
    write_tiny_vary(tmp_path)
    weights = {name: np.zeros(0, np.float32) for name in tiny_weights(tiny_config())}
    path = tmp_path / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
    message = refused_everywhere(tmp_path, path)
    count = len(weights)
    assert f"{count} of {count} tensors have no values" in message and "`python zero_to_fp32.py . whole.bin`" in message


def test_placeholders_in_an_adapter(tmp_path):
    write_adapter(tmp_path, {"m.lora_A.weight": torch.ones(2, 4), "m.lora_B.weight": torch.zeros(0)})
    with pytest.raises(
        UserError, match="adapter_model.safetensors: 1 of 2 tensors have no values, the first is base_mod"
    ):
        open_adapter(tmp_path)


def deepspeed_folder(folder, stage: int):
    """Writes the checkpoint of a run with two ranks; returns its folder of states."""
    states = folder / "global_step7"
    states.mkdir()
    (folder / "latest").write_text("global_step7")
    (folder / "zero_to_fp32.py").write_text("")
    (folder / "config.json").write_text("{}")
    torch.save({"cpu": torch.ones(3)}, folder / "rng_state_0.pth")
    for rank in range(2):
        optimizer = {"optimizer_state_dict": {"fp32_flat_groups": [torch.ones(2)]}, "ds_version": "0.14"}
        torch.save(optimizer, states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save({"module": {"a": torch.ones(0)}}, states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage < 3:
        torch.save({"module": {"a": torch.ones(2)}, "ds_version": "0.14"}, states / "mp_rank_00_model_states.pt")
    return states


def test_a_deepspeed_folder_is_named_with_the_command_that_makes_a_whole_file(tmp_path):
    states = deepspeed_folder(tmp_path, stage=3)
    for path in (tmp_path, states, *states.iterdir()):
        with pytest.raises(
            UserError, match=f"{path}: belongs to a DeepSpeed ZeRO .* `python zero_to_fp32.py . whole.bin`"
        ):
            open_checkpoint(path)


def test_a_state_with_all_weights_is_found_beside_the_states_of_optimizers(tmp_path):
    states = deepspeed_folder(tmp_path, stage=2)
    assert open_checkpoint(states).path == states / "mp_rank_00_model_states.pt"
    assert list(open_checkpoint(states).infos) == ["a"]
    with pytest.raises(UserError, match=f"give the result, or {states}/mp_rank_00_model_states.pt with its 16-bit"):
        open_checkpoint(tmp_path)


def test_an_fsdp_folder_is_named(tmp_path):
    shards = tmp_path / "pytorch_model_fsdp_0"
    shards.mkdir()
    (shards / "__0_0.distcp").write_bytes(b"x")
    (shards / ".metadata").write_bytes(b"x")
    for folder, argument in ((shards, "."), (tmp_path, "pytorch_model_fsdp_0")):
        message = f"belongs to an FSDP checkpoint.* `accelerate merge-weights {argument} whole`"
        with pytest.raises(UserError, match=message):
            open_checkpoint(folder)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "optimizer_0.bin", "rng_state_1.pth"])
def test_states_of_training_are_no_weights_of_a_folder(tmp_path, name):
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(UserError, match="holds no weights"):
        open_checkpoint(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "model.bin")
    assert open_checkpoint(tmp_path).path.name == "model.bin"
