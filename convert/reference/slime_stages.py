"""The torch side of the logits check: computes all stages of a SliME from the source of a conversion."""

from __future__ import annotations

import logging

import numpy as np
import torch

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.slime.inputs import GRID, SlimeInputs, SlimeScope, parity_config, slime_inputs
from mindvlm.convert.reference.slime import ReferenceSlime, retiled, sine_positions
from mindvlm.convert.reference.stages import Stages, fill, language_stages, start
from mindvlm.models.registry import convertible_models
from mindvlm.weights.opened import open_native
from mindvlm.weights.rules.planning import make_plan

logger = logging.getLogger(__name__)

MODULES = {
    "tower": ("model.vision_tower",),
    "adapter": ("model.mm_projector",),
    "compression": ("model.sampler",),
    "language_model": ("model.embed_tokens", "model.layers", "model.norm", "lm_head"),
}


def run(request: ParityRequest) -> tuple[str, dict[str, np.ndarray]]:
    """Returns a description of the framework, and the stages by the keys of `stages_of`.

    Raises:
        UserError: a source cannot be read, or its tensors do not match the config.
    """
    device, framework = start()
    config = parity_config(request.config)
    with open_native(
        request.source_paths,
        convertible_models(),
        model=request.model,
        merge_lora=request.merge_lora,
        only=request.only,
    ) as opened:
        scope = SlimeScope.of(opened.source.infos)
        plan = make_plan(opened.model.hf.reverse(), opened.source.infos, partial=True, origin=str(opened.source.path))
        weights: TensorSource = plan.view(opened.source)
        if request.dtype != "keep":
            weights = CastSource(weights, request.dtype)
        logger.info(f"loading the source into the reference, {framework}")
        with torch.device("meta"):
            model = ReferenceSlime(config).eval()
        with torch.no_grad():
            fill_modules(model, weights, device, scope)
    inputs = slime_inputs(config, request.seed, image=scope.images)
    with torch.inference_mode():
        stages = compute(model, inputs, scope, request.num_tokens, device)
        return framework, {name: value.cpu().numpy() for name, value in stages}


def fill_modules(model: ReferenceSlime, weights: TensorSource, device: torch.device, scope: SlimeScope) -> None:
    """Streams the tensors into float32 modules in chunks. Modules of other parts stay empty.

    Fixed positions that the source lacks, as a file of trained tensors does, are computed.

    Raises:
        UserError: the tensors do not match the config.
    """
    values = CastSource(weights, "float32")
    for part, prefixes in MODULES.items():
        for prefix in prefixes if getattr(scope, part) else ():
            module = model.get_submodule(prefix).to_empty(device=device)
            for name, parameter in module.named_parameters(prefix):
                if name.endswith(".pos_embed") and name not in values.infos:
                    parameter.copy_(sine_positions(*parameter.shape))
                else:
                    fill(parameter, values, name)


def compute(
    model: ReferenceSlime, inputs: SlimeInputs, scope: SlimeScope, num_tokens: int, device: torch.device
) -> Stages:
    """Yields the stages that `scope` allows, each computed from the previous ones."""
    body, config = model.model, model.config
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
