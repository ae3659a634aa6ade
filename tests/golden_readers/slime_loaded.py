"""The SliME of a case, built from its config and filled by the production conversion rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.generation.images import ImageEncoder
from mindvlm.models.hf.tower_folder import with_tower_config
from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.models.slime.model import SlimeModel
from mindvlm.models.slime.processor import make_picture
from mindvlm.models.slime.router import kept_rows
from mindvlm.models.slime.views import ViewsConfig, candidate_sizes
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.nn.parameters import parameter_shapes
from mindvlm.processing.images.picture import Picture
from mindvlm.processing.images.tiling import grid_shape
from mindvlm.weights.recognise import native_view
from tests.golden_readers.case import Case
from tests.golden_readers.kernels import fill_model
from tests.golden_readers.loaded import RecordingEngine
from tests.known_models import MODELS

PLACEHOLDER = -200


class AdapterStages(nn.Cell):
    """Computes what the adapters make of the views (V, 3, height, width) of a picture, the global one first."""

    def __init__(self, model: SlimeModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, pixels):
        adapter = self.model.mm_projector
        features = self.model.tower_features(pixels)
        whole, crops = features[:1], features[1:]
        resampled, compressed = adapter.attn(whole), self.model.sampler(crops)
        experts = adapter.projection(whole), adapter.projection(resampled)
        return (
            features,
            resampled,
            *experts,
            adapter.gates(whole),
            adapter(whole),
            compressed,
            adapter.projection(compressed),
        )


STAGES = (
    "tower_features",
    "global_resampled",
    "global_expert_mlp",
    "global_expert_resampler",
    "gate_weights",
    "global_tokens",
    "local_resampled",
    "local_projected",
)


@dataclass(frozen=True)
class RoutedPicture:
    """The feature rows of a picture for one prompt, and the router's values.

    Attributes:
        rows: (R, hidden), those that enter the prompt.
        merged: all local rows in the order that the router sees.
        scores: of the local rows.
        kept: indices of the local rows that are kept.
    """

    rows: Tensor
    merged: np.ndarray
    scores: np.ndarray
    kept: np.ndarray


NOTHING = RoutedPicture(None, np.zeros((0, 1), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
"""A prompt without a picture."""


class LoadedSlime:
    """A SliME with the weights of a case, in float32.

    Args:
        case: has config.json, the weights and the folder of the tower's config.
        changes: keys of config.json to replace.
    """

    def __init__(self, case: Case, graph_mode: bool, changes: dict[str, Any] | None = None):
        self.case, self.data = case, with_tower_config({**case.config, **(changes or {})}, case.folder)
        self.config = from_hf_config(self.data)
        self.model = SlimeModel(self.config).set_train(False)
        with open_checkpoint(case.weights) as checkpoint:
            fill_model(self.model, native_view(checkpoint, (MODELS["slime"],), target_infos=self.infos))
        self.engine = RecordingEngine(
            self.model, placeholder_id=PLACEHOLDER, max_length=self.config.max_length, graph_mode=graph_mode
        )
        self.encoder = ImageEncoder(self.engine)
        self.stages = AdapterStages(self.model)

    @property
    def views(self) -> ViewsConfig:
        return ViewsConfig(
            size=self.config.vision_tower.image_size,
            use=self.config.use,
            merge=self.data["mm_patch_merge_type"],
            num_global_tokens=self.config.num_global_tokens,
            num_local_tokens=self.config.num_local_tokens,
        )

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Names, shapes and dtypes of the parameters."""
        return {name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(self.model).items()}

    def change(self, changes: dict[str, Any]) -> None:
        """Replaces keys of config.json that change no weight and no graph."""
        self.data = {**self.data, **changes}
        self.config = self.model.config = from_hf_config(self.data)

    def picture(self, pixels: np.ndarray, size: Sequence[int]) -> Picture:
        """Returns the picture of recorded views (V, 3, height, width); `size` is that of the source."""
        views = self.views
        grid = grid_shape(tuple(size), candidate_sizes(tuple(size), views.size), views.size)
        whole = pixels[0] if views.has_global else None
        return make_picture(views, whole, list(pixels[1:]) if views.has_crops else [], grid)

    def routed(self, picture: Picture, text: Sequence[int]) -> RoutedPicture:
        """Encodes a picture for the ids of a text."""
        rows = self.encoder.encode([picture], text).rows
        every = ImageTextModel.picture_rows(self.model, self.encoder.encode_views([picture])[0], picture.layout, text)
        merged = every[self.model.num_fixed_rows :]
        scores = self.model.scores(merged, text) if len(merged) else np.zeros(0, np.float32)
        kept = kept_rows(scores, self.config.router) if len(merged) else np.zeros(0, np.int32)
        return RoutedPicture(rows, merged.asnumpy(), scores, kept)
