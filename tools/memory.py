"""How much memory a model will need, from its config alone, and how much there is.

The counts follow the graphs operator by operator: what stands in memory at the widest place of each. What cannot be
counted, the runtime and the compiled graphs themselves, has constants measured with MindSpore 2.10 on x86.

Peak of resident memory in MiB, estimated / measured (CPU, graph mode, float32, all stages in one process, one picture
after the other, the cache grown to `max_length` in the end). Those marked * and all of TinyLLaVA were measured after
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

Loading is within 5 % everywhere. The counts are in the compute dtype, so they are given for Ascend too, where nothing
has been measured and the runtime's own memory is left out.

T tokens, D head dimension, C new tokens, S cache slots.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mindvlm.checkpoint import TensorInfo
from mindvlm.generation.engine import MAX_PREFILL_LENGTH
from mindvlm.generation.graphs import bucket_length, cache_capacity
from mindvlm.nn.decoder import DecoderConfig
from mindvlm.nn.memory import FLOAT32, MIB, VisionMemory

# resident after `import mindspore`, and what compiling the first graph adds whatever the graph is
RUNTIME_BYTES = 405 * MIB
FIRST_GRAPH_BYTES = 230 * MIB
# nodes of the compiled prefill and decode graphs
DECODER_LAYER_BYTES = 3 * MIB


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that each part of a run needs, for one row (batch size 1).

    Attributes:
        runtime: the interpreter with MindSpore; 0 on a device of its own.
        parameters: all weights in the compute dtype.
        loading: most that stands in memory while the weights are read, those that are read already included.
        graphs: the compiled graphs.
        activations: widest place of the vision and prefill graphs; they share one pool, which is not given back.
        prompt_cache: the KV cache that the prompt gets.
        full_cache: the KV cache for `max_length`, with the one before it, from which it takes over.
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
        """Peak until the first token, pictures included."""
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
    item_size: int = FLOAT32,
    on_host: bool = True,
) -> MemoryEstimate:
    """What loading a model and answering one prompt needs.

    Args:
        config: the family's model config: `language_model`, `image_token_len` and `max_length`.
        weights: the parameters in the order of loading, in the dtype that they are stored in.
        vision: what the family says of its towers, see `Family.vision_memory`.
        num_images: pictures in the prompt.
        num_prompt_tokens: length of the prompt, image placeholders included.
        item_size: bytes of a value of the compute dtype.
        on_host: whether the runtime shares the memory with the model (not so on an NPU).
    """
    lm, weights = config.language_model, list(weights)
    vision = vision if num_images else VisionMemory()
    num_padded = padded_prompt_length(num_prompt_tokens, config.max_length)
    num_slots = cache_capacity(num_padded, config.max_length)
    graphs = FIRST_GRAPH_BYTES + lm.num_hidden_layers * DECODER_LAYER_BYTES + vision.graph
    features = num_images * config.image_token_len * lm.hidden_size * item_size
    prefill = prefill_activations(lm, min(num_padded, MAX_PREFILL_LENGTH), num_slots, item_size)
    prefill += 3 * num_padded * lm.hidden_size * item_size + 2 * features
    return MemoryEstimate(
        runtime=RUNTIME_BYTES if on_host else 0,
        parameters=sum(info.num_elements for info in weights) * item_size,
        loading=loading_bytes(weights, item_size),
        graphs=int(graphs) if on_host else 0,
        activations=max(vision.activations, prefill) + features,
        prompt_cache=cache_bytes(lm, num_slots, item_size),
        full_cache=grown_cache_bytes(lm, num_slots, config.max_length, item_size),
    )


def padded_prompt_length(num_tokens: int, max_length: int) -> int:
    """Tokens that the engine prefills for a prompt: whole pieces and a bucket, as far as the context has room."""
    pieces, rest = divmod(num_tokens, MAX_PREFILL_LENGTH)
    padded = pieces * MAX_PREFILL_LENGTH + bucket_length(rest)
    return max(min(padded, bucket_length(max_length)), num_tokens)


def loading_bytes(weights: Iterable[TensorInfo], item_size: int) -> int:
    """Most that stands in memory while tensors are read one by one.

    A float32 tensor becomes the parameter's own memory; another dtype is held beside its float32 values while these are
    made, and those beside the parameter if that is not float32.
    """
    loaded = widest = 0
    for info in weights:
        stored = 0 if info.dtype == "float32" else info.num_bytes
        narrowed = 0 if item_size == FLOAT32 else info.num_elements * item_size
        widest = max(widest, loaded + info.num_elements * FLOAT32 + max(stored, narrowed))
        loaded += info.num_elements * item_size
    return max(widest, loaded)


def prefill_activations(config: DecoderConfig, num_tokens: int, num_slots: int, item_size: int) -> int:
    """Widest place of the decoder for C new tokens against S slots.

    Mask, products, their sum, and the softmax in float32 in and out are H*C*S each; the MLP holds both branches, the
    activation and the product. Logits are computed for one row.
    """
    num_rows = num_tokens * config.num_attention_heads
    scores = num_rows * num_slots * (3 * item_size + 2 * FLOAT32)
    rotation = 2 * num_rows * config.head_dim * FLOAT32
    states = num_tokens * (2 * config.hidden_size + 4 * config.num_attention_heads * config.head_dim) * item_size
    mlp = 4 * num_tokens * config.intermediate_size * item_size
    return max(scores, mlp) + rotation + states + 2 * config.vocab_size * FLOAT32


def cache_bytes(config: DecoderConfig, num_slots: int, item_size: int) -> int:
    """Keys and values of all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * num_slots * item_size


def grown_cache_bytes(config: DecoderConfig, num_slots: int, max_length: int, item_size: int) -> int:
    """The cache for `max_length` together with the smaller one whose contents it takes over, if it has to grow."""
    previous = 0
    while num_slots < max_length:
        previous, num_slots = num_slots, cache_capacity(num_slots + 1, max_length)
    return cache_bytes(config, previous + num_slots, item_size)


def free_host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a new process could take in this one's place without swapping, None where the system does not say.

    Linux's estimate (MemAvailable), or what a container's limit leaves if that is less.
    """
    available = counters(proc / "meminfo").get("MemAvailable:")
    if available is None:
        return None
    mine = counters(proc / "self/status").get("RssAnon:", 0)
    return min([available, *container_room(cgroup)]) + mine


def container_room(cgroup: Path) -> list[int]:
    """Bytes to the memory limit of this container (cgroup version 2, then 1); empty without a limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            room = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
            statistics = (cgroup / limit).with_name("memory.stat").read_text().split()
            reclaimable = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(cache, 0)
            return [max(0, room + int(reclaimable))]
    return []


def counters(path: Path) -> Mapping[str, int]:
    """The kB lines of a /proc file as bytes; empty if there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {fields[0]: int(fields[1]) * 1024 for fields in lines if len(fields) == 3 and fields[2] == "kB"}


def free_device_memory() -> int | None:
    """Free bytes of the Ascend NPU in use, None where MindSpore does not say."""
    import mindspore as ms

    try:
        properties = ms.hal.get_device_properties(0, "Ascend")
    except (RuntimeError, ValueError, TypeError):
        return None
    return getattr(properties, "free_memory", 0) or None
