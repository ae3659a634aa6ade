"""Runtime memory of the shared parts, counted operator by operator.

The size of compiled graphs was measured with MindSpore 2.10 on x86. The native kernels join operators, so their graphs
have fewer nodes, and they store neither attention scores nor all hidden values of an MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindvlm.nn.config import VitConfig, height_and_width

MIB = 1024**2
FLOAT32 = 4
# the compiled graph of one layer, on MindSpore's operators and on the native kernels
TOWER_LAYER_BYTES = 7.5 * MIB
NATIVE_LAYER_BYTES = 3 * MIB
# maps of the size of a block's input that a graph on the native kernels holds: queries, keys and values among them
NUM_NATIVE_MAPS = 8


@dataclass(frozen=True)
class VisionMemory:
    """Memory of a vision graph for one picture, in bytes.

    Attributes:
        graph: size of the compiled graph.
        activations: peak of the activations.
    """

    graph: float = 0
    activations: int = 0

    def beside(self, other: VisionMemory) -> VisionMemory:
        """Returns the total of two independent parts that run at the same time."""
        return VisionMemory(self.graph + other.graph, self.activations + other.activations)

    def before(self, other: VisionMemory) -> VisionMemory:
        """Returns the total of two parts that run one after the other."""
        return VisionMemory(self.graph + other.graph, max(self.activations, other.activations))


def tower_memory(config: VitConfig, select_layer: int, item_size: int, has_kernels: bool) -> VisionMemory:
    """Returns the memory of a vision transformer that runs up to the selected layer.

    The peak is in the attention scores or in the MLP of a layer.

    Args:
        select_layer: see `VisionTransformer`.
        item_size: bytes per value of the compute dtype.
        has_kernels: whether the native kernels compute.
    """
    num_tokens, width = config.num_tokens, config.hidden_size
    num_layers = select_layer % (config.num_hidden_layers + 1)
    pixels = pixel_bytes(config.image_size, item_size)
    if has_kernels:
        return VisionMemory(num_layers * NATIVE_LAYER_BYTES, native_tower_bytes(num_tokens, width) + pixels)
    scores = config.num_attention_heads * num_tokens**2 * (item_size + FLOAT32)
    attention = scores + 5 * num_tokens * width * item_size
    mlp = (3 * config.intermediate_size + 2 * width) * num_tokens * item_size
    return VisionMemory(num_layers * TOWER_LAYER_BYTES, max(attention, mlp) + pixels)


def native_tower_bytes(num_tokens: int, width: int) -> int:
    """Returns the activations of a tower on the native kernels, whose blocks share memory."""
    return NUM_NATIVE_MAPS * num_tokens * width * FLOAT32


def pixel_bytes(image_size: int | list[int], item_size: int) -> int:
    """Returns the size of a picture as float32 pixels on the host plus patches in the compute dtype."""
    height, width = height_and_width(image_size)
    return 3 * height * width * (FLOAT32 + item_size)
