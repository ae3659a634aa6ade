"""Estimate of the memory that a model needs, from its config alone.

Activations are counted operator by operator at the peak of each graph. The sizes of the runtime and of compiled graphs
are constants measured with MindSpore 2.10 on x86.

Peak resident memory in MiB, estimated / measured (CPU, graph mode, float32, all graphs in one process, one picture
after the other, the cache grown to `max_length` at the end). Rows marked * and all of TinyLLaVA were measured after
the constants had been set:

    model, size of its parameters            images  prompt  max_length    first tokens        full context
    Vary-nano, 9 MiB                              1      60         512     739 /   702  +5%    741 /   702  +6%
    small Vary, 314 MiB                           1     128        2048    1235 /  1228  +1%   1327 /  1306  +2%
    small Vary                                    0     128        2048     983 /   962  +2%   1075 /  1013  +6%
    small Vary                                    4    1500        8192    1562 /  1547  +1%   1882 /  1807  +4%
    small Vary                                    0    1500        8192    1382 /  1363  +1%   1702 /  1555  +9%
    SAM ViT-B with 4 layers, 459 MiB              2     600        2048    1971 /  2040  -3%   2003 /  2071  -3%
    12 layers, 151,860 tokens, 1305 MiB           1     300        2048    2270 /  2254  +1%   2450 /  2422  +1%
    pictures of 1536 pixels, 923 MiB *            2    2500        6000    3434 /  3581  -4%   3716 /  3735  -1%
    Vary-tiny, 851 MiB *                          1     300        4096    2380 /  2364  +1%   2776 /  2749  +1%
    Vary-toy, 8535 MiB                            1     292        2048   10445 / 10497  -0%  11405 / 11424  -0%
    least TinyLLaVA, 1 MiB                        1      65         256     666 /   573 +16%    666 /   573 +16%
    Llama and SigLIP, 332 MiB                     1     778        2048    1212 /  1148  +6%   1228 /  1164  +5%
    Llama and SigLIP                              0     300        2048    1028 /  1010  +2%   1048 /  1019  +3%
    Llama and SigLIP                              2    1600        2048    1422 /  1384  +3%   1422 /  1384  +3%
    4 layers of TinyLLaVA-1.5B, 1435 MiB          1     778        2048    2729 /  2466 +11%   2745 /  2481 +11%
    Phi and CLIP, 502 MiB                         1     650        3072    1387 /  1306  +6%   1547 /  1452  +7%
    2 layers of Phi-2, 1651 MiB                   1     767        2048    2939 /  2649 +11%   3019 /  2719 +11%
    StableLM and SigLIP, 510 MiB                  1     800        4096    1385 /  1294  +7%   1505 /  1385  +9%
    Llama, SigLIP and a resampler, 317 MiB        1     200        2048    1077 /  1019  +6%   1143 /  1073  +7%
    small Llama and SigLIP so400m, 1689 MiB       1     778        2048    2687 /  2606  +3%   2695 /  2606  +3%
    TinyLLaVA-1.5B, 5739 MiB                      1     778        2048    7287 /  7028  +4%   7375 /  7115  +4%

    DeLVM with a VQGAN of 14 MiB *                1    1792        2048    1000 /  1048  -5%   1000 /  1080  -7%
    VQGAN of half the width, 274 MiB *            1    1792        2048    1995 /  2032  -2%   1995 /  2096  -5%
    VQGAN with attention, 124 MiB *               1    1792        2048    1475 /  1505  -2%   1475 /  1543  -4%
    DeLVM 300M, 1700 MiB *                        1    1792        2048    5161 /  5267  -2%   5161 /  5331  -3%

On the native kernels, 16-bit weights as stored, until the first tokens:

    model, size of its weights               images  prompt        loading        first tokens
    small Vary, 157 MiB                           1     128      568 /  598  -5%     754 /  780  -3%
    small Vary                                    0     128      568 /  598  -5%     707 /  727  -3%
    SAM ViT-B with 4 layers, 229 MiB              1     600      664 /  694  -4%     963 /  973  -1%
    Llama and SigLIP, 166 MiB                     1     778      573 /  601  -5%     776 /  777  -0%
    Llama and SigLIP                              0     300      573 /  601  -5%     722 /  743  -3%
    Phi and CLIP, 250 MiB                         1     650      657 /  681  -4%     900 /  894  +1%

The estimate of loading is within 5 % for all rows. The counts also apply to Ascend, with its compute dtype and without
the memory of the runtime, but have not been measured there.

H query heads, C new tokens, S cache capacity.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from mindvlm.checkpoint import TensorInfo, dtypes
from mindvlm.core.weight_formats import blocks_for, find_block, part_of
from mindvlm.generation.graphs import bucket_length, cache_capacity
from mindvlm.generation.prefill import MAX_PREFILL_LENGTH
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.memory import FLOAT32, MIB, VisionMemory
from mindvlm.nn.native_products import MAX_READ_BYTES

# resident memory after `import mindspore`, and the cost of compiling any first graph
RUNTIME_BYTES = 405 * MIB
FIRST_GRAPH_BYTES = 230 * MIB
# the compiled prefill and decode graphs
DECODER_LAYER_BYTES = 3 * MIB
# both on the native kernels
NATIVE_FIRST_GRAPH_BYTES, NATIVE_DECODER_LAYER_BYTES = 115 * MIB, 2 * MIB
# dtypes in which the native kernels read a matrix as it is stored
KEPT = ("float16", "bfloat16")


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of each part of a run in bytes, in one process.

    Attributes:
        runtime: Python with MindSpore; 0 on a separate device.
        parameters: all weights in the compute dtype.
        loading: peak while weights are loaded, including the loaded ones.
        graphs: compiled graphs.
        activations: peak of the vision and prefill graphs, which share a memory pool that is never freed.
        prompt_cache: KV cache of the prompt.
        full_cache: KV cache for `max_length` plus the previous one, from which it is copied.
    """

    runtime: int
    parameters: int
    loading: int
    graphs: int
    activations: int
    prompt_cache: int
    full_cache: int

    @property
    def load(self) -> int:
        """Peak while loading."""
        return self.runtime + self.loading

    @property
    def prefill(self) -> int:
        """Peak until the first token, including pictures."""
        return self.runtime + self.parameters + self.graphs + self.activations + self.prompt_cache

    @property
    def decode(self) -> int:
        """Peak when the conversation grows to `max_length` tokens."""
        return self.prefill - self.prompt_cache + self.full_cache

    @property
    def peak(self) -> int:
        return max(self.load, self.prefill, self.decode)


def estimate_memory(
    config,
    weights: Iterable[TensorInfo],
    vision: VisionMemory,
    *,
    num_images: int,
    num_prompt_tokens: int,
    dtype: str = "float32",
    on_host: bool = True,
    num_slots: int = 1,
    num_processes: int = 1,
    formats: Mapping[str, str] | None = None,
) -> MemoryEstimate:
    """Returns the estimated memory for loading a model and answering one prompt.

    Args:
        config: the family's model config: `language_model`, `image_token_len` and `max_length`.
        weights: the stored tensors in the order of loading; of several processes the parts of one.
        vision: memory of the towers, see `Family.vision_memory`; every process is assumed to hold all of it.
        num_images: number of pictures in the prompt.
        num_prompt_tokens: length of the prompt, including image placeholders.
        dtype: the compute dtype.
        on_host: whether the model is in host memory with the runtime; False on an NPU.
        num_slots: rows of the KV cache; on the kernels, their prompts are computed together.
        num_processes: tensor-parallel processes that share the decoder.
        formats: of weight matrices by part, see `weight_formats.parse_weights`; None without the native kernels.
    """
    lm, weights, item_size = config.language_model.share(num_processes), list(weights), dtypes.item_size(dtype)
    vision = vision if num_images else VisionMemory()
    num_padded = padded_prompt_length(num_prompt_tokens, config.max_length)
    capacity = cache_capacity(num_padded, config.max_length)
    graphs = vision.graph
    if formats:
        graphs += NATIVE_FIRST_GRAPH_BYTES + lm.num_hidden_layers * NATIVE_DECODER_LAYER_BYTES
    else:
        graphs += FIRST_GRAPH_BYTES + lm.num_hidden_layers * DECODER_LAYER_BYTES
    features = num_images * config.image_token_len * lm.hidden_size * item_size
    num_tokens = num_padded * (num_slots if formats else 1)
    prefill = prefill_activations(
        lm, min(num_tokens, MAX_PREFILL_LENGTH), capacity, item_size, stores_scores=formats is None
    )
    prefill += 3 * num_padded * lm.hidden_size * item_size + 2 * features
    return MemoryEstimate(
        runtime=RUNTIME_BYTES if on_host else 0,
        parameters=sum(replace(info, dtype=held_dtype(info, dtype, formats)).num_bytes for info in weights),
        loading=loading_bytes(weights, dtype, formats),
        graphs=int(graphs) if on_host else 0,
        activations=max(vision.activations, prefill) + features,
        prompt_cache=num_slots * cache_bytes(lm, capacity, item_size),
        full_cache=num_slots * grown_cache_bytes(lm, capacity, config.max_length, item_size),
    )


def padded_prompt_length(num_tokens: int, max_length: int) -> int:
    """Returns the number of tokens that the engine prefills for a prompt: whole chunks and a bucket."""
    pieces, rest = divmod(num_tokens, MAX_PREFILL_LENGTH)
    padded = pieces * MAX_PREFILL_LENGTH + bucket_length(rest)
    return max(min(padded, bucket_length(max_length)), num_tokens)


def held_dtype(info: TensorInfo, dtype: str, formats: Mapping[str, str] | None) -> str:
    """Returns the dtype in which a stored tensor is held in memory, see `estimate_memory`."""
    chosen = (formats or {}).get(part_of(info.name, info.shape), "float32")
    if chosen == "float32":
        return dtype
    if chosen == "auto":
        return info.dtype if info.dtype in KEPT or find_block(info.dtype) else "float32"
    narrow = "bfloat16" if info.dtype == "bfloat16" else "float16"
    return blocks_for(chosen, info.shape[1]) or narrow


def loading_bytes(weights: Iterable[TensorInfo], dtype: str, formats: Mapping[str, str] | None = None) -> int:
    """Returns the peak while tensors are loaded one by one into parameters of `dtype`, or as `formats` say.

    A float32 or float16 tensor shares its memory with a parameter of the same dtype. Other tensors are cast, and each
    cast coexists with its input. All casts go through float32, except those to float16, which are direct for every
    stored dtype but bfloat16. Blocks are made of parts of a tensor.
    """
    loaded = widest = 0
    for info in weights:
        held_as = held_dtype(info, dtype, formats)
        wide, parameter = info.num_elements * FLOAT32, replace(info, dtype=held_as).num_bytes
        stored = 0 if info.dtype == "float32" else info.num_bytes
        if formats and held_as == info.dtype:
            held = parameter
        elif find_block(held_as):
            held = parameter + 2 * min(wide, MAX_READ_BYTES)
        elif held_as != dtype:
            held = stored + wide + parameter
        elif dtype == "float32":
            held = stored + parameter
        elif dtype == "bfloat16":
            held = wide + max(stored, parameter)
        else:
            # the stored values stay until the check for overflows
            copies = {"float16": 0, "bfloat16": info.num_bytes + wide}.get(info.dtype, info.num_bytes)
            held = copies + parameter
        widest = max(widest, loaded + held)
        loaded += parameter
    return max(widest, loaded)


def prefill_activations(
    config: DecoderConfig, num_tokens: int, capacity: int, item_size: int, *, stores_scores: bool = True
) -> int:
    """Returns the peak activations of the decoder for C new tokens and S cached positions.

    The mask, the scores, their sum, and the input and output of the float32 softmax have H*C*S elements each; the
    native kernels store none. The MLP holds both branches, the activation and the product. Logits are computed for one
    token.
    """
    num_rows = num_tokens * config.num_attention_heads
    scores = num_rows * capacity * (3 * item_size + 2 * FLOAT32) * stores_scores
    rotation = 2 * num_rows * config.head_dim * FLOAT32
    states = num_tokens * (2 * config.hidden_size + 4 * config.num_attention_heads * config.head_dim) * item_size
    mlp = 4 * num_tokens * config.intermediate_size * item_size
    return max(scores, mlp) + rotation + states + 2 * config.vocab_size * FLOAT32


def cache_bytes(config: DecoderConfig, capacity: int, item_size: int) -> int:
    """Returns the size of the keys and values of all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * capacity * item_size


def grown_cache_bytes(config: DecoderConfig, capacity: int, max_length: int, item_size: int) -> int:
    """Returns the size of the cache for `max_length`, plus that of the previous cache if it grows."""
    previous = 0
    while capacity < max_length:
        previous, capacity = capacity, cache_capacity(capacity + 1, max_length)
    return cache_bytes(config, previous + capacity, item_size)
