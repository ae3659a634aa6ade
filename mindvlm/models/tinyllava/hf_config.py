"""Reads the model config from a config.json of TinyLLaVABench, TinyLLaVA Factory, transformers' `llava` layout, a
language model, or a tower."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.models.hf import decoders
from mindvlm.models.hf.decoders import read_decoder
from mindvlm.models.hf.towers import is_tower, published_tower, read_tower, tower_places
from mindvlm.models.tinyllava.model_config import ConnectorConfig, TinyLlavaModelConfig
from mindvlm.nn.config import DecoderConfig, VitConfig
from mindvlm.weights.config_json import SIZE, TEXT, WHOLE, Config, ConfigTable, shown, without_nulls

MODEL_TYPES = {
    "tiny_llava_phi": "phi",
    "tiny_llava_stablelm": "stablelm",
    "tiny_llava": "llama",
    "tinyllava": "llama",
    "llava": "llama",
    **{name: dialect for name, dialect in decoders.MODEL_TYPES.items() if dialect in ("phi", "stablelm", "llama")},
}
"""`model_type` of a config.json, or of its `text_config` -> dialect of the decoder."""

RESAMPLER_KEYS = ("resampler_hidden_size", "num_queries", "num_resampler_layers")

LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
"""The defaults of transformers' LlamaConfig for a `text_config` of the `llava` layout."""

FLAT_KEYS = {"language_model.": "", "connector.": "", "vision_select_layer": "mm_vision_select_layer"}
PART_KEYS = {"language_model.": "text_config.", "connector.": "", "vision_select_layer": "vision_feature_layer"}
"""Field names after `model.` in errors of a model config -> keys of a config.json, of TinyLLaVABench's flat layout and
of a layout with a table per part."""

# context limit if neither the tokenizer nor the positions set one
DEFAULT_LENGTH = 2048
NUM_SIGLIP_TOKENS = 27 * 27


def from_hf_config(
    data: Config,
    *,
    vision_config: Config | None = None,
    dialect: str | None = None,
    path: str = "config.json",
    only_sizes: bool = False,
) -> TinyLlavaModelConfig:
    """Returns the model config of a config.json.

    Args:
        data: the contents of config.json.
        vision_config: the contents of the tower repository's. Without it `data` may hold one; otherwise the tower is
            the published one that `mm_vision_tower` names.
        dialect: that of the decoder; found in `data` if not given.
        path: what messages call the file.
        only_sizes: whether to read tensor shapes only; the result may describe a model that cannot run.

    Raises:
        UserError: the language model, tower or connector is unknown or not supported.
    """
    table = ConfigTable(without_nulls(data), path, only_sizes=only_sizes)
    tower = table.table("vision_config")
    if vision_config is not None:
        tower = ConfigTable(without_nulls(vision_config), "the tower's config.json", only_sizes=only_sizes)
    if is_tower(table.values):
        return tower_config(table, read_tower(table, deletes_last_layer=True))
    text = table.table("text_config")
    if table.get("model_type", TEXT) == "llava":
        return legacy_config(table, text, tower)
    if text is not None:
        return factory_config(table, text, tower, dialect or dialect_of(text))
    name = table.get("mm_vision_tower", TEXT)
    if tower is None and name:
        published = published_tower(name)
        if published is None:
            places = " or ".join(str(place / "config.json") for place in tower_places(Path(path).parent, name))
            raise UserError(
                f"{path}: mm_vision_tower is {shown(name)}, which is not a known tower, and there is no {places}; give "
                "the folder of the tower as vision_tower (--vision_tower)"
            )
        tower = ConfigTable(published, path)
    lm = decoder_config(table, dialect or dialect_of(table))
    vit = read_tower(tower, deletes_last_layer=True) if tower else None
    connector = connector_config(table)
    select_layer = table.setting("mm_vision_select_layer", WHOLE, -2)
    select_feature = feature(table, "mm_vision_select_feature")
    if vit is None or vit.dialect == "siglip":
        # SigLIP's tower ignores both keys: its features are the whole last state
        select_layer, select_feature = -1, "cls_patch"
    dropped = int(select_feature == "patch")
    return model_config(
        table,
        FLAT_KEYS | tower_keys(table, tower),
        language_model=lm,
        vision_tower=vit,
        connector=connector,
        vision_select_layer=select_layer,
        num_dropped_tokens=dropped,
        image_token_len=image_token_len(vit, dropped, connector),
        # as in the original program, this key alone adds the row, although only tiled pictures use it
        image_newline=vit is not None and "unpad" in table.get("mm_patch_merge_type", TEXT, "flat"),
        max_length=max_length(table, table),
        padding_token_id=table.setting("pad_token_id", WHOLE),
    )


def model_config(table: ConfigTable, keys: Mapping[str, str], **fields: Any) -> TinyLlavaModelConfig:
    """Returns the model config with these fields. Its errors name the keys of the file.

    Args:
        table: the file.
        keys: see `FLAT_KEYS`.
    """
    decoder = keys.get("language_model.", "")
    keys = {"language_model.residual_dropout": f"{decoder}resid_pdrop", **keys}
    with table.keys_for({f"model.{name}": key for name, key in keys.items()}):
        return TinyLlavaModelConfig(**fields, validate=not table.only_sizes)


def decoder_config(table: ConfigTable, dialect: str, **changes: Any) -> DecoderConfig:
    """Returns the decoder of `read_decoder`; refuses a tied head, which no model of the family has."""
    table.refuse_setting("tie_word_embeddings", False)
    return read_decoder(table, dialect, tie_word_embeddings=False, **changes)


def tower_keys(table: ConfigTable, tower: ConfigTable | None) -> dict[str, str]:
    """Returns the tower keys for `model_config`, of a table in the file or of a separate file."""
    if tower and tower.path != table.path:
        return {"vision_tower.": f"{tower.path}: ", "vision_tower": "the tower"}
    return {"vision_tower": "vision_config"}


def dialect_of(table: ConfigTable) -> str:
    """Returns the dialect of the decoder. Raises UserError if the family does not support it."""
    return decoders.dialect_of(table, MODEL_TYPES)


def connector_config(table: ConfigTable, key: str = "mm_projector_type") -> ConnectorConfig:
    """Returns the connector that a key of config.json names; the default is a single Linear."""
    sizes = {key: table.get(key, SIZE) for key in RESAMPLER_KEYS if key in table}
    with table.keys_for({"connector type": key, "connector: ": ""}):
        return ConnectorConfig(type=table.get(key, TEXT, "linear"), **sizes)


def image_token_len(vit: VitConfig | None, dropped: int, connector: ConnectorConfig) -> int:
    return connector.num_tokens(vit.num_tokens - dropped) if vit else NUM_SIGLIP_TOKENS


def max_length(table: ConfigTable, text: ConfigTable) -> int:
    """Returns the context limit: the tokenizer's, or else the number of trained positions."""
    num_positions = text.setting("max_position_embeddings", SIZE, DEFAULT_LENGTH)
    return table.setting("tokenizer_model_max_length", SIZE, num_positions)


def feature(table: ConfigTable, key: str) -> str:
    """Returns which tokens of the tower are features, "patch" or "cls_patch" (all of them)."""
    value = table.setting(key, TEXT, "patch")
    if value not in ("patch", "cls_patch"):
        raise UserError(f"{table.path}: {key} is {shown(value)}; expected 'patch' or 'cls_patch'")
    return value


def required(table: ConfigTable, key: str, part: ConfigTable | None) -> ConfigTable:
    """Returns the table of a part. Raises UserError if it is missing."""
    if part is None:
        raise table.error(f"lacks {key!r}, which describes a part of the model")
    return part


def tower_config(table: ConfigTable, vit: VitConfig) -> TinyLlavaModelConfig:
    """Returns the config of a model that only has a tower."""
    is_siglip = vit.dialect == "siglip"
    select_layer, dropped = (-1, 0) if is_siglip else (-2, 1)
    return model_config(
        table,
        {"vision_tower.": "", "vision_tower": "the tower"},
        language_model=None,
        vision_tower=vit,
        vision_select_layer=select_layer,
        num_dropped_tokens=dropped,
        image_token_len=vit.num_tokens - dropped,
        connector=ConnectorConfig(type="identity"),
    )


def legacy_config(table: ConfigTable, text: ConfigTable | None, tower: ConfigTable | None) -> TinyLlavaModelConfig:
    """Returns the config of transformers' `llava` layout: Llama, CLIP and two Linears."""
    table.refuse_setting("projector_hidden_act", "gelu")
    text = required(table, "text_config", text)
    vit = read_tower(required(table, "vision_config", tower), deletes_last_layer=True)
    values = {**LLAMA_DEFAULTS, **text.values}
    if "vocab_size" in table:
        values["vocab_size"] = table.get("vocab_size", SIZE)
    text = replace(text, values=values)
    strategies = {"default": 1, "full": 0}
    strategy = table.setting("vision_feature_select_strategy", TEXT, "default")
    if strategy not in strategies:
        raise UserError(
            f"{table.path}: vision_feature_select_strategy is {shown(strategy)}; expected 'default' or 'full'"
        )
    select_layer, dropped = table.setting("vision_feature_layer", WHOLE, -2), strategies[strategy]
    if vit.dialect == "siglip":
        select_layer, dropped = -1, 0
    connector = ConnectorConfig(type="mlp2x_gelu")
    return model_config(
        table,
        PART_KEYS | tower_keys(table, tower),
        language_model=decoder_config(text, "llama"),
        vision_tower=vit,
        connector=connector,
        vision_select_layer=select_layer,
        num_dropped_tokens=dropped,
        image_token_len=image_token_len(vit, dropped, connector),
        max_length=text.setting("max_position_embeddings", SIZE, DEFAULT_LENGTH),
        padding_token_id=table.setting("pad_token_id", WHOLE, text.setting("pad_token_id", WHOLE)),
    )


def factory_config(
    table: ConfigTable, text: ConfigTable, tower: ConfigTable | None, dialect: str
) -> TinyLlavaModelConfig:
    """Returns the config of TinyLLaVA Factory's layout: `text_config` and `vision_config`.

    Phi keeps the bias of its head, SigLIP keeps all layers, and "patch" drops the first token even if it is not a class
    token.
    """
    vit = read_tower(required(table, "vision_config", tower))
    connector = connector_config(table, "connector_type")
    dropped = int(feature(table, "vision_feature_select_strategy") == "patch")
    return model_config(
        table,
        PART_KEYS | tower_keys(table, tower),
        language_model=decoder_config(text, dialect, head_bias=dialect == "phi"),
        vision_tower=vit,
        connector=connector,
        vision_select_layer=table.setting("vision_feature_layer", WHOLE, -2),
        num_dropped_tokens=dropped,
        image_token_len=image_token_len(vit, dropped, connector),
        max_length=max_length(table, text),
        padding_token_id=table.setting("pad_token_id", WHOLE) or text.setting("pad_token_id", WHOLE),
    )
