"""The Vary family: Vary-toy, Vary-tiny and the shipped Vary-nano."""

from mindvlm.core.config import Scope
from mindvlm.models.base import Family, InitialRule
from mindvlm.models.vary.config import parse_config
from mindvlm.models.vary.memory import vision_memory
from mindvlm.models.vary.mindocr_config import is_mindocr_config
from mindvlm.models.vary.model import build_model
from mindvlm.models.vary.names import MODELS
from mindvlm.models.vary.pretrained import fit_pretrained
from mindvlm.models.vary.processor import VaryProcessor
from mindvlm.parallel.plan import DECODER, VISION_TRANSFORMER, Rule
from mindvlm.processing.images.documents import DEFAULT_QUERY

VISION_VOCABULARY = (
    Rule(r"vision_vocabulary\.blocks\.\d+\.norm[12]", "enter"),
    Rule(r"vision_vocabulary\.blocks\.\d+\.attn", "heads"),
    Rule(r"vision_vocabulary\.blocks\.\d+\.attn", "partial"),
    Rule(r"vision_vocabulary\.blocks\.\d+\.attn\.qkv", "column", num_sections=3),
    Rule(r"vision_vocabulary\.blocks\.\d+\.mlp\.lin1", "column"),
    Rule(r"vision_vocabulary\.blocks\.\d+\.(attn\.proj|mlp\.lin2)", "row"),
)
"""The SAM tower. All heads share its relative position tables, so these are not divided."""

INITIAL_RULES = (
    InitialRule(r"rel_pos_[hw]$", "absolute", 0.1),
    InitialRule(r"(attn\.proj|lin2)\.weight$", "fan_in", 0.35),
    InitialRule(r"(neck\..*|net_[23])\.weight$", "fan_in", 1.0),
)
"""Initial scales of the SAM tower: relative position tables, branch outputs, convolutions after the blocks."""

SCOPE = Scope(
    questions=[DEFAULT_QUERY, "Convert the image to markdown/latex format.", "Detect all objects in this image"],
    page_question=DEFAULT_QUERY,
)

FAMILY = Family(
    name="vary",
    parse_config=parse_config,
    build=build_model,
    processor=VaryProcessor,
    models=MODELS,
    scope=SCOPE,
    vision_memory=vision_memory,
    tensor_parallel=DECODER + VISION_TRANSFORMER + VISION_VOCABULARY,
    make_fit=lambda config: fit_pretrained,
    initial_rules=INITIAL_RULES,
    renders_text=True,
    owns_yaml=is_mindocr_config,
)
