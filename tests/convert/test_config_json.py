"""A config.json with settings that this library cannot run: conversion needs the sizes alone, running says why not."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindvlm.convert import convert_weight
from mindvlm.convert.parity.inputs import ParityRequest, inputs_of
from mindvlm.core.errors import UserError
from mindvlm.models.run_config import read_config
from mindvlm.models.vary.hf_config import vary_tiny_config, vary_toy_config
from tests.hf_shapes import tiny_shapes, toy_shapes
from tests.tiny_tinyllava import hf_config, write_tiny_tinyllava

TINYLLAVA = [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'"),
    ("llama", {"rope_scaling": {"factor": 2.0}}, "lacks 'rope_scaling.rope_type'"),
    ("llama", {"attention_bias": True}, "attention_bias is true"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    ("llama", {"head_dim": 16}, "head_dim is 16; only 8 is supported"),
    ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ("llama", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'; expected one of"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ("llama", {"mm_vision_select_feature": "first"}, "mm_vision_select_feature is 'first'"),
    ("phi", {"embd_pdrop": 0.1}, "embd_pdrop is 0.1"),
    ("phi", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm is true"),
    ("phi", {"resid_pdrop": 1.0}, "resid_pdrop is 1.0"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is true"),
]
CLIP = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
SAM = {
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "global_attn_indexes": [],
    "window_size": 2,
    "image_size": 32,
    "patch_size": 4,
    "out_chans": 4,
    "net_2_channels": 4,
    "net_3_channels": 8,
}
TOY = vary_toy_config() | {
    "hidden_size": 16,
    "kv_channels": 8,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "num_hidden_layers": 1,
    "image_token_len": 4,
    "vision_config": {**CLIP, "image_size": 8},
    "vision_high_config": SAM,
}
TINY = vary_tiny_config() | {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vision_high_config": SAM,
    "image_token_len": 4,
}
VARY = [
    ("toy", {"rotary_pct": 0.5}, "rotary_pct is 0.5"),
    ("toy", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ("toy", {"seq_length": None}, "seq_length is null"),
    ("toy", {"hidden_size": 13}, "hidden_size is 13; expected an even number"),
    ("toy", {"kv_channels": 5}, "kv_channels is 5"),
    ("toy", {"image_token_len": 7}, "image_token_len is 7 but both towers output"),
    ("toy", {"vision_config": {**CLIP, "image_size": 12}}, "vision_config outputs .* but vision_high_config"),
    ("tiny", {"image_token_len": 7}, "image_token_len is 7 but the vision vocabulary outputs"),
    ("tiny", {"activation_function": "gelu_fast"}, "activation_function is 'gelu_fast'"),
]


def convert(source, target, *options) -> int:
    return convert_weight.main(
        ["--torch_ckpt_path", str(source), "--mindspore_ckpt_path", str(target), "--verify", *options]
    )


def parity_config(config: dict, family: str, model: str):
    request = ParityRequest(family=family, model=model, source_paths=[], target="", config=config)
    return inputs_of(family).parity_config(request, ())


def require_one_line(error: UserError) -> None:
    assert "\n" not in str(error) and "model." not in str(error) and str(error).count("; ") <= 1


def require_checked_sizes(source, config, tmp_path, capsys) -> None:
    """The folder converts, and no more with another vocabulary."""
    assert convert(source, tmp_path / "out.ckpt") == 0
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 59}))
    assert convert(source, tmp_path / "other.ckpt") != 0
    assert "59" in capsys.readouterr().err


@pytest.mark.parametrize(("dialect", "change", "named"), TINYLLAVA)
def test_tinyllava(tmp_path, capsys, dialect, change, named):
    source, config = write_tiny_tinyllava(tmp_path, dialect=dialect), hf_config(dialect, **change)
    (source / "config.json").write_text(json.dumps(config))
    for run in (lambda: read_config(source), lambda: parity_config(config, "tinyllava", f"tinyllava_{dialect}")):
        with pytest.raises(UserError, match=named) as caught:
            run()
        require_one_line(caught.value)
    require_checked_sizes(source, config, tmp_path, capsys)


@pytest.mark.parametrize(("kind", "change", "named"), VARY)
def test_vary(tmp_path, capsys, kind, change, named):
    config = (TOY if kind == "toy" else TINY) | change
    shapes = (toy_shapes if kind == "toy" else tiny_shapes)(config)
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=named) as caught:
        parity_config(config, "vary", f"vary_{kind}")
    require_one_line(caught.value)
    require_checked_sizes(source, config, tmp_path, capsys)


def test_the_config_of_a_separate_tower_goes_with_the_folder(tmp_path):
    source = write_tiny_tinyllava(tmp_path)
    config = hf_config("llama")
    tower = json.dumps(config.pop("vision_config"))
    (source / "config.json").write_text(json.dumps(config))
    (source / "vision_config.json").write_text(tower)
    assert convert(source, tmp_path / "whole", "--to", "hf") == 0
    assert (tmp_path / "whole" / "vision_config.json").read_text() == tower
    read_config(source)


def test_json_files_with_a_byte_order_mark_are_read(tmp_path):
    source = write_tiny_tinyllava(tmp_path)
    expected = read_config(source)
    for file in source.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_config(source) == expected
    assert convert(source, tmp_path / "out.ckpt") == 0


def test_an_unreadable_config_has_one_remedy(tmp_path, capsys):
    source = write_tiny_tinyllava(tmp_path)
    config = hf_config("llama")
    del config["vocab_size"]
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "out.ckpt") != 0
    assert (
        "is not a valid tinyllava_llama config (lacks 'vocab_size'); move it away or give the folder of tinyllava_llama"
        in capsys.readouterr().err
    )


def test_verify_logits_refuses_weights_with_nan(tmp_path, capsys):
    source = write_tiny_tinyllava(tmp_path)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.inf)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, tmp_path / "out.ckpt", "--verify", "logits") == 2
    assert "safetensors: tensor model.norm.weight holds NaN or infinity; --verify logits" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()


def test_verify_logits_refuses_in_one_line(tmp_path, capsys):
    source = write_tiny_tinyllava(tmp_path)
    (source / "config.json").write_text(json.dumps(hf_config("llama", hidden_act="gelu_fast")))
    assert (
        convert_weight.main(
            [
                "--torch_ckpt_path",
                str(source),
                "--mindspore_ckpt_path",
                str(tmp_path / "out.ckpt"),
                "--verify",
                "logits",
            ]
        )
        != 0
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "hidden_act is 'gelu_fast'; expected one of" in line] and not any(
        "Traceback" in line or "model.language_model" in line for line in lines
    )
