"""Everything that a run needs, from the config.json of a checkpoint folder: model, template, processor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.config import TinyLlavaConfig, check_processor
from mindvlm.models.tinyllava.hf_checks import checked
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.hf_processor import processor_config
from mindvlm.models.tinyllava.processing import make_tokenizer

Config = Mapping[str, Any]


def run_config(data: Config, folder: Path, *, vision_config: Config | None = None) -> TinyLlavaConfig:
    """The run config of a checkpoint folder.

    The vocabulary is cut to the tokenizer's length, as the original loader does it.

    Args:
        data: the contents of its config.json.
        folder: with weights and tokenizer.
        vision_config: see `from_hf_config`.

    Raises:
        UserError: config.json or the tokenizer cannot be used.
    """
    data = checked(data)
    model = from_hf_config(data, vision_config=vision_config)
    if model.language_model is None or model.vision_tower is None:
        raise UserError(f"{folder}: config.json describes only a part of a model; give the folder of a whole TinyLLaVA")
    processor = processor_config(data, folder, model)
    model.language_model.vocab_size = min(model.language_model.vocab_size, make_tokenizer(processor).vocab_size)
    processor.vocab_size = model.language_model.vocab_size
    check_processor(model, processor)
    return TinyLlavaConfig(name=folder.name, checkpoint=str(folder), model=model, processor=processor)
