"""The SliME family (7B, 8B, 13B and 70B) and the memory estimate of its tower and adapters."""

from mindvlm.models.base import Family, InitialRule
from mindvlm.models.hf.tower_folder import sizes_remedy
from mindvlm.models.slime.config import parse_config
from mindvlm.models.slime.export import PART_FILES, companions
from mindvlm.models.slime.folder import folder_config
from mindvlm.models.slime.hf_config import is_slime
from mindvlm.models.slime.model import SlimeModel
from mindvlm.models.slime.model_config import RESAMPLER_HEAD_DIM, SlimeModelConfig
from mindvlm.models.slime.names import MODELS
from mindvlm.models.slime.positions import fixed_positions
from mindvlm.models.slime.processor import SlimeProcessor
from mindvlm.models.slime.views import MAX_BUCKET
from mindvlm.models.slime.weights import view_with_parts
from mindvlm.nn.memory import FLOAT32, TOWER_LAYER_BYTES, VisionMemory, tower_memory
from mindvlm.parallel.plan import DECODER, VISION_TRANSFORMER


def vision_memory(config: SlimeModelConfig, item_size: int, has_kernels: bool) -> VisionMemory:
    """Returns the memory of the graphs of a global view and of a bucket of crops.

    Args:
        item_size: size of a value in bytes.
        has_kernels: whether the native kernels compute.
    """
    tower = tower_memory(config.vision_tower, config.vision_select_layer, item_size, has_kernels)
    num_tokens, width = config.num_global_tokens, config.vision_tower.hidden_size
    num_heads = width // RESAMPLER_HEAD_DIM
    scores = 0 if has_kernels else num_heads * num_tokens**2 * (item_size + FLOAT32)
    # features, keys, values and both experts of a view
    states = num_tokens * (6 * width + 4 * config.language_model.hidden_size) * item_size
    both = VisionMemory(2 * tower.graph, MAX_BUCKET * tower.activations)
    return both.before(VisionMemory(3 * TOWER_LAYER_BYTES, scores + states))


INITIAL_RULES = (
    InitialRule(r"pos_embed$", compute=fixed_positions),
    InitialRule(r"w_(gate|noise)$", "constant", 0.0),
    InitialRule(r"query$", "absolute", 0.02),
    # the spread of torch's Linear
    InitialRule(r"^mm_projector\.projection\.\d\.weight$|(^|\.)attn\.out_proj\.weight$", "fan_in", 3**-0.5),
)
"""As in the original program."""

FAMILY = Family(
    name="slime",
    parse_config=parse_config,
    build=SlimeModel,
    processor=SlimeProcessor,
    models=MODELS,
    vision_memory=vision_memory,
    most_views=lambda config: config.views.most_views,
    tensor_parallel=DECODER + VISION_TRANSFORMER,
    initial_rules=INITIAL_RULES,
    read_folder=folder_config,
    reads=is_slime,
    sizes_remedy=sizes_remedy,
    view_with_parts=view_with_parts,
    companions=companions,
    part_files=PART_FILES,
)
