"""Opens a Hugging Face folder of a SliME: the run config follows from its config.json and its tokenizer."""

from pathlib import Path
from typing import Any, get_args

from mindvlm.core.errors import UserError
from mindvlm.models.hf.tower_folder import tower_config, tower_weights
from mindvlm.models.run_config import read_scope, replace_keys
from mindvlm.models.slime.config import SlimeConfig, check_processor
from mindvlm.models.slime.hf_config import from_hf_config, is_slime
from mindvlm.models.slime.model_config import SlimeModelConfig
from mindvlm.models.slime.processor import SlimeProcessorConfig, make_tokenizer
from mindvlm.models.slime.templates import TURN_END
from mindvlm.models.slime.views import Mode, ViewsConfig
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.weights.config_json import TEXT, ConfigTable, read_config, without_nulls

TEMPLATE_KEY = "conversation_template"
"""Our own key in the config.json of a model that was trained with another template."""


def folder_config(folder: Path, overrides: dict[str, Any] | None = None) -> SlimeConfig:
    """Returns the run config of a checkpoint folder.

    The vocabulary is cut to the length of the tokenizer, as in the original loader. The template is llama3 if the
    tokenizer has its end token, otherwise v1.

    Args:
        folder: folder with config.json, weights and tokenizer files.
        overrides: runtime keys that replace the defaults. `vision_tower` is the folder of a separate tower; its weights
            replace the tower in the checkpoint. A config.json, or a folder without weights, only describes the tower.

    Raises:
        UserError: config.json is missing or cannot be used, or an override is not a runtime key.
    """
    overrides = dict(overrides or {})
    tower = overrides.pop("vision_tower", None)
    data = read_config(folder)
    if data is None or not is_slime(data):
        raise UserError(f"{folder}: config.json does not describe a SliME; give the folder of a SliME, or a YAML")
    table = ConfigTable(without_nulls(data), f"{folder}/config.json")
    model = from_hf_config(data, vision_config=tower_config(table, folder, tower), path=table.path)
    processor = processor_config(table, folder, model)
    model.language_model.vocab_size = min(model.language_model.vocab_size, make_tokenizer(processor).vocab_size)
    processor.vocab_size = model.language_model.vocab_size
    check_processor(model, processor)
    config = SlimeConfig(name=folder.name, checkpoint=str(folder), model=model, processor=processor)
    config.scope = read_scope(table)
    config.vision_tower = tower_weights(table, folder, tower)
    replace_keys(config, overrides, folder)
    return config


def processor_config(table: ConfigTable, folder: Path, model: SlimeModelConfig) -> SlimeProcessorConfig:
    """Returns the processor config of a checkpoint: template, and views of a picture.

    Args:
        table: contents of config.json, without nulls.
        folder: folder of the tokenizer's files.
        model: result of `from_hf_config` for the same file.

    Raises:
        UserError: the tower is not square, or a key of the views is wrong.
    """
    size = model.vision_tower.image_size
    if not isinstance(size, int):
        raise UserError(f"{table.path}: the tower's image_size is {size}; expected a square")
    aspect_ratio = table.get("image_aspect_ratio", TEXT, "plain")
    with table.keys_for({"processor.views.merge": "mm_patch_merge_type", "processor.views.": ""}):
        views = ViewsConfig(
            size=size,
            mode=aspect_ratio if aspect_ratio in get_args(Mode) else "plain",
            use=model.use,
            merge=table.get("mm_patch_merge_type", TEXT, "flat"),
            num_global_tokens=model.num_global_tokens,
            num_local_tokens=model.num_local_tokens,
        )
    config = SlimeProcessorConfig(tokenizer=str(folder), vocab_size=model.language_model.vocab_size, views=views)
    config.template = table.get(TEMPLATE_KEY, TEXT) or default_template(make_tokenizer(config))
    return config


def default_template(tokenizer: Tokenizer) -> str:
    """Returns the template of the published models with this tokenizer."""
    return "llama3" if TURN_END in tokenizer.special_ids else "v1"
