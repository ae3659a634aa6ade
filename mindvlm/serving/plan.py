"""What a process of the server serves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindvlm.serving.settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model, and the limits for its clients.

    Attributes:
        config_path: a YAML or a checkpoint folder; None for the shipped model.
        overrides: keys of the YAML that the command line replaces.
        caches: whether converted weights and compiled graphs are cached.
        settings: limits and permissions; `model_name` is the name of this model.
    """

    config_path: str | None
    overrides: Mapping[str, Any]
    caches: bool
    settings: ServerSettings
