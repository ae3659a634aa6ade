"""The run config of a Mosaic."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mindvlm.core.config import build_config, resolve_path
from mindvlm.core.runtime import RunConfig
from mindvlm.nn.config import DecoderConfig
from tests.mosaic.processor import MosaicProcessorConfig


@dataclass(kw_only=True)
class MosaicModelConfig:
    """Sizes: `grid` cells along each edge of a picture are its rows of features."""

    language_model: DecoderConfig
    grid: int = 2
    max_length: int = 128

    @property
    def image_token_len(self) -> int:
        return self.grid**2


@dataclass(kw_only=True)
class MosaicConfig(RunConfig):
    family: Literal["mosaic"] = "mosaic"
    name: str = "mosaic"
    model: MosaicModelConfig
    processor: MosaicProcessorConfig


def parse_config(data: dict, path: Path) -> MosaicConfig:
    config = build_config(MosaicConfig, data)
    config.checkpoint = resolve_path(config.checkpoint, path)
    config.processor.tokenizer = resolve_path(config.processor.tokenizer, path)
    return config
