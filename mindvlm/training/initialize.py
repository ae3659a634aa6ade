"""Random weights for training a small model from nothing.

Scales are those that let Vary-nano find the text in its pictures: position tables that are visible beside the patches,
branches that start small beside the residual stream.
"""

import math
import re

import numpy as np

# First match wins. A scale is absolute, or relative to 1 / sqrt(fan in) or to 1 / sqrt(width of a row).
_RULES = (
    (r"\.bias$", "constant", 0.0),
    (r"pos_embed$|position_embedding\.weight$|class_embedding$", "absolute", 0.3),
    (r"rel_pos_[hw]$", "absolute", 0.1),
    (r"embed_tokens\.weight$", "absolute", 0.5),
    # as in LLaVA
    (r"image_newline$", "width", 1.0),
    (r"lm_head\.weight$", "fan_in", 0.5),
    (r"(o_proj|down_proj|out_proj|fc2|attn\.proj|lin2)\.weight$", "fan_in", 0.35),
    (r"patch_embed|patch_embedding|neck\.|net_[23]\.", "fan_in", 1.0),
    (r"", "fan_in", 0.7),
)


def initial_values(name: str, shape: tuple[int, ...], seed: int, *, norm_weights: frozenset[str]) -> np.ndarray:
    """Values of one parameter, float32, the same numbers for the same name, shape and seed.

    Args:
        norm_weights: names of those that are the weights of normalisations, which start as ones.
    """
    if name in norm_weights:
        return np.ones(shape, dtype=np.float32)
    kind, scale = next((kind, scale) for pattern, kind, scale in _RULES if re.search(pattern, name))
    if kind == "constant":
        return np.full(shape, scale, dtype=np.float32)
    if kind == "fan_in":
        scale /= math.sqrt(math.prod(shape[1:]))
    if kind == "width":
        scale /= math.sqrt(shape[-1])
    rng = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    return (rng.standard_normal(shape) * scale).astype(np.float32)
