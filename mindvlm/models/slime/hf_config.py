"""Reads the model config from SliME's config.json."""

from mindvlm.core.errors import UserError
from mindvlm.models.hf.decoders import read_decoder
from mindvlm.models.hf.towers import published_tower, read_tower
from mindvlm.models.slime.model_config import RouterConfig, SlimeModelConfig
from mindvlm.models.slime.views import Use
from mindvlm.weights.config_json import (
    ABOVE_ZERO,
    COUNT,
    FLAG,
    SHARE,
    SIZE,
    TEXT,
    WHOLE,
    Config,
    ConfigTable,
    shown,
    without_nulls,
)

MODEL_TYPES = ("LlavaLlamaForCausalLM", "llava_llama")
GATES = {-1: "learned", 0: "mlp", 1: "resampler"}
"""Values of `mm_learnable_gated`. Any negative number means the learned gate."""
DEFAULT_LENGTH = 2048
FIELD_KEYS = {
    "model.language_model.": "",
    "model.num_local_tokens": "mm_resampler_dim",
    "model.vision_select_layer": "mm_vision_select_layer",
    "model.separator_id": "seperator",
    "model.max_length": "max_position_embeddings",
    "model.vision_tower.": "the tower's ",
}


def is_slime(config: Config) -> bool:
    """Returns whether a config.json describes a SliME and no other LLaVA of its type."""
    return config.get("mm_resampler_type") is not None or config.get("mm_projector_type") == "gated"


def from_hf_config(
    data: Config, *, vision_config: Config | None = None, path: str = "config.json", only_sizes: bool = False
) -> SlimeModelConfig:
    """Returns the model config of a config.json.

    `max_length` is the number of trained positions: a question is not cut at `tokenizer_model_max_length`.

    Args:
        data: the contents of config.json.
        vision_config: the contents of the tower's; without it, the published tower that `mm_vision_tower` names.
        path: what messages call the file.
        only_sizes: whether to read tensor shapes only; the result may describe a model that cannot run.

    Raises:
        UserError: a key is missing, has a wrong value, or requests an unsupported feature.
    """
    table = ConfigTable(without_nulls(data), path, only_sizes=only_sizes)
    table.refuse("mm_projector_type", "gated")
    table.refuse_setting("mm_resampler_type", "cosine")
    table.refuse_setting("mm_vision_select_feature", "patch")
    table.refuse_setting("mm_use_im_start_end", False)
    table.refuse_setting("mm_use_im_patch_token", False)
    table.refuse_setting("tie_word_embeddings", False)
    tower = tower_table(table, vision_config)
    decoder, vit = read_decoder(table, "llama", tie_word_embeddings=False), read_tower(tower)
    width = table.setting("mm_hidden_size", SIZE, vit.hidden_size)
    if width != vit.hidden_size:
        raise UserError(
            f"{path}: mm_hidden_size is {width} but the tower {table.get('mm_vision_tower', TEXT)!r} has features of "
            f"width {vit.hidden_size}; correct it, or give the folder of the right tower as vision_tower"
        )
    gate = table.setting("mm_learnable_gated", WHOLE, -1)
    if gate > 1:
        raise UserError(f"{path}: mm_learnable_gated is {gate}; expected -1 (learned), 0 (MLP) or 1 (resampler)")
    router = RouterConfig(
        top_p=table.setting("mm_resampler_topp", SHARE, 0.9),
        temperature=table.setting("mm_resampler_temp", ABOVE_ZERO, 0.5),
    )
    with table.keys_for(FIELD_KEYS):
        return SlimeModelConfig(
            language_model=decoder,
            vision_tower=vit,
            vision_select_layer=table.setting("mm_vision_select_layer", WHOLE, -2),
            num_local_tokens=table.get("mm_resampler_dim", SIZE, 144),
            gate=GATES[max(gate, -1)],
            use=use_of(table),
            separator_id=0 if only_sizes else table.require("seperator", COUNT),
            router=router,
            max_length=table.setting("max_position_embeddings", SIZE, DEFAULT_LENGTH),
            validate=not only_sizes,
        )


def tower_table(table: ConfigTable, vision_config: Config | None) -> ConfigTable:
    """Returns the config of the tower. Raises UserError if `mm_vision_tower` is not a known one."""
    if vision_config is not None:
        return ConfigTable(without_nulls(vision_config), "the tower's config.json", only_sizes=table.only_sizes)
    if (found := table.table("vision_config")) is not None:
        return found
    name = table.require("mm_vision_tower", TEXT)
    published = published_tower(name)
    if published is None:
        raise UserError(
            f"{table.path}: mm_vision_tower is {shown(name)}, which is not a known tower; give the folder of the tower "
            "with its config.json as vision_tower"
        )
    return ConfigTable(published, table.path, only_sizes=table.only_sizes)


def use_of(table: ConfigTable) -> Use:
    """Returns the views that the model gets. Raises UserError if the config asks for one view and for the other."""
    flags = {use: table.setting(f"use_{use}_only", FLAG, False) for use in ("global", "local")}
    if all(flags.values()):
        raise UserError(f"{table.path}: use_global_only and use_local_only are both true; set at most one")
    return next((use for use, only in flags.items() if only), "both")
