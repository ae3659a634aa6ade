"""How much memory a model will need, from its config alone, and how much there is.

The counts follow the graphs operator by operator: what stands in memory at the widest place of each. What cannot be
counted, the runtime and the compiled graphs themselves, has constants measured with MindSpore 2.10 on x86.

Peak of resident memory in MiB, estimated / measured (CPU, graph mode, float32, all stages in one process, one picture
after the other, the cache grown to `max_length` in the end). The two marked * were measured after the constants had
been set:

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

Loading is within 5 % everywhere. The counts are in the compute dtype, so they are given for Ascend too, where nothing
has been measured and the runtime's own memory is left out.

T tokens, D head dimension, C new tokens, S cache slots.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mindvlm.checkpoint import TensorInfo
from mindvlm.generation.engine import MAX_PREFILL_LENGTH
from mindvlm.generation.graphs import bucket_length, cache_capacity
from mindvlm.models.common.attention_core import MAX_SCORES_PER_HEAD
from mindvlm.models.common.decoder import DecoderConfig
from mindvlm.models.common.patches import grid_size, height_and_width
from mindvlm.models.common.vit import VitConfig
from mindvlm.models.vary.vision_vocabulary import VisionVocabularyConfig

MIB = 1024**2
FLOAT32 = 4
# resident after `import mindspore`, and what compiling the first graph adds whatever the graph is
RUNTIME_BYTES = 405 * MIB
FIRST_GRAPH_BYTES = 230 * MIB
# nodes of the compiled graphs; a global block has all its slices as nodes
GRAPH_BYTES_PER_LAYER = {"decoder": 3 * MIB, "tower": 7.5 * MIB, "windowed": 14 * MIB, "global": 35 * MIB}
# a transposed constant keeps a table of 8 bytes an element beside the result
TRANSPOSE_BYTES = 8 + FLOAT32


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
    *,
    num_images: int,
    num_prompt_tokens: int,
    item_size: int = FLOAT32,
    on_host: bool = True,
) -> MemoryEstimate:
    """What loading a model and answering one prompt needs.

    Args:
        config: the family's model config: `language_model`, `vision_tower` or None, `vision_vocabulary` or None,
            `image_token_len` and `max_length`.
        weights: the parameters in the order of loading, in the dtype that they are stored in.
        num_images: pictures in the prompt.
        num_prompt_tokens: length of the prompt, image placeholders included.
        item_size: bytes of a value of the compute dtype.
        on_host: whether the runtime shares the memory with the model (not so on an NPU).
    """
    lm, tower, vocabulary = config.language_model, config.vision_tower, config.vision_vocabulary
    weights = list(weights)
    num_padded = padded_prompt_length(num_prompt_tokens, config.max_length)
    num_slots = cache_capacity(num_padded, config.max_length)
    graphs = FIRST_GRAPH_BYTES + lm.num_hidden_layers * GRAPH_BYTES_PER_LAYER["decoder"]
    vision = 0
    if num_images and tower:
        num_layers = config.vision_select_layer % (tower.num_hidden_layers + 1)
        graphs += num_layers * GRAPH_BYTES_PER_LAYER["tower"]
        vision += tower_activations(tower, item_size)
    if num_images and vocabulary:
        num_global = len(set(vocabulary.global_attn_indexes)) if vocabulary.window_size else vocabulary.depth
        graphs += num_global * GRAPH_BYTES_PER_LAYER["global"]
        graphs += (vocabulary.depth - num_global) * GRAPH_BYTES_PER_LAYER["windowed"]
        graphs += num_convolution_values(vocabulary) * TRANSPOSE_BYTES
        # the two towers do not depend on each other and run at the same time
        vision += vocabulary_activations(vocabulary, item_size)
    features = num_images * config.image_token_len * lm.hidden_size * item_size
    prefill = prefill_activations(lm, min(num_padded, MAX_PREFILL_LENGTH), num_slots, item_size)
    prefill += 3 * num_padded * lm.hidden_size * item_size + 2 * features
    return MemoryEstimate(
        runtime=RUNTIME_BYTES if on_host else 0,
        parameters=sum(info.num_elements for info in weights) * item_size,
        loading=loading_bytes(weights, item_size),
        graphs=int(graphs) if on_host else 0,
        activations=max(vision, prefill) + features,
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


def tower_activations(config: VitConfig, item_size: int) -> int:
    """Widest place of a CLIP tower for one picture: the scores of a layer, or its MLP."""
    rows, columns = grid_size(config.image_size, config.patch_size)
    num_tokens, width = rows * columns + 1, config.hidden_size
    scores = config.num_attention_heads * num_tokens**2 * (item_size + FLOAT32)
    attention = scores + 5 * num_tokens * width * item_size
    mlp = (3 * config.intermediate_size + 2 * width) * num_tokens * item_size
    return max(attention, mlp) + pixel_bytes(config.image_size, item_size)


def vocabulary_activations(config: VisionVocabularyConfig, item_size: int) -> int:
    """Widest place of the vision vocabulary for one picture, and what does not wait for its turn.

    The positions appended to the keys of every block and the kernels laid out for the convolutions depend on no pixel:
    they are made when the graph starts and stay until they are used.
    """
    rows, columns = grid_size(config.image_size, config.patch_size)
    num_cells, width = rows * columns, config.embed_dim
    head_dim = width // config.num_heads
    states = 2 * num_cells * width
    waiting = num_convolution_values(config)
    widest = [3 * num_cells * int(width * config.mlp_ratio) + states, 10 * num_cells * config.out_chans]
    for index in range(config.depth):
        size = 0 if index in config.global_attn_indexes else config.window_size
        attended = (size, size) if size else (rows, columns)
        num_windows = math.ceil(rows / attended[0]) * math.ceil(columns / attended[1])
        num_keys = attended[0] * attended[1]
        num_rows = num_windows * config.num_heads * num_keys
        num_queries = max(1, min(num_keys, MAX_SCORES_PER_HEAD // num_keys))
        scores = num_windows * config.num_heads * num_queries * num_keys
        waiting += num_rows * sum(attended)
        queries_and_keys = 2 * num_rows * (head_dim + sum(attended))
        widest.append(scores * (1 + FLOAT32 / item_size) + queries_and_keys + num_rows * head_dim + states)
    return int((max(widest) + waiting) * item_size) + pixel_bytes(config.image_size, item_size)


def num_convolution_values(config: VisionVocabularyConfig) -> int:
    """Values of the three 3 x 3 kernels, which the graph holds in another order than the checkpoint."""
    channels = (config.out_chans, config.out_chans, config.net_2_channels, config.net_3_channels)
    return 9 * sum(before * after for before, after in zip(channels, channels[1:], strict=False))


def pixel_bytes(image_size: int | list[int], item_size: int) -> int:
    """A picture as float32 pixels on the host, and as patches in the compute dtype."""
    height, width = height_and_width(image_size)
    return 3 * height * width * (FLOAT32 + item_size)


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
