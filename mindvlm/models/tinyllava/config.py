"""The run config of the TinyLLaVA family and its YAML parser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mindvlm.core.config import build_config, resolve_path
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RunConfig
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.processor import TinyLlavaProcessorConfig
from mindvlm.nn.config import check_token_counts, height_and_width


@dataclass(kw_only=True)
class TinyLlavaConfig(RunConfig):
    """The run config of a TinyLLaVA model, with the keys of `RunConfig`.

    Attributes:
        vision_tower: path of separate tower weights; they replace the tower in `checkpoint`.
    """

    family: Literal["tinyllava"] = "tinyllava"
    name: str = "tinyllava"
    vision_tower: str | None = None
    model: TinyLlavaModelConfig
    processor: TinyLlavaProcessorConfig


def parse_config(data: dict, path: Path) -> TinyLlavaConfig:
    """Returns the run config of a YAML mapping. Relative paths start at the folder of the file.

    Raises:
        UserError: a key or a value is wrong.
    """
    config = build_config(TinyLlavaConfig, data)
    config.checkpoint = resolve_path(config.checkpoint, path)
    config.vision_tower = resolve_path(config.vision_tower, path)
    config.adapter = resolve_path(config.adapter, path)
    config.processor.tokenizer = resolve_path(config.processor.tokenizer, path)
    if config.model.language_model and config.processor.vocab_size is None:
        config.processor.vocab_size = config.model.language_model.vocab_size
    check_processor(config.model, config.processor)
    return config


def check_processor(model: TinyLlavaModelConfig, processor: TinyLlavaProcessorConfig) -> None:
    """Raises UserError if the processor output does not match the model input."""
    check_token_counts(model, processor)
    if processor.image.resize == "keep":
        raise UserError("processor.image.resize is 'keep' but the model needs pictures of one size; choose another")
    tiling = processor.tiling
    if tiling:
        tiling.check(processor.image.height_width[0], processor.num_image_tokens)
        if processor.image.padding != "none":
            raise UserError("processor.image.padding has no effect with processor.tiling; set it to none")
    if tiling and (tiling.merge == "spatial_unpad") != model.image_newline:
        raise UserError(
            f"model.image_newline is {model.image_newline} but processor.tiling.merge is {tiling.merge!r}; only "
            "spatial_unpad uses the learned row"
        )
    tower = model.vision_tower
    if tower and processor.image.height_width != height_and_width(tower.image_size):
        raise UserError(
            f"processor.image.size is {processor.image.size} but model.vision_tower.image_size is "
            f"{tower.image_size}; the two must be equal"
        )
