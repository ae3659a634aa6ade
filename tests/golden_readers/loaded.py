"""The model of a case, built from its config and filled by the production conversion rules."""

import numpy as np

from mindvlm.checkpoint import MemorySource, TensorInfo, open_checkpoint
from mindvlm.generation.engine import Engine
from mindvlm.models.vary.hf_config import from_hf_config
from mindvlm.models.vary.model import build_model
from mindvlm.nn.parameters import parameter_shapes
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers.case import Case
from tests.golden_readers.kernels import fill_model
from tests.known_models import MODELS


class RecordingEngine(Engine):
    """The production engine; it keeps the logits of all steps since it was resized, (B, V) each."""

    recorded: list[np.ndarray]

    def resize(self, num_slots):
        super().resize(num_slots)
        self.recorded = []

    def step(self):
        running = super().step()
        if running:
            self.recorded.append(self.next_logits.asnumpy())
        return running


class LoadedVary:
    """A Vary model, or those of its parts that the case contains.

    Attributes:
        model: the Cell, in float32.
        table: the conversion rules that match the names of the weights.
    """

    def __init__(self, case: Case):
        self.config = from_hf_config(case.config)
        self.model = build_model(self.config).set_train(False)
        shapes = parameter_shapes(self.model)
        with open_checkpoint(case.weights) as checkpoint:
            names = MODELS["vary_tiny" if self.config.is_tiny else "vary_toy"]
            self.table = names.detect_table(checkpoint.infos, str(case.weights))
            expected = {name: TensorInfo(name, "float32", shape) for name, shape in shapes.items()}
            weights = make_plan(self.table, checkpoint.infos, expected, origin=str(case.weights)).view(checkpoint)
            fill_model(self.model, weights)
        self.parameters = dict(self.model.parameters_and_names())

    def engine(self, case: Case, *, graph_mode: bool, max_length: int) -> RecordingEngine:
        """Returns an inference engine with room for `max_length` tokens per row."""
        return RecordingEngine(
            self.model,
            placeholder_id=case.config.get("im_patch_token", -1),
            max_length=max(max_length, self.config.max_length),
            graph_mode=graph_mode,
        )

    def under_original_names(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays of all parameters with the names and layout of weights.safetensors (reversed rules)."""
        source = MemorySource(arrays)
        view = make_plan(self.table.reverse(), source.infos).view(source)
        return {name: view.read(name).data for name in view.infos}
