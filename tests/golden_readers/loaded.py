"""The model of a case, built from its config and filled through the production conversion rules."""

import mindspore as ms
import numpy as np

from mindvlm.checkpoint import MemorySource, TensorInfo, open_checkpoint
from mindvlm.generation.engine import Engine
from mindvlm.models.vary.config import from_hf_config
from mindvlm.models.vary.model import build_model
from mindvlm.weights.fill import fill_parameters, parameter_shapes
from mindvlm.weights.recognise import MODELS
from tests.golden_readers.case import Case


class RecordingEngine(Engine):
    """The production engine, which keeps the logits of its last prompt and of every step after it."""

    recorded: list[np.ndarray]

    def append(self, rows, image_features=None, order=None):
        logits = super().append(rows, image_features, order)
        self.recorded = [logits.asnumpy()]
        return logits

    def step(self, ids):
        logits = super().step(ids)
        self.recorded.append(logits.asnumpy())
        return logits


class LoadedVary:
    """A Vary model, or the parts of one that the case has.

    Attributes:
        model: the Cell, in float32.
        table: the conversion rules that the names of the weights asked for.
    """

    def __init__(self, case: Case):
        self.config = from_hf_config(case.config)
        self.model = build_model(self.config, ms.float32).set_train(False)
        shapes = parameter_shapes(self.model)
        with open_checkpoint(case.weights) as checkpoint:
            names = MODELS["vary_tiny" if self.config.is_tiny else "vary_toy"]
            self.table = names.detect_table(checkpoint.infos, str(case.weights))
            expected = {name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}
            weights = self.table.plan(checkpoint.infos, expected, origin=str(case.weights)).view(checkpoint)
            fill_parameters(self.model, lambda name: weights.read(name).to_float32())
        self.parameters = dict(self.model.parameters_and_names())

    def engine(self, case: Case, *, graph_mode: bool, max_length: int) -> RecordingEngine:
        """The inference engine with room for `max_length` tokens a row."""
        return RecordingEngine(
            self.model,
            placeholder_id=case.config.get("im_patch_token", -1),
            max_length=max(max_length, self.config.max_length),
            graph_mode=graph_mode,
        )

    def under_original_names(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of all parameters by the names and in the layout of weights.safetensors (the rules reversed)."""
        source = MemorySource(arrays)
        view = self.table.reverse().plan(source.infos).view(source)
        return {name: view.read(name).data for name in view.infos}
