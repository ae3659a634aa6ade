"""What the parts that families share take in memory while they run, counted operator by operator.

What cannot be counted, the compiled graphs themselves, has constants measured with MindSpore 2.10 on x86.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindvlm.nn.patches import grid_size, height_and_width
from mindvlm.nn.vit import VitConfig

MIB = 1024**2
FLOAT32 = 4
# nodes of the compiled graph of one layer
TOWER_LAYER_BYTES = 7.5 * MIB


@dataclass(frozen=True)
class VisionMemory:
    """What the vision graph of a model takes for one picture, in bytes.

    Attributes:
        graph: the compiled graph.
        activations: its widest place.
    """

    graph: float = 0
    activations: int = 0

    def beside(self, other: VisionMemory) -> VisionMemory:
        """Two parts that do not depend on each other and run at the same time."""
        return VisionMemory(self.graph + other.graph, self.activations + other.activations)

    def before(self, other: VisionMemory) -> VisionMemory:
        """Two parts that run one after the other."""
        return VisionMemory(self.graph + other.graph, max(self.activations, other.activations))


def tower_memory(config: VitConfig, select_layer: int, item_size: int) -> VisionMemory:
    """A vision transformer, whose layers behind the feature are not computed.

    Its widest place are the scores of a layer, or its MLP.

    Args:
        select_layer: see `VisionTransformer`.
        item_size: bytes of a value of the compute dtype.
    """
    rows, columns = grid_size(config.image_size, config.patch_size)
    num_tokens, width = rows * columns + (config.dialect == "clip"), config.hidden_size
    scores = config.num_attention_heads * num_tokens**2 * (item_size + FLOAT32)
    attention = scores + 5 * num_tokens * width * item_size
    mlp = (3 * config.intermediate_size + 2 * width) * num_tokens * item_size
    num_layers = select_layer % (config.num_hidden_layers + 1)
    return VisionMemory(num_layers * TOWER_LAYER_BYTES, max(attention, mlp) + pixel_bytes(config.image_size, item_size))


def pixel_bytes(image_size: int | list[int], item_size: int) -> int:
    """A picture as float32 pixels on the host, and as patches in the compute dtype."""
    height, width = height_and_width(image_size)
    return 3 * height * width * (FLOAT32 + item_size)
