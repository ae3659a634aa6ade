"""The TinyLLaVA family (3.1B, 2.0B, 1.5B and the legacy 1.4B) and the memory estimate of its towers."""

from functools import partial

from mindvlm.models.base import Family, InitialRule
from mindvlm.models.hf.tower_folder import sizes_remedy, view_with_tower
from mindvlm.models.tinyllava.config import parse_config
from mindvlm.models.tinyllava.export import PART_FILES, companions
from mindvlm.models.tinyllava.folder import folder_config
from mindvlm.models.tinyllava.model import build_model
from mindvlm.models.tinyllava.model_config import ConnectorConfig, TinyLlavaModelConfig
from mindvlm.models.tinyllava.names import MODELS
from mindvlm.models.tinyllava.pretrained import make_fit
from mindvlm.models.tinyllava.processor import TinyLlavaProcessor, TinyLlavaProcessorConfig
from mindvlm.nn.config import FEED_FORWARD_FACTOR
from mindvlm.nn.memory import FLOAT32, TOWER_LAYER_BYTES, VisionMemory, tower_memory
from mindvlm.parallel.plan import DECODER, VISION_TRANSFORMER


def vision_memory(config: TinyLlavaModelConfig, item_size: int, has_kernels: bool) -> VisionMemory:
    """Returns the memory of tower and connector for one picture.

    Args:
        item_size: size of a value in bytes.
        has_kernels: whether the native kernels compute the tower.
    """
    tower = config.vision_tower
    if tower is None:
        return VisionMemory()
    num_features = tower.num_tokens - config.num_dropped_tokens
    connector = connector_memory(
        config.connector, tower.hidden_size, config.language_model.hidden_size, num_features, item_size
    )
    return tower_memory(tower, config.vision_select_layer, item_size, has_kernels).before(connector)


def connector_memory(
    config: ConnectorConfig, image_width: int, hidden_size: int, num_features: int, item_size: int
) -> VisionMemory:
    """Returns the memory of the connector between features and hidden states of these widths."""
    if config.type != "resampler":
        # input and output of a GELU or a Linear
        widest = image_width + 2 * hidden_size
        return VisionMemory(0, num_features * widest * item_size)
    width, num_queries = config.resampler_hidden_size, config.num_queries
    scores = config.num_heads * num_queries * num_features * (item_size + FLOAT32)
    # features and their norm, keys and values before and after the split into heads
    keys = num_features * (2 * image_width + 4 * width) * item_size
    feed_forward = 2 * FEED_FORWARD_FACTOR * num_queries * width * item_size
    return VisionMemory(config.num_resampler_layers * TOWER_LAYER_BYTES, keys + scores + feed_forward)


def most_views(config: TinyLlavaProcessorConfig) -> tuple[int]:
    """Returns the number of views of the largest picture: 1, or the overview and the tiles."""
    return (config.tiling.most_views(config.image.height_width[0]) if config.tiling else 1,)


FAMILY = Family(
    name="tinyllava",
    parse_config=parse_config,
    build=build_model,
    processor=TinyLlavaProcessor,
    models=MODELS,
    vision_memory=vision_memory,
    most_views=most_views,
    tensor_parallel=DECODER + VISION_TRANSFORMER,
    make_fit=make_fit,
    # as in LLaVA
    initial_rules=(InitialRule(r"image_newline$", "width", 1.0),),
    read_folder=folder_config,
    sizes_remedy=sizes_remedy,
    view_with_parts=partial(view_with_tower, models=MODELS),
    companions=companions,
    part_files=PART_FILES,
)
