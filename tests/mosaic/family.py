"""The `Family` of Mosaic, the toy family of the tests."""

from mindvlm.models.base import Family
from tests.mosaic.config import parse_config
from tests.mosaic.model import MosaicModel
from tests.mosaic.names import MODELS
from tests.mosaic.processor import MosaicProcessor

FAMILY = Family(
    name="mosaic",
    parse_config=parse_config,
    build=MosaicModel,
    processor=MosaicProcessor,
    models=MODELS,
)
