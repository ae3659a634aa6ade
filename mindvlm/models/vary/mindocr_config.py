"""Translates MindOCR's vary_toy.yaml to a run config."""

import warnings

from mindvlm.core.config import unknown_key
from mindvlm.core.errors import UserError
from mindvlm.models.hf.towers import CLIP_224, read_tower
from mindvlm.weights.config_json import ConfigTable

MODEL_NAME = "VaryQwenForCausalLM"

DECODER_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "kv_channels": "head_dim",
    "rotary_emb_base": "rope_theta",
    "theta": "rope_theta",
}
GENERATION_KEYS = {
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_new_tokens",
    "do_sample": "do_sample",
    "top_k": "top_k",
    "top_p": "top_p",
    "temperature": "temperature",
}
# MindOCR keys without a counterpart here: the runtime chooses shapes, precision and attention kernels.
MODEL_KEYS_WITHOUT_EFFECT = {
    "batch_size", "emb_dropout_prob", "eos_token_id", "pad_token_id", "bos_token_id", "ignore_token_id",
    "layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "param_init_type", "ln_param_init_type",
    "use_past", "use_flash_attention", "use_past_shard", "offset", "rotary_pct", "n_kv_heads",
    "max_position_embedding", "max_decode_length", "max_length", "extend_method", "scaling_factor", "is_dynamic",
    "use_kvcache_op", "is_flexible_shape", "use_rope_slice", "qkv_concat", "qkv_has_bias", "multiple_of",
    "ffn_dim_multiplier", "pretrain_seqlen", "use_paged_attention", "block_size", "num_blocks",
    "fine_grain_interleave", "encoder_repetition_penalty", "renormalize_logits", "num_patches",
}  # fmt: skip
PROCESSOR_KEYS_WITHOUT_EFFECT = {"return_tensors", "type"}
TOKENIZER_KEYS_WITHOUT_EFFECT = {"pad_token"}
RUNTIME_KEYS = ("device", "mode", "dtype", "quant", "seed", "tensor_parallel")


def is_mindocr_config(data: dict) -> bool:
    """Returns whether this is a MindOCR model file, which names its class under model.name."""
    model = data.get("model")
    return isinstance(model, dict) and "name" in model


def from_mindocr(data: dict) -> dict:
    """Returns the mapping of a MindOCR file translated to our sections; returns any other mapping unchanged.

    One warning lists the keys without effect.

    Raises:
        UserError: the model is not Vary-toy, a key is unknown, or beam search is requested.
    """
    if not is_mindocr_config(data) or "family" in data:
        return data
    model = dict(data["model"])
    processor = section_of(data, "processor", "processor")
    tokenizer = section_of(processor, "tokenizer", "processor.tokenizer")
    processor.pop("tokenizer", None)
    if model.pop("name") != MODEL_NAME:
        raise UserError(
            f"config key 'model.name' is {data['model']['name']!r}; expected {MODEL_NAME}, the only MindOCR model "
            "supported here"
        )
    if model.pop("num_beams", 1) != 1:
        raise UserError("config key 'model.num_beams' is above 1; beam search is not supported, set it to 1")

    unused = sorted(f"model.{key}" for key in MODEL_KEYS_WITHOUT_EFFECT & model.keys())
    decoder = {ours: model.pop(theirs) for theirs, ours in DECODER_KEYS.items() if theirs in model}
    generation = {ours: model.pop(theirs) for theirs, ours in GENERATION_KEYS.items() if theirs in model}
    hidden_size, num_heads = decoder.get("hidden_size"), decoder.get("num_attention_heads")
    if "head_dim" not in decoder and isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads > 0:
        decoder["head_dim"] = hidden_size // num_heads
    result = {key: data[key] for key in RUNTIME_KEYS if key in data}
    if "compute_dtype" in model:
        result.setdefault("dtype", model.pop("compute_dtype"))
    result.update(
        family="vary",
        name="vary_toy",
        checkpoint=data.get("checkpoint") or model.get("checkpoint_name_or_path") or None,
        model={
            "language_model": decoder,
            "vision_tower": vars(read_tower(ConfigTable(CLIP_224))),
            "vision_vocabulary": {},
            "max_length": model.pop("seq_length", 2048),
        },
        generation=generation,
    )
    for key in model.keys() - MODEL_KEYS_WITHOUT_EFFECT - {"checkpoint_name_or_path"}:
        known = {"seq_length", "checkpoint_name_or_path", "compute_dtype", "num_beams", "name"}
        raise unknown_key(
            key, known | DECODER_KEYS.keys() | GENERATION_KEYS.keys() | MODEL_KEYS_WITHOUT_EFFECT, "model"
        )

    result["processor"] = {"vocab_file": tokenizer.pop("vocab_file", None)}
    for section, keys, without_effect, known in (
        ("processor", processor, PROCESSOR_KEYS_WITHOUT_EFFECT, {"tokenizer"}),
        ("processor.tokenizer", tokenizer, TOKENIZER_KEYS_WITHOUT_EFFECT, {"vocab_file"}),
    ):
        unused += [f"{section}.{key}" for key in sorted(keys.keys() & without_effect)]
        for key in keys.keys() - without_effect:
            raise unknown_key(key, known | without_effect, section)
    for key in data.keys() - {"model", "processor", "checkpoint", *RUNTIME_KEYS}:
        raise unknown_key(key, {"model", "processor", "checkpoint", *RUNTIME_KEYS}, "")
    if unused:
        warnings.warn(f"config keys without effect here: {', '.join(unused)}", stacklevel=2)
    return result


def section_of(data: dict, key: str, where: str) -> dict:
    """Returns a copy of the mapping under `key`, empty if it is missing."""
    section = data.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UserError(f"config section '{where}' is {section!r}; expected a mapping of keys to values")
    return dict(section)
