"""The memory estimate of Vary's vision towers."""

import math

from mindvlm.models.vary.model_config import VaryModelConfig, VisionVocabularyConfig
from mindvlm.nn.attention_core import MAX_SCORES_PER_HEAD
from mindvlm.nn.config import grid_size
from mindvlm.nn.memory import (
    FLOAT32,
    MIB,
    NATIVE_LAYER_BYTES,
    VisionMemory,
    native_tower_bytes,
    pixel_bytes,
    tower_memory,
)

# nodes of the compiled graph; every slice of a global block is a node
WINDOWED_BLOCK_BYTES, GLOBAL_BLOCK_BYTES = 14 * MIB, 35 * MIB
# a transposed constant keeps an index table of 8 bytes per element beside the result
TRANSPOSE_BYTES = 8 + FLOAT32


def vision_memory(config: VaryModelConfig, item_size: int, has_kernels: bool) -> VisionMemory:
    """Returns the memory of the towers for one picture.

    Args:
        item_size: size of a value in bytes.
        has_kernels: whether the native kernels compute.
    """
    memory = VisionMemory()
    if config.vision_tower:
        memory = memory.beside(tower_memory(config.vision_tower, config.vision_select_layer, item_size, has_kernels))
    if config.vision_vocabulary:
        memory = memory.beside(vocabulary_memory(config.vision_vocabulary, item_size, has_kernels))
    return memory


def vocabulary_memory(config: VisionVocabularyConfig, item_size: int, has_kernels: bool) -> VisionMemory:
    """Returns the memory of the vision vocabulary for one picture; arguments as in `vision_memory`."""
    if has_kernels:
        num_cells = math.prod(grid_size(config.image_size, config.patch_size))
        blocks = native_tower_bytes(num_cells, config.embed_dim)
        # the 3 x 3 neighbourhoods of the neck, its input and its output
        neck = 11 * num_cells * config.out_chans * FLOAT32
        pixels = pixel_bytes(config.image_size, item_size)
        return VisionMemory(config.depth * NATIVE_LAYER_BYTES, max(blocks, neck) + pixels)
    num_global = len(set(config.global_attn_indexes)) if config.window_size else config.depth
    graph = num_global * GLOBAL_BLOCK_BYTES + (config.depth - num_global) * WINDOWED_BLOCK_BYTES
    graph += num_convolution_values(config) * TRANSPOSE_BYTES
    return VisionMemory(graph, vocabulary_activations(config, item_size))


def vocabulary_activations(config: VisionVocabularyConfig, item_size: int) -> int:
    """Returns the peak size in bytes of the activations for one picture.

    It includes the positions appended to the keys of all blocks and the transposed convolution kernels. They do not
    depend on the pixels, so the graph computes them at its start and holds them until their use.
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
    """Returns the number of values of the three 3 x 3 kernels, which the graph holds transposed."""
    channels = (config.out_chans, config.out_chans, config.net_2_channels, config.net_3_channels)
    return 9 * sum(before * after for before, after in zip(channels, channels[1:], strict=False))
