"""The stages of a SliME on the torch side of the logits check."""

from __future__ import annotations

import logging

import torch

from mindvlm.checkpoint import TensorSource
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.slime.inputs import GRID, SlimeInputs, SlimeScope
from mindvlm.convert.reference.slime import ReferenceSlime, retiled, sine_positions
from mindvlm.convert.reference.stages import Stages, fill, language_stages, published_tensors
from mindvlm.models.slime.model_config import SlimeModelConfig

logger = logging.getLogger(__name__)

MODULES = {
    "tower": ("model.vision_tower",),
    "adapter": ("model.mm_projector",),
    "compression": ("model.sampler",),
    "language_model": ("model.embed_tokens", "model.layers", "model.norm", "lm_head"),
}


def build(config: SlimeModelConfig, request: ParityRequest) -> ReferenceSlime:
    return ReferenceSlime(config).eval()


source_tensors = published_tensors


def fill_modules(model: ReferenceSlime, values: TensorSource, device: torch.device, scope: SlimeScope) -> None:
    """Streams the tensors into float32 modules in chunks. Modules of other parts stay empty.

    Fixed positions that the source lacks, as a file of trained tensors does, are computed.

    Raises:
        UserError: the tensors do not match the config.
    """
    for part, prefixes in MODULES.items():
        for prefix in prefixes if getattr(scope, part) else ():
            module = model.get_submodule(prefix).to_empty(device=device)
            for name, parameter in module.named_parameters(prefix):
                if name.endswith(".pos_embed") and name not in values.infos:
                    parameter.copy_(sine_positions(*parameter.shape))
                else:
                    fill(parameter, values, name)


def compute(
    model: ReferenceSlime,
    config: SlimeModelConfig,
    inputs: SlimeInputs,
    scope: SlimeScope,
    num_tokens: int,
    device: torch.device,
) -> Stages:
    """Yields the stages that `scope` allows, each computed from the previous ones."""
    body = model.model
    features = torch.from_numpy(inputs.features).to(device)
    image_rows = None
    if scope.tower:
        logger.info("reference: vision tower")
        tower = body.vision_tower.vision_tower
        states = tower.hidden_states(torch.from_numpy(inputs.views).to(device))
        features = states[config.vision_select_layer][:, 1:]
        yield "tower_features", features
        yield "tower_last_hidden", states[-1]
        yield "tower_pooled", tower.pooled(states[-1])
    if scope.adapter:
        yield "global_resampled", body.mm_projector.attn(features[:1])
        yield "gates", body.mm_projector.gates(features[:1])
        global_rows = body.mm_projector(features[:1])
        yield "global_rows", global_rows
    if scope.compression:
        resampled = body.sampler.post_qformer(features[1:])
        yield "local_resampled", resampled
        if scope.adapter:
            local_rows = body.mm_projector.projection(resampled)
            yield "local_rows", local_rows
    if scope.images:
        local_rows = retiled(local_rows, GRID)
        image_rows = model.image_rows(global_rows[0], local_rows)
        yield "connector", image_rows
        if config.use != "global":
            yield "router_scores", model.router_scores(local_rows, torch.from_numpy(inputs.text_ids))
    if scope.language_model:
        yield from language_stages(model, torch.from_numpy(inputs.input_ids), image_rows, num_tokens)
