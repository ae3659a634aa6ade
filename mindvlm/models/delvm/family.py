"""The DeLVM family (300M, 1B, and the ViT-typed variant): pictures in, pictures out, no text."""

from mindvlm.models.base import Family, InitialRule
from mindvlm.models.delvm.checkpoint_config import is_delvm
from mindvlm.models.delvm.config import folder_config, parse_config
from mindvlm.models.delvm.export import companions
from mindvlm.models.delvm.memory import vision_memory
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.names import MODELS
from mindvlm.models.delvm.processor import DelvmProcessor
from mindvlm.models.delvm.training import TRAINING
from mindvlm.models.delvm.weights import view_with_parts
from mindvlm.parallel.plan import DECODER

DECODER_LAYER = r"^language_model\.layers\.\d+\."
INITIAL_RULES = (
    InitialRule(r"^language_model\.(embed_tokens|lm_head)\.(projection\.)?weight$", "absolute", 0.0052),
    InitialRule(DECODER_LAYER + r"(self_attn\.[qkv]_proj|mlp\.(gate_proj|fc1))\.weight$", "absolute", 0.006),
    # in the original, too, the depth scales the other factor of a gated product and not the projection back
    InitialRule(DECODER_LAYER + r"(self_attn\.o_proj|mlp\.(up_proj|fc2))\.weight$", "depth", 0.006),
    InitialRule(DECODER_LAYER + r"mlp\.down_proj\.weight$", "absolute", 0.0015),
    InitialRule(r"^vqgan\..*\.norm\w*\.weight$", "constant", 1.0),
    InitialRule(r"^vqgan\.quantize\.embedding\.weight$", "absolute", 0.3),
    InitialRule(r"^vqgan\..*\.conv2\.weight$", "fan_in", 0.1),
    InitialRule(r"^vqgan\..*\.weight$", "fan_in", 1.0),
)
"""Initial scales: those of the decoder are the original's. The blocks of the VQGAN start small beside what they are
added to, and its latents have about the scale of the codebook."""

FAMILY = Family(
    name="delvm",
    parse_config=parse_config,
    build=DelvmModel,
    processor=DelvmProcessor,
    models=MODELS,
    output="pictures",
    vision_memory=vision_memory,
    read_folder=folder_config,
    reads=is_delvm,
    # the embeddings are small, and the projection of the codebook cannot be divided by codes
    tensor_parallel=tuple(rule for rule in DECODER if rule.kind != "vocabulary"),
    view_with_parts=view_with_parts,
    initial_rules=INITIAL_RULES,
    companions=companions,
    training=TRAINING,
)
