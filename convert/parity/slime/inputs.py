"""Scope and inputs of SliME's logits check: the same arrays on both sides, from a config and a seed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from mindvlm.convert.parity.inputs import ParityRequest, Scope, prompt_ids, structured_pixels
from mindvlm.core.errors import UserError
from mindvlm.models.slime.hf_config import from_hf_config, is_slime
from mindvlm.models.slime.model_config import SlimeModelConfig
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID

GRID = (3, 2)
"""Columns and rows of the crops. They differ, so that an exchange changes the order of the local rows."""
NUM_CROPS = GRID[0] * GRID[1]


def parity_config(request: ParityRequest, names: Collection[str]) -> SlimeModelConfig:
    """Returns the model config of the request's config.json.

    Raises:
        UserError: the file does not describe a SliME, or has a wrong key or value.
    """
    if not is_slime(request.config):
        raise UserError(
            "--verify logits: the config.json beside the weights does not describe a SliME; put that of the whole "
            "model there"
        )
    return from_hf_config(request.config)


@dataclass(frozen=True)
class SlimeScope(Scope):
    """The parts of a SliME."""

    tower: bool
    adapter: bool
    compression: bool
    language_model: bool

    @property
    def images(self) -> bool:
        return self.tower and self.adapter and self.compression and self.language_model


def scope_of(names: Collection[str], config: SlimeModelConfig) -> SlimeScope:
    """Returns the scope of native names."""
    parts = {name.partition(".")[0] for name in names}
    return SlimeScope(*(part in parts for part in ("vision_tower", "mm_projector", "sampler", "language_model")))


@dataclass(frozen=True)
class SlimeInputs:
    """Inputs of one run.

    Attributes:
        views: (1 + NUM_CROPS, 3, size, size) float32, normalised: the global view, then the crops.
        features: (1 + NUM_CROPS, T, width) float32 as of the tower, for adapters without one.
        input_ids: (1, L) int32. A picture has a placeholder for each of its rows, those that a router would leave out
            included: rounding may decide which row is the last one that is kept.
    """

    views: np.ndarray
    features: np.ndarray
    input_ids: np.ndarray

    @property
    def text_ids(self) -> np.ndarray:
        """The ids (L,) int32 that the router sees."""
        return self.input_ids[self.input_ids != PLACEHOLDER_ID]


def make_inputs(config: SlimeModelConfig, scope: Scope, request: ParityRequest) -> SlimeInputs:
    """Returns the inputs; the prompt has the placeholders of one picture if `scope.images`."""
    generator = np.random.default_rng(request.seed)
    vit, num_global, num_local = config.vision_tower, config.num_global_tokens, NUM_CROPS * config.num_local_tokens
    views = [structured_pixels(generator, vit.image_size, vit.image_size) for _ in range(1 + NUM_CROPS)]
    features = generator.standard_normal((1 + NUM_CROPS, num_global, vit.hidden_size), dtype=np.float32)
    num_rows = {"both": num_global + 1 + num_local, "global": num_global, "local": num_local}[config.use]
    span = [PLACEHOLDER_ID] * num_rows if scope.images else ()
    input_ids = prompt_ids(generator, config.language_model.vocab_size, span=span)
    return SlimeInputs(np.concatenate(views), features, input_ids)
