"""Writes the decoder of a workload as a GGUF file for llama.cpp, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, TokenType

from mindvlm.checkpoint import TensorSource
from mindvlm.nn.config import DecoderConfig

SCALE_BYTES = 2
CONTEXT_LENGTH = 1 << 15


def write_gguf(path: Path, source: TensorSource, decoder: DecoderConfig, *, architecture: str, dtype: str) -> None:
    """Writes the decoder with all its matrices in one format, and a vocabulary of made-up words.

    Args:
        source: the model under its official names.
        architecture: llama.cpp's name of the decoder, "qwen" or "llama".
        dtype: "bf16", "q8_0", "q4_0" or "q4_K". The package `gguf` cannot quantize to q4_K: its blocks hold random
            bits, which are as fast. Where the width is no multiple of its 256 values, q5_0 takes its place, as in
            llama.cpp's own files.
    """
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    add_sizes(writer, decoder, architecture)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, decoder.num_hidden_layers)
    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in source.infos}
    found = {name: short for name, short in found.items() if short}
    for name, short in found.items():
        shape = source.infos[name].shape
        if len(shape) == 1:
            writer.add_tensor_info(short, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            quant = block_format(shape, dtype)
            packed = gguf.quants.quant_shape_to_byte_shape(shape, quant)
            size = packed[0] * packed[1]
            writer.add_tensor_info(short, packed, np.dtype(np.uint8), size, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, short in found.items():
        values = source.read(name).to_float32()
        if architecture == "llama" and ("attn_q" in short or "attn_k" in short):
            values = interleaved(
                values, decoder.num_attention_heads if "attn_q" in short else decoder.num_key_value_heads
            )
        writer.write_tensor_data(quantized(values, dtype))
    writer.close()
    partial.rename(path)


def add_sizes(writer: Any, decoder: DecoderConfig, architecture: str) -> None:
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_block_count(decoder.num_hidden_layers)
    # the config.json of a Qwen-1 states twice the width
    writer.add_feed_forward_length(decoder.intermediate_size * (2 if architecture == "qwen" else 1))
    writer.add_head_count(decoder.num_attention_heads)
    writer.add_head_count_kv(decoder.num_key_value_heads)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(float(decoder.rope_theta))
    writer.add_layer_norm_rms_eps(decoder.rms_norm_eps)
    size = decoder.vocab_size
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{number} " for number in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([TokenType.NORMAL] * size)


def block_format(shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """Returns the format of a matrix in a file of this dtype."""
    quant = GGMLQuantizationType[dtype.upper()]
    return GGMLQuantizationType.Q5_0 if shape[-1] % GGML_QUANT_SIZES[quant][0] else quant


def quantized(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns a matrix in the bytes of the format; vectors stay float32."""
    if values.ndim == 1:
        return values
    quant = block_format(values.shape, dtype)
    if quant is not GGMLQuantizationType.Q4_K:
        return gguf.quants.quantize(values, quant)
    block, size = GGML_QUANT_SIZES[quant]
    blocks = np.random.default_rng(0).integers(0, 256, (values.size // block, size), np.uint8)
    # a scale and an offset in float16 come first
    blocks[:, : 2 * SCALE_BYTES] = np.array([1e-4, 1e-4], np.float16).view(np.uint8)
    return blocks.reshape(len(values), -1)


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns a projection (O, I) in llama.cpp's order, where the pairs that a rotation mixes are neighbours."""
    return np.ascontiguousarray(weight.reshape(num_heads, 2, -1, weight.shape[-1]).swapaxes(1, 2)).reshape(weight.shape)
