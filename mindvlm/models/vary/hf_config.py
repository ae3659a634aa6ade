"""Reads the model config from the config.json of a Vary-toy or a Vary-tiny (Hugging Face layout)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.models.hf.towers import CLIP_224, read_tower
from mindvlm.models.vary.model_config import (
    VaryModelConfig,
    VisionVocabularyConfig,
    model_shapes,
    num_vocabulary_tokens,
)
from mindvlm.nn.config import DecoderConfig, height_and_width
from mindvlm.weights.config_json import (
    ABOVE_ZERO,
    COUNT,
    FLAG,
    IMAGE_SIZE,
    LAYER_NUMBERS,
    NUM_LAYERS,
    RATIO,
    SIZE,
    TEXT,
    TEXTS,
    WHOLE,
    Config,
    ConfigTable,
    named_types,
    read_config,
)

MAX_LENGTH = 32767

_OPT_FIXED = {
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_KEYS = {
    "model.language_model.head_dim": "kv_channels",
    "model.language_model.hidden_act": "activation_function",
    "model.language_model.": "",
    "model.vision_tower": "vision_config",
    "model.vision_vocabulary": "vision_high_config",
    "model.max_length": "max_position_embeddings",
    "model.": "",
}
"""Field names in errors of a model config -> keys of a config.json."""

_VOCABULARY_KINDS = {
    **dict.fromkeys(("embed_dim", "num_heads", "patch_size", "out_chans", "net_2_channels", "net_3_channels"), SIZE),
    "depth": NUM_LAYERS,
    "global_attn_indexes": LAYER_NUMBERS,
    "window_size": COUNT,
    "image_size": IMAGE_SIZE,
    "mlp_ratio": RATIO,
}


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the image tokens: one `patch` per feature row, between `start` and `end`. -1 means no token."""

    patch: int = -1
    start: int = -1
    end: int = -1

    @classmethod
    def of(cls, data: Config) -> "ImageTokens":
        """Returns the ids of a config.json."""
        keys = {"patch": "im_patch_token", "start": "im_start_token", "end": "im_end_token"}
        return cls(**{name: ConfigTable(data).get(key, WHOLE, -1) for name, key in keys.items()})


def from_hf_config(data: Config) -> VaryModelConfig:
    """Returns the model config of a config.json: Vary-tiny if it has an OPT decoder, else Vary-toy.

    `vision_config` (a CLIP vision config) and `vision_high_config` are optional. Released files have neither; the
    defaults are CLIP ViT-L/14 and SAM ViT-B. A file of one part yields a model of that part.

    Raises:
        UserError: a key is missing or has a wrong value, or the OPT decoder differs in form from OPT-125M.
    """
    table = ConfigTable(data)
    return tiny_config(table) if "ffn_dim" in table else toy_config(table)


def model_config(table: ConfigTable, **fields: Any) -> VaryModelConfig:
    """Returns the model config with these fields. Its errors name the keys of the file."""
    with table.keys_for(_KEYS):
        return VaryModelConfig(**fields, validate=not table.only_sizes)


def toy_config(table: ConfigTable) -> VaryModelConfig:
    """Returns the config of a Vary-toy.

    The towers are frozen and `freeze_vision_tower` is ignored: the original program never trains them.
    """
    lm = None
    if "hidden_size" in table or "num_hidden_layers" in table:
        table.refuse_setting("rotary_pct", 1.0)
        table.refuse_setting("tie_word_embeddings", False)
        lm = DecoderConfig(
            vocab_size=table.require("vocab_size", SIZE),
            hidden_size=table.require("hidden_size", SIZE),
            num_hidden_layers=table.require("num_hidden_layers", NUM_LAYERS),
            num_attention_heads=table.require("num_attention_heads", SIZE),
            head_dim=table.require("kv_channels", SIZE),
            # the released file counts both MLP branches
            intermediate_size=table.require("intermediate_size", SIZE) // 2,
            rms_norm_eps=table.setting("layer_norm_epsilon", ABOVE_ZERO, 1e-6),
            rope_theta=table.setting("rotary_emb_base", ABOVE_ZERO, 10000),
            training_length=table.setting("seq_length", SIZE, 8192),
            use_dynamic_ntk=table.setting("use_dynamic_ntk", FLAG, True),
            use_logn_attn=table.setting("use_logn_attn", FLAG, True),
            initializer_range=table.setting("initializer_range", ABOVE_ZERO, 0.02),
        )
    has_images = "im_patch_token" in table
    clip = table.table("vision_config") or ConfigTable({})
    vit = read_tower(clip, defaults=CLIP_224) if has_images or "vision_config" in table else None
    if vit and vit.dialect != "clip":
        clip.refuse("model_type", "clip_vision_model")
    return model_config(
        table,
        language_model=lm,
        vision_tower=vit,
        vision_vocabulary=read_vocabulary(table) if has_images or "vision_high_config" in table else None,
        vision_select_layer=table.setting("vision_select_layer", WHOLE, -2),
        image_token_len=table.setting("image_token_len", SIZE, vit.num_patches if vit else 256),
        max_length=min(table.setting("max_position_embeddings", SIZE, 2048), MAX_LENGTH),
    )


def tiny_config(table: ConfigTable) -> VaryModelConfig:
    """Returns the config of a Vary-tiny. Its vision vocabulary is trained unless `freeze_vision_tower` is set."""
    hidden_size = table.require("hidden_size", SIZE)
    num_heads = 1 if table.only_sizes else table.require("num_attention_heads", SIZE)
    for key, expected in {**_OPT_FIXED, "word_embed_proj_dim": hidden_size}.items():
        table.refuse(key, expected)
    num_positions = table.require("max_position_embeddings", SIZE)
    lm = DecoderConfig(
        vocab_size=table.require("vocab_size", SIZE),
        hidden_size=hidden_size,
        num_hidden_layers=table.require("num_hidden_layers", NUM_LAYERS),
        num_attention_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=table.require("ffn_dim", SIZE),
        norm="layer_norm",
        position="learned",
        max_position_embeddings=num_positions,
        mlp="plain",
        hidden_act=table.setting("activation_function", TEXT, "relu"),
        o_bias=True,
        tie_word_embeddings=True,
        initializer_range=table.setting("init_std", ABOVE_ZERO, 0.02),
    )
    names = " ".join([table.get("model_type", TEXT, ""), *table.get("architectures", TEXTS, ())]).lower()
    has_images = "vary" in names or "im_patch_token" in table or "vision_high_config" in table
    sam = read_vocabulary(table) if has_images else None
    return model_config(
        table,
        language_model=lm,
        vision_tower=None,
        vision_vocabulary=sam,
        image_token_len=table.setting("image_token_len", SIZE, num_vocabulary_tokens(sam) if sam else 256),
        max_length=num_positions,
        freeze_vision_tower=table.setting("freeze_vision_tower", FLAG, False),
    )


def read_vocabulary(table: ConfigTable) -> VisionVocabularyConfig:
    """Returns the vision vocabulary of `vision_high_config`. The defaults are SAM ViT-B.

    Raises:
        UserError: a key has a wrong value, or the image size is not a multiple of the patch size.
    """
    described = table.table("vision_high_config") or ConfigTable({})
    values = {key: described.get(key, kind) for key, kind in _VOCABULARY_KINDS.items() if key in described}
    config = VisionVocabularyConfig(**values)
    if any(side % config.patch_size for side in height_and_width(config.image_size)):
        raise described.error(
            f"{described.prefix}image_size is {config.image_size}, expected multiples of the patch_size "
            f"{config.patch_size}"
        )
    return config


def infos_of(config: VaryModelConfig) -> dict[str, TensorInfo]:
    """Returns the native tensors of a config."""
    return {name: TensorInfo(name, "float32", shape) for name, shape in model_shapes(config).items()}


def infos_of_folder(
    folder: Path, read: Callable[[ConfigTable], VaryModelConfig], *, model: str, model_types: Sequence[str]
) -> dict[str, TensorInfo] | None:
    """Returns the native tensors of the config.json in `folder`.

    Returns None if the file is missing, names another model (as beside a separate tower), or only describes towers.

    Args:
        folder: folder of the weights.
        read: `toy_config` or `tiny_config`.
        model: name of the model in messages.
        model_types: names of the model in a config.json.

    Raises:
        UserError: config.json names this model, or none, but has a wrong key or value.
    """
    config = read_config(folder)
    if config is None:
        return None
    types = named_types(config)
    if types and not set(types) & set(model_types):
        return None
    if not types and any(isinstance(tower, Mapping) for tower in config.values()) and "hidden_size" not in config:
        return None
    table = ConfigTable(config, str(folder / "config.json"), only_sizes=True)
    try:
        table.require("hidden_size", SIZE)
        return infos_of(read(table))
    except UserError as error:
        raise table.other_model(model, error) from None


def vary_toy_config() -> dict[str, Any]:
    """Returns the config.json of the released Vary-toy: the keys with an effect, and the configs of both towers."""
    return {
        "model_type": "mmgpt",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "kv_channels": 128,
        "vocab_size": 151860,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 8192,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "vision_select_layer": -2,
        "image_token_len": 256,
        "im_patch_token": 151859,
        "im_start_token": 151857,
        "im_end_token": 151858,
        "vision_config": dict(CLIP_224),
        "vision_high_config": vars(VisionVocabularyConfig()),
    }


def vary_tiny_config() -> dict[str, Any]:
    """Returns the config.json of the released Vary-tiny: the keys with an effect, and the config of the tower."""
    return {
        "architectures": ["varyOPTForCausalLM"],
        "model_type": "vary",
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "max_position_embeddings": 4096,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "tie_word_embeddings": True,
        "vocab_size": 50268,
        "image_token_len": 256,
        "im_patch_token": 50265,
        "im_start_token": 50266,
        "im_end_token": 50267,
        "vision_high_config": vars(VisionVocabularyConfig()),
    }
