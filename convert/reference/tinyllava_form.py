"""Every config.json of a TinyLLaVA in one form, TinyLLaVABench's, and what follows from it, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mindvlm.convert.reference.tinyllava_layout import RESAMPLER_DEFAULTS, is_siglip, tower_sizes
from mindvlm.convert.reference.vary_layout import whole_patches

Config = Mapping[str, Any]

# what transformers adds to a `text_config` of the `llava` layout that is silent
_LLAMA_7B = {
    "hidden_size": 4096,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
_LLAVA_FEATURES = {"default": "patch", "full": "cls_patch"}


def bench_form(config: Config, dialect: str) -> dict[str, Any]:
    """Return a config of any layout in TinyLLaVABench's form: one table, the tower's under `vision_config`.

    Three keys are ours: `dialect`; `head_bias`; `keeps_last_layer` of a SigLIP that has all its layers. A tower's own
    config gives a table without `dialect`; the feature of a SigLIP alone is its last state.
    """
    if str(config.get("model_type", "")).startswith(("siglip", "clip")):
        tower = {"model_type": config["model_type"], **config.get("vision_config", config)}
        last = {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"} if is_siglip(tower) else {}
        return {"vision_config": tower, **last}
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return {**_with_rope_keys(config), "dialect": dialect}
    form = {**_with_rope_keys(text), "dialect": dialect, "vision_config": dict(config.get("vision_config", {}))}
    form["mm_vision_select_layer"] = config.get("vision_feature_layer", -2)
    feature = config.get("vision_feature_select_strategy")
    if config.get("model_type") == "llava":
        form["mm_vision_select_feature"] = _LLAVA_FEATURES.get(feature, "patch")
        form = {**_LLAMA_7B, **form, "mm_projector_type": "mlp2x_gelu"}
        return {**form, "vocab_size": config.get("vocab_size", form["vocab_size"])}
    form["mm_vision_select_feature"] = feature or "patch"
    form["vision_config"]["keeps_last_layer"] = True
    form |= {key: config[key] for key in RESAMPLER_DEFAULTS if config.get(key)}
    return {**form, "mm_projector_type": config.get("connector_type", "linear"), "head_bias": dialect == "phi"}


def _with_rope_keys(config: Config) -> dict[str, Any]:
    """Return a decoder's config with the keys that transformers 5 puts into `rope_parameters`."""
    return {**config, **(config.get("rope_parameters") or {})}


def image_feature(form: Config) -> tuple[int, int]:
    """Which state of the tower is the feature, and how many tokens in front are none. TinyLLaVABench's SigLIP ignores
    both keys: its feature is the last state, all of it."""
    tower = form["vision_config"]
    if is_siglip(tower) and not tower.get("keeps_last_layer"):
        return -1, 0
    return form.get("mm_vision_select_layer", -2), int(form.get("mm_vision_select_feature", "patch") == "patch")


def num_tower_tokens(form: Config) -> int:
    """Tokens of an image that leave the tower."""
    sizes = tower_sizes(form["vision_config"])
    return math.prod(whole_patches(sizes)) + (not is_siglip(sizes)) - image_feature(form)[1]


def num_image_tokens(form: Config) -> int:
    """Rows of the prompt that an image becomes."""
    if form.get("mm_projector_type") == "resampler":
        return {**RESAMPLER_DEFAULTS, **form}["num_queries"]
    return num_tower_tokens(form)
