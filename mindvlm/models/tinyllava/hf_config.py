"""Model configs from the config.json of a checkpoint: TinyLLaVABench's, TinyLLaVA Factory's, the legacy `llava` layout,
a plain language model, or a tower alone."""

from collections.abc import Mapping
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.models.hf.decoders import decoder_config, dialect_of, refuse
from mindvlm.models.hf.towers import check_feature, feature_of, published_tower, vit_config
from mindvlm.models.tinyllava.connector import ConnectorConfig
from mindvlm.models.tinyllava.hf_checks import checked, require_table
from mindvlm.models.tinyllava.model_config import TinyLlavaModelConfig, num_tower_tokens
from mindvlm.nn.vit import VitConfig

Config = Mapping[str, Any]
RESAMPLER_KEYS = ("resampler_hidden_size", "num_queries", "num_resampler_layers")

# A context is as long as the tokenizer says, or as the positions that were trained.
DEFAULT_LENGTH = 2048
NUM_SIGLIP_TOKENS = 27 * 27


def from_hf_config(data: Config, *, vision_config: Config | None = None) -> TinyLlavaModelConfig:
    """Model config from a config.json.

    Args:
        data: the contents of config.json.
        vision_config: those of the tower repository's. Without it `data` may hold one, and else the tower is the
            published one that `mm_vision_tower` names.

    Raises:
        UserError: an unknown language model, tower or connector, or one of another form than this library has.
    """
    data = checked(data)
    if vision_config is not None:
        vision_config = checked({"model_type": "clip", **vision_config}, "the tower's config.json")
    kind = data.get("model_type")
    if kind == "llava":
        return legacy_config(data)
    if str(kind).startswith(("siglip", "clip")):
        return tower_config(data)
    if isinstance(data.get("text_config"), Mapping):
        return factory_config(data, vision_config)
    name = data.get("mm_vision_tower")
    tower = vision_config or data.get("vision_config") or (published_tower(name) if name else None)
    lm = decoder_config(data, dialect_of(data))
    vit = vit_config(tower) if tower else None
    connector = connector_config(data)
    select_layer, dropped = feature_of(
        vit, data.get("mm_vision_select_layer", -2), data.get("mm_vision_select_feature", "patch")
    )
    return TinyLlavaModelConfig(
        language_model=lm,
        vision_tower=vit,
        connector=connector,
        vision_select_layer=select_layer,
        num_dropped_tokens=dropped,
        image_token_len=image_token_len(vit, dropped, connector),
        # the original makes the row by this key alone, though it needs it for pictures in tiles only
        image_newline="unpad" in (data.get("mm_patch_merge_type") or "flat"),
        max_length=data.get("tokenizer_model_max_length") or data.get("max_position_embeddings", DEFAULT_LENGTH),
        padding_token_id=data.get("pad_token_id"),
    )


def connector_config(data: Config) -> ConnectorConfig:
    """The connector that the `mm_projector_type` of a config.json names; without one a single Linear."""
    sizes = {key: data[key] for key in RESAMPLER_KEYS if data.get(key)}
    return ConnectorConfig(type=data.get("mm_projector_type", "linear"), **sizes)


def image_token_len(vit: VitConfig | None, dropped: int, connector: ConnectorConfig) -> int:
    return connector.num_tokens(num_tower_tokens(vit) - dropped) if vit else NUM_SIGLIP_TOKENS


def tower_config(data: Config) -> TinyLlavaModelConfig:
    """A tower alone."""
    vit = vit_config(data)
    select_layer, dropped = feature_of(vit, -2, "patch")
    return TinyLlavaModelConfig(
        language_model=None,
        vision_tower=vit,
        vision_select_layer=select_layer,
        num_dropped_tokens=dropped,
        image_token_len=num_tower_tokens(vit) - dropped,
        connector=ConnectorConfig(type="identity"),
    )


def legacy_config(data: Config) -> TinyLlavaModelConfig:
    """transformers' `llava` layout: a Llama, CLIP and two Linears; the published file is silent about most sizes."""
    refuse(data, "projector_hidden_act", (None, "gelu"))
    text = {**LEGACY_TEXT, **require_table(data, "text_config")}
    if "vocab_size" in data:
        text["vocab_size"] = data["vocab_size"]
    vit = vit_config(require_table(data, "vision_config"))
    strategies = {"default": "patch", "full": "cls_patch"}
    strategy = data.get("vision_feature_select_strategy", "default")
    if strategy not in strategies:
        raise UserError(f"config.json: vision_feature_select_strategy is {strategy!r}; expected 'default' or 'full'")
    select_layer, dropped = feature_of(vit, data.get("vision_feature_layer", -2), strategies[strategy])
    connector = ConnectorConfig(type="mlp2x_gelu")
    return TinyLlavaModelConfig(
        language_model=decoder_config(text, "llama"),
        vision_tower=vit,
        connector=connector,
        vision_select_layer=select_layer,
        num_dropped_tokens=dropped,
        image_token_len=image_token_len(vit, dropped, connector),
        max_length=text["max_position_embeddings"],
        padding_token_id=data.get("pad_token_id", text.get("pad_token_id")),
    )


# what transformers' LlamaConfig adds to a `text_config` that leaves it out
LEGACY_TEXT = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "num_key_value_heads": None}


def factory_config(data: Config, vision_config: Config | None) -> TinyLlavaModelConfig:
    """TinyLLaVA Factory's layout: `text_config` and `vision_config`. Its Phi keeps the bias of the head, its SigLIP all
    layers, and the first token goes whether it is a class token or not."""
    text = data["text_config"]
    dialect = dialect_of(text)
    vit = vit_config(vision_config or require_table(data, "vision_config"), keeps_last_layer=True)
    connector = connector_config({**data, "mm_projector_type": data.get("connector_type", "linear")})
    feature = data.get("vision_feature_select_strategy", "patch")
    check_feature(feature)
    dropped = int(feature == "patch")
    return TinyLlavaModelConfig(
        language_model=decoder_config(text, dialect, head_bias=dialect == "phi"),
        vision_tower=vit,
        connector=connector,
        vision_select_layer=data.get("vision_feature_layer", -2),
        num_dropped_tokens=dropped,
        image_token_len=image_token_len(vit, dropped, connector),
        max_length=data.get("tokenizer_model_max_length") or text.get("max_position_embeddings", DEFAULT_LENGTH),
        padding_token_id=data.get("pad_token_id") or text.get("pad_token_id"),
    )
