"""Everything that a run needs, from the config.json of a checkpoint folder: model, template, processor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindvlm.errors import UserError
from mindvlm.models.tinyllava.config import TinyLlavaConfig, check_processor
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.hf_decoder import dialect_of
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig
from mindvlm.models.tinyllava.processing import (
    TinyLlavaProcessorConfig,
    clip_branch,
    make_tokenizer,
    siglip_branch,
)

Config = Mapping[str, Any]
# the templates that the published models were trained with
TEMPLATES = {"phi": "phi", "stablelm": "phi", "llama": "v1"}


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
    model = from_hf_config(data, vision_config=vision_config)
    if model.language_model is None or model.vision_tower is None:
        raise UserError(f"{folder}: config.json describes only a part of a model; give the folder of a whole TinyLLaVA")
    processor = processor_config(data, folder, model)
    model.language_model.vocab_size = min(model.language_model.vocab_size, make_tokenizer(processor).vocab_size)
    processor.vocab_size = model.language_model.vocab_size
    check_processor(model, processor)
    return TinyLlavaConfig(name=folder.name, checkpoint=str(folder), model=model, processor=processor)


def processor_config(data: Config, folder: Path, model: TinyLlavaModelConfig) -> TinyLlavaProcessorConfig:
    branch = siglip_branch if model.vision_tower.dialect == "siglip" else clip_branch
    text = data.get("text_config", data)
    return TinyLlavaProcessorConfig(
        tokenizer=str(folder),
        vocab_size=model.language_model.vocab_size,
        template=TEMPLATES[dialect_of(text)],
        num_image_tokens=model.image_token_len,
        use_im_start_end=data.get("mm_use_im_start_end", False),
        use_im_patch_token=data.get("mm_use_im_patch_token", False),
        image=branch(model.vision_tower.image_size, aspect_ratio=data.get("image_aspect_ratio", "square")),
    )
