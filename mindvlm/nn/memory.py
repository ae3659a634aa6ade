"""Runtime memory of the shared parts, counted operator by operator.

The size of compiled graphs was measured with MindSpore 2.10 on x86.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindvlm.nn.config import VitConfig, height_and_width

MIB = 1024**2
FLOAT32 = 4
# the compiled graph of one layer
TOWER_LAYER_BYTES = 7.5 * MIB


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


def tower_memory(config: VitConfig, select_layer: int, item_size: int) -> VisionMemory:
    """Returns the memory of a vision transformer that runs up to the selected layer.

    The peak is in the attention scores or in the MLP of a layer.

    Args:
        select_layer: see `VisionTransformer`.
        item_size: bytes per value of the compute dtype.
    """
    num_tokens, width = config.num_tokens, config.hidden_size
    scores = config.num_attention_heads * num_tokens**2 * (item_size + FLOAT32)
    attention = scores + 5 * num_tokens * width * item_size
    mlp = (3 * config.intermediate_size + 2 * width) * num_tokens * item_size
    num_layers = select_layer % (config.num_hidden_layers + 1)
    return VisionMemory(num_layers * TOWER_LAYER_BYTES, max(attention, mlp) + pixel_bytes(config.image_size, item_size))


def pixel_bytes(image_size: int | list[int], item_size: int) -> int:
    """Returns the size of a picture as float32 pixels on the host plus patches in the compute dtype."""
    height, width = height_and_width(image_size)
    return 3 * height * width * (FLOAT32 + item_size)
