"""The run config of the Vary family and its YAML parser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mindvlm.core.config import build_config, resolve_path
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RunConfig
from mindvlm.models.vary.mindocr_config import from_mindocr
from mindvlm.models.vary.model_config import VaryModelConfig
from mindvlm.models.vary.processor import VaryProcessorConfig
from mindvlm.nn.config import check_token_counts, height_and_width


@dataclass(kw_only=True)
class VaryConfig(RunConfig):
    """The run config of a Vary model, with the keys of `RunConfig`."""

    family: Literal["vary"] = "vary"
    name: str = "vary"
    model: VaryModelConfig
    processor: VaryProcessorConfig


def parse_config(data: dict, path: Path) -> VaryConfig:
    """Returns the run config of a YAML mapping, ours or MindOCR's. Relative paths start at the folder of the file.

    Raises:
        UserError: a key or a value is wrong.
    """
    data = from_mindocr(data)
    config = build_config(VaryConfig, data)
    config.checkpoint = resolve_path(config.checkpoint, path)
    config.adapter = resolve_path(config.adapter, path)
    config.processor.vocab_file = resolve_path(config.processor.vocab_file, path)
    if config.model.language_model and config.processor.vocab_size is None:
        config.processor.vocab_size = config.model.language_model.vocab_size
    check_processor(config.model, config.processor)
    return config


def check_processor(model: VaryModelConfig, processor: VaryProcessorConfig) -> None:
    """Raises UserError if the processor output does not match the model input."""
    check_token_counts(model, processor)
    for name, branch, section, tower in (
        ("clip", processor.clip, "vision_tower", model.vision_tower),
        ("high", processor.high, "vision_vocabulary", model.vision_vocabulary),
    ):
        if branch is None:
            if tower:
                raise UserError(f"processor.{name} is null but there is a model.{section}; give it a size and a resize")
            continue
        if branch.resize == "keep":
            raise UserError(
                f"processor.{name}.resize is 'keep' but the model needs pictures of one size; choose another"
            )
        if model.is_tiny and not tower:
            raise UserError(f"processor.{name} is set but there is no model.{section}; set processor.{name}: null")
        if tower and branch.height_width != height_and_width(tower.image_size):
            raise UserError(
                f"processor.{name}.size is {branch.size} but model.{section}.image_size is {tower.image_size}; "
                "the two must be equal"
            )
