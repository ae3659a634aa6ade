"""Our side of the logits check: every stage of Vary-toy or Vary-tiny, opened and computed as `predict` does it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.convert.parity.comparison import ParityRequest
from mindvlm.convert.parity.graphs import LanguageStages, Say, Stages, TowerStages, named, start
from mindvlm.convert.parity.inputs import CONVOLUTIONS, VaryInputs, VaryScope, is_vary_tiny, vary_config, vary_inputs
from mindvlm.core import runtime
from mindvlm.families import get_family
from mindvlm.models.vary.config import from_hf_config
from mindvlm.weights.fill import fill_parameters, parameter_shapes

CLIP = ("clip_features", "clip_last_hidden", "clip_pooled")
VOCABULARY = ("vocabulary_neck", "vocabulary_features")


class VocabularyStages(nn.Cell):
    """pixels (N, 3, height, width) -> the neck's output (N, rows, columns, width) and the tokens (N, T, width)."""

    def __init__(self, tower):
        super().__init__(auto_prefix=False)
        self.tower = tower

    def construct(self, pixels):
        stages = self.tower.stages(pixels)
        return stages[-4], stages[-1]


class Connector(nn.Cell):
    """Features of both towers -> (N, T, hidden), for projectors that come without towers."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.clip, self.vocabulary = model.mm_projector, model.mm_projector_vary

    def construct(self, clip, vocabulary):
        return ops.concat((self.clip(clip), self.vocabulary(vocabulary)), -1)


class TinyConnector(nn.Cell):
    """The same for Vary-tiny, which looks at the vocabulary's features only."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.vocabulary = model.mm_projector

    def construct(self, clip, vocabulary):
        return self.vocabulary(vocabulary)


class VisionStages(nn.Cell):
    """All of the above in one graph, where the model has everything; the last one through `encode_images`."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        self.clip, self.vocabulary = TowerStages(model.vision_tower), VocabularyStages(model.vision_vocabulary)

    def construct(self, clip_pixels, high_pixels):
        features = self.model.encode_images(clip_pixels, high_pixels)
        return *self.clip(clip_pixels), *self.vocabulary(high_pixels), features


class TinyVisionStages(nn.Cell):
    """The same for Vary-tiny."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        self.vocabulary = VocabularyStages(model.vision_vocabulary)

    def construct(self, high_pixels):
        return *self.vocabulary(high_pixels), self.model.encode_images(high_pixels)


def run(request: ParityRequest, forced_ids: np.ndarray | None, say: Say) -> tuple[str, dict[str, np.ndarray]]:
    """See `mindvlm.convert.parity.ParityModel`.

    Raises:
        UserError: the target cannot be read, or its tensors are not those that the config describes.
    """
    request = dataclasses.replace(request, config=vary_config(request.config))
    dtype, framework = start()
    say(f"loading the target into {framework}")
    model = get_family("vary").model(from_hf_config(request.config), dtype).set_train(False)
    scope = load_target(model, request.target, request.config)
    stages = VaryStages(model, scope, request.config, request.num_tokens, say)
    return framework, stages.compute(vary_inputs(request.config, request.seed, image=scope.images), forced_ids)


def load_target(model: nn.Cell, path: str, config: dict[str, Any]) -> VaryScope:
    """Fill those parts of the model that the target has, in the way of `mindvlm.api.load`; the others cost nothing."""
    shapes = parameter_shapes(model)
    native_view = get_family("vary").native_view
    with open_checkpoint(path) as checkpoint:
        names = native_view(checkpoint).infos
        scope = VaryScope.of(names, config)
        parts = {name.partition(".")[0] for name in names}
        expected = {
            name: TensorInfo(name, "float32", shape)
            for name, shape in shapes.items()
            if name.partition(".")[0] in parts and (scope.vocabulary or not name.startswith(CONVOLUTIONS))
        }
        weights = native_view(checkpoint, target_infos=expected)

        def read(name: str) -> np.ndarray:
            # convolutions that the vocabulary does not come with; the neck does not depend on them
            return weights.read(name).to_float32() if name in expected else np.zeros(shapes[name], np.float32)

        for part in sorted(parts):
            fill_parameters(getattr(model, part), lambda name, part=part: read(f"{part}.{name}"))
    return scope


class VaryStages:
    """The graphs of one model; compiled once, they can run again after its parameters have changed.

    Args:
        model: filled as far as `scope` says.
        config: of config.json.
        num_tokens: the most greedy steps.
        say: called with one line before each slow step.
    """

    def __init__(self, model: nn.Cell, scope: VaryScope, config: dict[str, Any], num_tokens: int, say: Say) -> None:
        self.scope, self.say = scope, say
        if scope.images:
            self.vision = VisionStages(model) if scope.clip else TinyVisionStages(model)
        if scope.clip:
            self.clip = TowerStages(model.vision_tower)
        if scope.neck:
            self.vocabulary = VocabularyStages(model.vision_vocabulary)
        if scope.connector:
            self.connector = TinyConnector(model) if is_vary_tiny(config) else Connector(model)
        if scope.language_model:
            self.language = LanguageStages(
                model, placeholder_id=config.get("im_patch_token", -1), num_tokens=num_tokens, say=say
            )

    def compute(self, inputs: VaryInputs, forced_ids: np.ndarray | None) -> Stages:
        """Every stage that the parts allow, by the keys of `mindvlm.convert.parity.MODELS`."""
        stages = self.vision_stages(inputs)
        if self.scope.language_model:
            features = Tensor(stages["connector"]) if self.scope.images else None
            stages |= self.language.compute(inputs.input_ids, features, forced_ids)
        # nobody computes what the missing convolutions would make
        return stages if self.scope.vocabulary else {k: v for k, v in stages.items() if k != VOCABULARY[-1]}

    def vision_stages(self, inputs: VaryInputs) -> Stages:
        runtime.set_mode(True)
        clip_pixels, high_pixels = inputs.clip_pixels, inputs.high_pixels
        if self.scope.images:
            self.say("compiling and running the towers and the connector")
            if not self.scope.clip:
                return named((*VOCABULARY, "connector"), self.vision(Tensor(high_pixels)))
            return named((*CLIP, *VOCABULARY, "connector"), self.vision(Tensor(clip_pixels), Tensor(high_pixels)))
        stages: Stages = {}
        if self.scope.clip:
            self.say("compiling and running the CLIP tower")
            stages |= named(CLIP, self.clip(Tensor(clip_pixels)))
        if self.scope.neck:
            self.say("compiling and running the vision vocabulary")
            stages |= named(VOCABULARY, self.vocabulary(Tensor(high_pixels)))
        if self.scope.connector:
            stages |= named(("connector",), (self.connector(*map(Tensor, inputs.features)),))
        return stages
