"""The identity of a model, by which answers are known to be its own."""

from typing import Any

from mindvlm.core.errors import UserError


def identity(config: Any, family: Any) -> str:
    """Returns the model's name with a digest of its weights, and their format if it is chosen."""
    from mindvlm.models.loading import separate_parts as parts_of
    from mindvlm.training.initial_weights import identify_weights

    if not config.checkpoint:
        raise UserError(f"config {config.name} names no checkpoint; set checkpoint to a file of weights")
    digest = identify_weights([config.checkpoint, *parts_of(config, family).values()])[:12]
    return f"{config.name}@{digest}" + (f":{config.weights}" if config.weights != "auto" else "")
