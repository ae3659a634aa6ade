"""The run config of the SliME family and its YAML parser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mindvlm.core.config import build_config, resolve_path
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RunConfig
from mindvlm.models.slime.model_config import SlimeModelConfig
from mindvlm.models.slime.processor import SlimeProcessorConfig


@dataclass(kw_only=True)
class SlimeConfig(RunConfig):
    """The run config of a SliME model, with the keys of `RunConfig`.

    Attributes:
        vision_tower: path of separate tower weights; they replace the tower in `checkpoint`.
    """

    family: Literal["slime"] = "slime"
    name: str = "slime"
    vision_tower: str | None = None
    model: SlimeModelConfig
    processor: SlimeProcessorConfig


def parse_config(data: dict, path: Path) -> SlimeConfig:
    """Returns the run config of a YAML mapping. Relative paths start at the folder of the file.

    Raises:
        UserError: a key or a value is wrong.
    """
    config = build_config(SlimeConfig, data)
    config.checkpoint = resolve_path(config.checkpoint, path)
    config.vision_tower = resolve_path(config.vision_tower, path)
    config.adapter = resolve_path(config.adapter, path)
    config.processor.tokenizer = resolve_path(config.processor.tokenizer, path)
    if config.processor.vocab_size is None:
        config.processor.vocab_size = config.model.language_model.vocab_size
    check_processor(config.model, config.processor)
    return config


def check_processor(model: SlimeModelConfig, processor: SlimeProcessorConfig) -> None:
    """Raises UserError if the processor output does not match the model input."""
    views = processor.views
    for key, name, value in (
        ("views.size", "vision_tower.image_size", model.vision_tower.image_size),
        ("views.use", "use", model.use),
        ("views.num_global_tokens", "vision_tower.num_patches", model.num_global_tokens),
        ("views.num_local_tokens", "num_local_tokens", model.num_local_tokens),
        ("vocab_size", "language_model.vocab_size", model.language_model.vocab_size),
    ):
        given = processor.vocab_size if key == "vocab_size" else getattr(views, key.removeprefix("views."))
        if given != value:
            raise UserError(f"processor.{key} is {given} but model.{name} is {value}; the two must be equal")
