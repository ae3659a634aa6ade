"""Reads the sizes of a DeLVM from the files that describe them: the config.json of the Hugging Face form and of the
VQGAN, the model_config.pt of a training, and the tensors of a VQGAN."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.checkpoint.torch_reader import read_settings
from mindvlm.core.config import build_config
from mindvlm.core.errors import UserError
from mindvlm.models.delvm.model_config import DelvmModelConfig, VqganConfig
from mindvlm.models.hf.decoders import read_decoder
from mindvlm.nn.config import DecoderConfig
from mindvlm.weights.config_json import (
    ABOVE_ZERO,
    FLAG,
    NUM_LAYERS,
    RATIO,
    SIZE,
    TEXT,
    Config,
    ConfigTable,
    named_types,
    read_config,
    without_nulls,
)

VQGAN_CLASS = "VQGANModel"
MODEL_TYPES = ("InternLMForCausalLM", "internlm", "INTERNLM")
VIT_TYPES = ("vit", "ViT")
SETTINGS = "model_config.pt"
"""The trainer's file with the table that `model` holds in its config file."""
KEYS_OF_OTHERS = ("num_key_value_heads", "image_size", "bos_token_id", "eos_token_id", "pad_token_id")
NORMS = {"rmsnorm": "rms_norm", "layernorm": "layer_norm"}
DEFAULT_LENGTH = 2048
FFN_MULTIPLE = 256
CLASS_DEFAULTS = {
    "channel_mult": [1, 1, 2, 2, 4],
    "attn_resolutions": [16],
    "no_attn_mid_block": False,
    "z_channels": 256,
    "num_embeddings": 1024,
    "quantized_embed_dim": 256,
}
"""Values of keys that a config.json of openMUSE may lack."""


def is_delvm(data: Config) -> bool:
    """Returns whether a config describes a DeLVM, its decoder or its VQGAN."""
    types = {*MODEL_TYPES, *VIT_TYPES}
    is_training = isinstance(data.get("model"), Mapping) and "num_layers" in data["model"]
    # the text models of InternLM have the same model type, and tokens that start and end a text
    is_decoder = "hidden_size" in data and all(data.get(key) is None for key in KEYS_OF_OTHERS)
    return (
        data.get("_class_name") == VQGAN_CLASS
        or is_training
        or (is_decoder and not types.isdisjoint(named_types(data)))
    )


def is_vit(data: Config) -> bool:
    """Returns whether the decoder is the variant with LayerNorm and a plain MLP."""
    model = data.get("model")
    model = model if isinstance(model, Mapping) else {}
    return data.get("model_type") in VIT_TYPES or "mlp_bias" in model or model.get("use_swiglu", True) is False


def read_published(folder: Path) -> dict[str, Any] | None:
    """Returns the config of a folder: its config.json, or the model_config.pt of a training; None without one.

    The VQGAN of a training, which no file describes, is described by its tensors.

    Raises:
        UserError: a file cannot be read.
    """
    config = read_config(folder)
    if config is None and (folder / SETTINGS).is_file():
        config = {"model_type": MODEL_TYPES[-1], "model": read_settings(folder / SETTINGS)}
    if config is None or not is_delvm(config):
        return None
    return whole_config(config, folder)


def whole_config(config: Config, folder: Path) -> dict[str, Any]:
    """Returns a config with the VQGAN of the weights in `folder` under `vq_config`, if they hold one."""
    if "model" not in config or "vq_config" in config:
        return dict(config)
    with open_checkpoint(folder) as checkpoint:
        marker = "embedding.vq_model."
        tensors = {
            name.partition(marker)[2]: info for name, info in checkpoint.infos.items() if name.partition(marker)[1]
        }
        return {**config, "vq_config": vqgan_keys(tensors, str(checkpoint.path))} if tensors else dict(config)


def from_published(data: Config, *, path: str = "config.json", only_sizes: bool = False) -> DelvmModelConfig:
    """Returns the model config of the Hugging Face form, of a training or of a VQGAN.

    Args:
        data: the contents of config.json, or the result of `read_published`.
        path: what messages call the file.
        only_sizes: whether to read tensor shapes only; the result may describe a model that cannot run.

    Raises:
        UserError: a key is missing, has a wrong value, or requests an unsupported feature.
    """
    table = ConfigTable(without_nulls(data), path, only_sizes=only_sizes)
    if data.get("_class_name") == VQGAN_CLASS:
        return DelvmModelConfig(vqgan=read_vqgan(table))
    vq_config = table.table("vq_config")
    vqgan = read_vqgan(vq_config) if vq_config else None
    training = table.table("model")
    if training and vqgan is None:
        raise table.error("lacks 'vq_config', and the weights beside it hold no VQGAN")
    decoder = training_decoder(training, vit=is_vit(data)) if training else hf_decoder(table)
    length = table.setting("max_position_embeddings", SIZE, DEFAULT_LENGTH)
    with table.keys_for({"model.language_model.": "", "model.vqgan.": "vq_config."}):
        return DelvmModelConfig(
            language_model=decoder,
            vqgan=vqgan,
            input_embedding="codebook" if training else "table",
            max_length=length,
            validate=not only_sizes,
        )


def hf_decoder(table: ConfigTable) -> DecoderConfig:
    """Returns the decoder of a converted model's config.json."""
    table.refuse_setting("tie_word_embeddings", False)
    bias = table.get("bias", FLAG, True)
    changes: dict[str, Any] = {"qkv_bias": bias, "o_bias": bias}
    if table.get("model_type", TEXT) not in VIT_TYPES:
        return read_decoder(table, "qwen2", **changes)
    changes |= {"norm": "layer_norm", "layer_norm_eps": table.setting("norm_eps", ABOVE_ZERO, 1e-6), "mlp": "plain"}
    changes |= {"hidden_act": table.setting("hidden_act", TEXT, "gelu"), "mlp_bias": table.get("mlp_bias", FLAG, False)}
    return read_decoder(table, "qwen2", **changes)


def training_decoder(table: ConfigTable, *, vit: bool) -> DecoderConfig:
    """Returns the decoder of a training's settings."""
    hidden_size, num_heads = table.require("hidden_size", SIZE), table.require("num_attention_heads", SIZE)
    ratio = table.get("mlp_ratio", RATIO, 4)
    eps = table.setting("layer_norm_epsilon", ABOVE_ZERO, 1e-5)
    if hidden_size % num_heads:
        raise table.error(f"model.hidden_size is {hidden_size}, which {num_heads} attention heads do not divide")
    norm = table.get("norm_type", TEXT, "rmsnorm")
    if norm not in NORMS:
        raise table.error(f"model.norm_type is {norm!r}, expected one of {', '.join(NORMS)}")
    # only the trainings of this library have the key
    width = table.get("intermediate_size", SIZE, training_width(hidden_size, ratio))
    mlp: dict[str, Any] = {"intermediate_size": width}
    if vit:
        mlp = {"intermediate_size": int(hidden_size * ratio), "mlp": "plain", "hidden_act": "gelu_pytorch_tanh"}
        mlp |= {"mlp_bias": table.get("mlp_bias", FLAG, False)}
    return DecoderConfig(
        vocab_size=table.require("vocab_size", SIZE),
        hidden_size=hidden_size,
        num_hidden_layers=table.require("num_layers", NUM_LAYERS),
        num_attention_heads=num_heads,
        head_dim=hidden_size // num_heads,
        norm=NORMS[norm],
        rms_norm_eps=eps,
        layer_norm_eps=eps,
        qkv_bias=True,
        o_bias=True,
        use_dynamic_ntk=False,
        use_logn_attn=False,
        **mlp,
    )


def read_vqgan(table: ConfigTable) -> VqganConfig:
    """Returns the config of a VQGAN."""
    values = {key: value for key, value in table.values.items() if not key.startswith("_")}
    dropout = values.pop("dropout", 0)
    if dropout:
        raise UserError(f"{table.path}: {table.prefix}dropout is {dropout}; only 0 is supported")
    with table.keys_for({"model.vqgan.": table.prefix}):
        return build_config(VqganConfig, CLASS_DEFAULTS | values, "model.vqgan")


def vqgan_keys(infos: Mapping[str, TensorInfo], origin: str, *, resolution: int = 256) -> dict[str, Any]:
    """Returns the config of a VQGAN from the shapes of its tensors, by openMUSE's names.

    The tensors do not tell the resolution; that of all published VQGANs is 256.

    Args:
        infos: the tensors.
        origin: their file or folder, for messages.

    Raises:
        UserError: they are not those of a VQGAN.
    """
    try:
        hidden = infos["encoder.conv_in.weight"].shape[0]
        numbers = [m for name in infos if (m := re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight$", name))]
        levels = range(1 + max(int(match[1]) for match in numbers))
        widths = [infos[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
        num_codes, width = infos["quantize.embedding.weight"].shape
        return {
            "resolution": resolution,
            "hidden_channels": hidden,
            "channel_mult": [channels // hidden for channels in widths],
            "num_res_blocks": 1 + max(int(match[2]) for match in numbers),
            "attn_resolutions": [
                resolution // 2**level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in infos
            ],
            "no_attn_mid_block": "encoder.mid.attn_1.q.weight" not in infos,
            "z_channels": infos["encoder.conv_out.weight"].shape[0],
            "num_embeddings": num_codes,
            "quantized_embed_dim": width,
            "resample_with_conv": len(levels) == 1 or "encoder.down.0.downsample.conv.weight" in infos,
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise UserError(
            f"{origin}: the VQGAN lacks tensors by which its sizes are known; give the weights of a whole one"
        ) from None


def hf_keys(config: DelvmModelConfig) -> dict[str, Any]:
    """Returns the config.json of the Hugging Face form. Its epsilon stays that of the training."""
    lm = config.language_model
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "hidden_act")
    is_gated = lm.mlp == "gated"
    own = {"rms_norm_eps": lm.rms_norm_eps} if is_gated else {"norm_eps": lm.layer_norm_eps, "mlp_bias": lm.mlp_bias}
    return {
        "architectures": [MODEL_TYPES[0]],
        "model_type": MODEL_TYPES[1] if is_gated else VIT_TYPES[0],
        **{key: getattr(lm, key) for key in same},
        **own,
        "bias": lm.qkv_bias,
        "initializer_range": lm.initializer_range,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def training_keys(config: DelvmModelConfig, vqgan: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of the training form, as `read_published` gives it.

    Args:
        config: the decoder.
        vqgan: the config of the VQGAN.
    """
    lm = config.language_model
    is_gated, is_rms = lm.mlp == "gated", lm.norm == "rms_norm"
    model: dict[str, Any] = {
        "hidden_size": lm.hidden_size,
        "num_layers": lm.num_hidden_layers,
        "num_attention_heads": lm.num_attention_heads,
        # the trainer rounds the product down
        "mlp_ratio": (lm.intermediate_size + 0.5) / lm.hidden_size if not is_gated else 8 / 3,
        "vocab_size": lm.vocab_size,
        "layer_norm_epsilon": lm.rms_norm_eps if is_rms else lm.layer_norm_eps,
        "norm_type": "rmsnorm" if is_rms else "layernorm",
    }
    if is_gated and training_width(lm.hidden_size, 8 / 3) != lm.intermediate_size:
        model["mlp_ratio"] = lm.intermediate_size / lm.hidden_size
    if is_gated and training_width(lm.hidden_size, model["mlp_ratio"]) != lm.intermediate_size:
        model["intermediate_size"] = lm.intermediate_size
    length = {} if config.max_length == DEFAULT_LENGTH else {"max_position_embeddings": config.max_length}
    own = {} if is_gated else {"mlp_bias": lm.mlp_bias}
    return {
        "model_type": MODEL_TYPES[-1] if is_gated else VIT_TYPES[-1],
        "model": model | own,
        "vq_config": {**vqgan, "_class_name": VQGAN_CLASS},
        **length,
    }


def training_width(hidden_size: int, ratio: float) -> int:
    """Returns the width of a gated MLP of a training, a multiple of 256."""
    return -(-int(hidden_size * ratio) // FFN_MULTIPLE) * FFN_MULTIPLE
