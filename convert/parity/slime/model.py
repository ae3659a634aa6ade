"""The MindSpore side of SliME's logits check: the stages before the decoder, computed as `predict` does.

V views, C crops of a view, T tokens of a view, Q tokens of a crop, W width of the tower.
"""

from __future__ import annotations

import logging

from mindspore import Tensor, nn, ops

from mindvlm.convert.parity.graphs import ModelStages, Stages, TowerStages, named
from mindvlm.convert.parity.inputs import ParityRequest
from mindvlm.convert.parity.slime.inputs import GRID, NUM_CROPS, SlimeInputs, SlimeScope
from mindvlm.convert.parity.stages import TOWER_STAGES
from mindvlm.models.slime.views import ViewsConfig
from mindvlm.nn.image_text import ImageTextModel

logger = logging.getLogger(__name__)

TOWER = tuple(TOWER_STAGES)
GLOBAL = ("global_resampled", "gates", "global_rows")


class GlobalStages(nn.Cell):
    """features (1, T, W) -> the resampled features, the weights of the experts, the rows of the decoder."""

    def __init__(self, adapter):
        super().__init__(auto_prefix=False)
        self.adapter = adapter

    def construct(self, features):
        return self.adapter.attn(features), self.adapter.gates(features), self.adapter(features)


class ImageEncoder(nn.Cell):
    """pixels of global views or of buckets of crops -> the output of `encode_images`."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, pixels):
        return self.model.encode_images(pixels)


class FamilyStages(ModelStages):
    def __init__(self, model: nn.Cell, scope: SlimeScope, request: ParityRequest) -> None:
        super().__init__(model, scope, request)
        self.model = model
        self.tower = TowerStages(model.vision_tower)
        self.global_stages = GlobalStages(model.mm_projector)
        self.encoder = ImageEncoder(model)

    def vision_stages(self, inputs: SlimeInputs) -> Stages:
        scope, features, stages = self.scope, inputs.features, {}
        if scope.tower:
            logger.info("compiling and running the tower")
            stages |= named(TOWER, self.tower(Tensor(inputs.views)))
            features = stages["tower_features"]
        if scope.adapter:
            stages |= named(GLOBAL, self.global_stages(Tensor(features[:1])))
        if scope.compression:
            stages |= named(("local_resampled",), (self.model.sampler(Tensor(features[1:])),))
        if scope.adapter and scope.compression and not scope.images:
            rows = self.model.mm_projector.projection(Tensor(stages["local_resampled"]))
            stages |= named(("local_rows",), (rows,))
        if scope.images:
            logger.info("compiling and running the paths of the global view and of the crops")
            stages |= self.picture_stages(inputs)
        return stages

    def picture_stages(self, inputs: SlimeInputs) -> Stages:
        """Returns the stages of a picture's rows, by the paths that `predict` takes."""
        model, config, views = self.model, self.model.config, inputs.views
        layout = ViewsConfig(
            size=config.vision_tower.image_size,
            use=config.use,
            num_global_tokens=config.num_global_tokens,
            num_local_tokens=config.num_local_tokens,
        )
        num_crops = layout.crops_per_view
        global_rows = self.encoder(Tensor(views[:1]))
        buckets = self.encoder(Tensor(views[1:].reshape(-1, num_crops, *views.shape[1:])))
        local_rows = buckets[:, : num_crops * config.num_local_tokens].reshape((NUM_CROPS, config.num_local_tokens, -1))
        parts = {"both": (global_rows, buckets), "global": (global_rows,), "local": (buckets,)}[config.use]
        features, text = ops.concat(parts, 0), inputs.text_ids
        # without the router's choice, see SlimeInputs
        rows = ImageTextModel.picture_rows(model, features, layout.layout(GRID), text)
        stages = named(("global_rows", "local_rows", "connector"), (global_rows, local_rows, rows))
        if model.rows_depend_on_text:
            stages["router_scores"] = model.scores(rows[model.num_fixed_rows :], text)
        return stages
