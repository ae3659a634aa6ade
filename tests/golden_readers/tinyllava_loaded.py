"""The TinyLLaVA of a case, built from its config and filled through the production conversion rules."""

import dataclasses

import mindspore as ms
import numpy as np

from mindvlm.checkpoint import MemorySource, TensorInfo, open_checkpoint
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.models.tinyllava.model import TinyLlavaModel, build_model
from mindvlm.models.tinyllava.model_config import TuneConfig
from mindvlm.weights.fill import fill_parameters, parameter_shapes
from mindvlm.weights.recognise import native_view
from tests.golden_readers.case import Case

FAMILY = "tinyllava"


class LoadedTinyLlava:
    """A TinyLLaVA with the weights of a case, in float32.

    Args:
        case: with config.json, vision_config.json unless the config holds the tower's, and the weights.
        tune: what learns.
        changes: further attributes of the model config that are replaced.

    Attributes:
        model: the Cell.
        table: the conversion rules that the names of the weights asked for.
    """

    def __init__(self, case: Case, *, tune: TuneConfig | None = None, **changes):
        config = from_hf_config(case.config, vision_config=case.documents.get("vision_config.json"))
        # the recorded runs are in evaluation mode
        decoder = dataclasses.replace(config.language_model, residual_dropout=0.0)
        self.config = dataclasses.replace(config, language_model=decoder, tune=tune or TuneConfig(), **changes)
        self.model: TinyLlavaModel = build_model(self.config, ms.float32).set_train(False)
        with open_checkpoint(case.weights) as checkpoint:
            expected = {
                name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(self.model).items()
            }
            weights = native_view(checkpoint, target_infos=expected, family=FAMILY)
            self.table = weights.plan.table
            fill_parameters(self.model, lambda name: weights.read(name).to_float32())
        self.parameters = dict(self.model.parameters_and_names())

    def original_name(self, name: str) -> str:
        """What the checkpoint calls a parameter."""
        return self.table.sources_of(name)[0]

    def under_original_names(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of all parameters by the names of the checkpoint (the rules reversed)."""
        source = MemorySource(arrays)
        view = self.table.reverse().plan(source.infos).view(source)
        return {name: view.read(name).data for name in view.infos}
