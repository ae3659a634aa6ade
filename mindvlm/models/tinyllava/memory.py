"""What tower and connector of a TinyLLaVA take in memory while they run."""

from mindvlm.models.tinyllava.connector import ConnectorConfig
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig, num_tower_tokens
from mindvlm.nn.memory import FLOAT32, TOWER_LAYER_BYTES, VisionMemory, tower_memory
from mindvlm.nn.resampler import FEED_FORWARD_FACTOR


def vision_memory(config: TinyLlavaModelConfig, item_size: int) -> VisionMemory:
    """Tower and connector for one picture; `item_size` are the bytes of a value."""
    tower = config.vision_tower
    if tower is None:
        return VisionMemory()
    num_features = num_tower_tokens(tower) - config.num_dropped_tokens
    connector = connector_memory(
        config.connector, tower.hidden_size, config.language_model.hidden_size, num_features, item_size
    )
    return tower_memory(tower, config.vision_select_layer, item_size).before(connector)


def connector_memory(
    config: ConnectorConfig, image_width: int, hidden_size: int, num_features: int, item_size: int
) -> VisionMemory:
    """The connector alone, between features and states of these widths."""
    if config.type != "resampler":
        # what enters a GELU or a Linear, and what leaves it
        widest = image_width + 2 * hidden_size
        return VisionMemory(0, num_features * widest * item_size)
    width, num_queries = config.resampler_hidden_size, config.num_queries
    scores = config.num_heads * num_queries * num_features * (item_size + FLOAT32)
    # features and their norm, keys and values before and behind their split into heads
    keys = num_features * (2 * image_width + 4 * width) * item_size
    feed_forward = 2 * FEED_FORWARD_FACTOR * num_queries * width * item_size
    return VisionMemory(config.num_resampler_layers * TOWER_LAYER_BYTES, keys + scores + feed_forward)
