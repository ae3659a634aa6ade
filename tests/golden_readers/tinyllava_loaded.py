"""The TinyLLaVA of a case, built from its config and filled by the production conversion rules."""

import dataclasses

import numpy as np

from mindvlm.checkpoint import MemorySource, TensorInfo, open_checkpoint
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model import TinyLlavaModel, build_model
from mindvlm.models.tinyllava.model_config import TuneConfig
from mindvlm.nn.parameters import parameter_shapes
from mindvlm.weights.recognise import native_view
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers.case import Case
from tests.golden_readers.kernels import fill_model
from tests.known_models import TINYLLAVA

FAMILY = "tinyllava"


class LoadedTinyLlava:
    """A TinyLLaVA with the weights of a case, in float32.

    Args:
        case: has config.json, the weights, and vision_config.json unless the config contains the tower's sizes.
        tune: the parts that train.
        changes: other attributes of the model config to replace.

    Attributes:
        model: the Cell.
        table: the conversion rules that match the names of the weights.
    """

    def __init__(self, case: Case, *, tune: TuneConfig | None = None, **changes):
        config = from_hf_config(case.config, vision_config=case.documents.get("vision_config.json"))
        # the recorded runs are in evaluation mode
        decoder = dataclasses.replace(config.language_model, residual_dropout=0.0)
        self.config = dataclasses.replace(config, language_model=decoder, tune=tune or TuneConfig(), **changes)
        self.model: TinyLlavaModel = build_model(self.config).set_train(False)
        with open_checkpoint(case.weights) as checkpoint:
            expected = {
                name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(self.model).items()
            }
            weights = native_view(checkpoint, TINYLLAVA, target_infos=expected)
            self.table = weights.plan.table
            fill_model(self.model, weights)
        self.parameters = dict(self.model.parameters_and_names())

    def original_name(self, name: str) -> str:
        """Returns the checkpoint's name of a parameter."""
        return self.table.sources_of(name)[0]

    def under_original_names(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays of all parameters under the checkpoint's names (the reversed rules)."""
        source = MemorySource(arrays)
        view = make_plan(self.table.reverse(), source.infos).view(source)
        return {name: view.read(name).data for name in view.infos}
