"""The DeLVM family (300M, 1B, and the ViT-typed variant): pictures in, pictures out, no text."""

from mindvlm.models.base import Family
from mindvlm.models.delvm.checkpoint_config import is_delvm
from mindvlm.models.delvm.config import folder_config, parse_config
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.names import MODELS
from mindvlm.models.delvm.processor import DelvmProcessor
from mindvlm.models.delvm.training import TRAINING
from mindvlm.models.delvm.weights import view_with_parts
from mindvlm.parallel.plan import DECODER

FAMILY = Family(
    name="delvm",
    parse_config=parse_config,
    build=DelvmModel,
    processor=DelvmProcessor,
    models=MODELS,
    output="pictures",
    read_folder=folder_config,
    reads=is_delvm,
    # the embeddings are small, and the projection of the codebook cannot be divided by codes
    tensor_parallel=tuple(rule for rule in DECODER if rule.kind != "vocabulary"),
    view_with_parts=view_with_parts,
    training=TRAINING,
)
