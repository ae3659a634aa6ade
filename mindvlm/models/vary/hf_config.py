"""Model configs from the config.json of Vary-toy and of Vary-tiny (Hugging Face layout)."""

import dataclasses

from mindvlm.core.errors import UserError
from mindvlm.models.vary.mindocr_config import released_clip
from mindvlm.models.vary.model_config import VaryModelConfig, num_tower_tokens, num_vocabulary_tokens
from mindvlm.models.vary.vision_vocabulary import VisionVocabularyConfig
from mindvlm.nn.decoder import DecoderConfig
from mindvlm.nn.vit import VitConfig

MAX_LENGTH = 32767

# What an OPT config may say and this decoder does not have.
_OPT_FIXED = {
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}


def from_hf_config(data: dict) -> VaryModelConfig:
    """Model config from a config.json: Vary-tiny's if it describes an OPT decoder, else Vary-toy's.

    `vision_config` (a CLIP vision config) and `vision_high_config` may be present; a released Vary has neither and
    gets CLIP ViT-L/14 and SAM ViT-B. A file that only describes one part gives a model of that part.

    Raises:
        UserError: an OPT decoder of another form than that of OPT-125M.
    """
    return tiny_config(data) if "ffn_dim" in data else toy_config(data)


def toy_config(data: dict) -> VaryModelConfig:
    """Vary-toy. The towers are frozen whatever `freeze_vision_tower` says: the original program never lets a gradient
    into them."""
    lm = None
    if "num_hidden_layers" in data:
        lm = DecoderConfig(
            vocab_size=data["vocab_size"],
            hidden_size=data["hidden_size"],
            num_hidden_layers=data["num_hidden_layers"],
            num_attention_heads=data["num_attention_heads"],
            head_dim=data["kv_channels"],
            # the released file counts both MLP branches
            intermediate_size=data["intermediate_size"] // 2,
            rms_norm_eps=data["layer_norm_epsilon"],
            rope_theta=data["rotary_emb_base"],
            training_length=data["seq_length"],
            use_dynamic_ntk=data["use_dynamic_ntk"],
            use_logn_attn=data["use_logn_attn"],
            initializer_range=data.get("initializer_range", 0.02),
        )
    has_images = "im_patch_token" in data
    vit = vit_config(data.get("vision_config") or released_clip()) if has_images or "vision_config" in data else None
    sam = None
    if has_images or "vision_high_config" in data:
        sam = VisionVocabularyConfig(**data.get("vision_high_config", {}))
    return VaryModelConfig(
        language_model=lm,
        vision_tower=vit,
        vision_vocabulary=sam,
        vision_select_layer=data.get("vision_select_layer", -2),
        image_token_len=data.get("image_token_len", num_tower_tokens(vit) if vit else 256),
        max_length=min(data.get("max_position_embeddings", 2048), MAX_LENGTH),
    )


def tiny_config(data: dict) -> VaryModelConfig:
    """Vary-tiny. Its vision vocabulary learns unless the file says `freeze_vision_tower`."""
    for key, expected in {**_OPT_FIXED, "word_embed_proj_dim": data["hidden_size"]}.items():
        if data.get(key, expected) != expected:
            raise UserError(f"config.json: {key} is {data[key]!r}; an OPT decoder must have {expected!r} here")
    lm = DecoderConfig(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        num_hidden_layers=data["num_hidden_layers"],
        num_attention_heads=data["num_attention_heads"],
        head_dim=data["hidden_size"] // data["num_attention_heads"],
        intermediate_size=data["ffn_dim"],
        norm="layer_norm",
        position="learned",
        max_position_embeddings=data["max_position_embeddings"],
        mlp="plain",
        hidden_act=data.get("activation_function", "relu"),
        o_bias=True,
        tie_word_embeddings=True,
        initializer_range=data.get("init_std", 0.02),
    )
    names = " ".join([data.get("model_type", ""), *data.get("architectures", ())]).lower()
    has_images = "vary" in names or "im_patch_token" in data or "vision_high_config" in data
    sam = VisionVocabularyConfig(**data.get("vision_high_config", {})) if has_images else None
    return VaryModelConfig(
        language_model=lm,
        vision_tower=None,
        vision_vocabulary=sam,
        image_token_len=data.get("image_token_len", num_vocabulary_tokens(sam) if sam else 256),
        max_length=data["max_position_embeddings"],
        freeze_vision_tower=data.get("freeze_vision_tower", False),
    )


def vit_config(data: dict) -> VitConfig:
    known = {f.name for f in dataclasses.fields(VitConfig)}
    return VitConfig(**{key: value for key, value in data.items() if key in known})
