"""Random weights for training a small model from nothing.

Scales are those that let Vary-nano find the text in its pictures: position tables that are visible beside the patches,
branches that start small beside the residual stream.
"""

import math
import re

import numpy as np
from mindspore import Parameter, Tensor

# First match wins. A scale is absolute, or relative to 1 / sqrt(fan in).
_RULES = (
    (r"\.bias$", "constant", 0.0),
    (r"norm[^.]*\.weight$|layrnorm\.weight$|neck\.[13]\.weight$", "constant", 1.0),
    (r"pos_embed$|position_embedding\.weight$|class_embedding$", "absolute", 0.3),
    (r"rel_pos_[hw]$", "absolute", 0.1),
    (r"embed_tokens\.weight$", "absolute", 0.5),
    (r"lm_head\.weight$", "fan_in", 0.5),
    (r"(o_proj|down_proj|out_proj|fc2|attn\.proj|lin2)\.weight$", "fan_in", 0.35),
    (r"patch_embed|patch_embedding|neck\.|net_[23]\.", "fan_in", 1.0),
    (r"", "fan_in", 0.7),
)


def initialize(parameters: list[Parameter], seed: int) -> None:
    """Fills every parameter from `seed`, the same numbers for the same names and shapes in any order."""
    for parameter in parameters:
        parameter.set_data(Tensor(initial_values(parameter.name, parameter.shape, seed)))


def initial_values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values of one parameter, float32."""
    kind, scale = next((kind, scale) for pattern, kind, scale in _RULES if re.search(pattern, name))
    if kind == "constant":
        return np.full(shape, scale, dtype=np.float32)
    if kind == "fan_in":
        scale /= math.sqrt(math.prod(shape[1:]))
    rng = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    return (rng.standard_normal(shape) * scale).astype(np.float32)
