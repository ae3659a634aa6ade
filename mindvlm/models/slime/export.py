"""The config.json of a trained SliME, with the keys of the original program."""

from collections.abc import Mapping
from typing import Any

from mindvlm.models.hf.decoders import decoder_keys
from mindvlm.models.hf.export import folder_files, require_described, scope_keys, source_config, tower_name
from mindvlm.models.hf.towers import tower_keys
from mindvlm.models.slime.config import SlimeConfig
from mindvlm.models.slime.folder import TEMPLATE_KEY, default_template
from mindvlm.models.slime.hf_config import DEFAULT_LENGTH, GATES, MODEL_TYPES, from_hf_config
from mindvlm.models.slime.processor import make_tokenizer
from mindvlm.processing.text.tokenizer import Tokenizer
from mindvlm.weights.trained_parts import PartFiles

PART_FILES = PartFiles(
    {"mm_projector.bin": ("mm_projector.",), "sampler.bin": ("sampler.",)},
    dtypes={".w_gate": "bfloat16", ".w_noise": "bfloat16", ".pos_embed": "float16"},
)
"""The files that each run before the last one leaves."""

TRAINING_FIELDS = ("gate_noise", "router.noise", "router.sees_answers")
"""Fields of the model config that act in training only."""

# without effect in the original, too
GRID_PINPOINTS = [[672, 672], [336, 672], [672, 336], [336, 1008], [1008, 336], [336, 1344], [1344, 336]]


def companions(config: SlimeConfig) -> dict[str, bytes]:
    """Returns name -> content of the files that turn trained weights into a model folder.

    Raises:
        UserError: the tokenizer's files cannot be read, or no config.json can describe the model.
    """
    tokenizer = config.processor.tokenizer
    description = hf_config(config, make_tokenizer(config.processor), source=source_config(tokenizer))
    parts = ("language_model", "vision_tower", "router")
    require_described(config.model, description, read=from_hf_config, parts=parts, others=TRAINING_FIELDS)
    return folder_files(tokenizer, description)


def hf_config(config: SlimeConfig, tokenizer: Tokenizer, *, source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of a model; the reverse of `folder_config`.

    Args:
        config: run config.
        tokenizer: tokenizer of the model.
        source: config.json of the model, or of the decoder, that training started from.
    """
    model, views = config.model, config.processor.views
    end_id = tokenizer.special_id(tokenizer.end_token)
    template = config.processor.template
    return {
        "architectures": [MODEL_TYPES[0]],
        "model_type": MODEL_TYPES[1],
        **decoder_keys(model.language_model),
        "max_position_embeddings": model.max_length,
        "bos_token_id": (tokenizer.prefix_ids or [end_id])[0],
        "eos_token_id": source.get("eos_token_id", end_id),
        "pad_token_id": tokenizer.pad_id,
        "mm_vision_tower": tower_name(model.vision_tower),
        "vision_config": tower_keys(model.vision_tower),
        "mm_vision_select_layer": model.vision_select_layer,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": model.vision_tower.hidden_size,
        "mm_projector_type": "gated",
        "mm_learnable_gated": next(number for number, gate in GATES.items() if gate == model.gate),
        "mm_resampler_type": "cosine",
        "mm_resampler_topp": model.router.top_p,
        "mm_resampler_temp": model.router.temperature,
        "mm_resampler_dim": model.num_local_tokens,
        "mm_patch_merge_type": views.merge,
        "image_aspect_ratio": views.mode,
        "image_grid_pinpoints": GRID_PINPOINTS,
        "seperator": model.separator_id,
        "use_global_only": model.use == "global",
        "use_local_only": model.use == "local",
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_projector_lr": None,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": source.get("tokenizer_model_max_length", DEFAULT_LENGTH),
        "tokenizer_padding_side": "right",
        **({} if template == default_template(tokenizer) else {TEMPLATE_KEY: template}),
        **scope_keys(config),
        "use_cache": True,
        "torch_dtype": config.dtype,
    }
