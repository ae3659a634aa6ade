"""Cases of single connectors: outputs, and gradients of sum(output * cotangent)."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.checkpoint import MemorySource, open_checkpoint
from mindvlm.models.tinyllava.hf_config import connector_config
from mindvlm.models.tinyllava.model import build_connector
from mindvlm.weights.config_json import ConfigTable
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers.case import Case
from tests.golden_readers.report import TRAINING_BOUND, Report
from tests.known_models import MODELS

# any of the models: a connector has the same names in all
TABLE = MODELS["tinyllava_phi"].hf
PREFIX = "mm_projector."


def is_connectors(case: Case) -> bool:
    """Returns whether every entry of the config is a connector."""
    entries = case.config.values()
    return case.weights.exists() and all(isinstance(entry, dict) and "mm_projector_type" in entry for entry in entries)


class Weighted(nn.Cell):
    """Computes the connector's output and the sum of output * cotangent."""

    def __init__(self, connector: nn.Cell):
        super().__init__(auto_prefix=False)
        self.connector = connector

    def construct(self, x, cotangent):
        output = self.connector(x)
        return (output * cotangent).sum(), output


def read_connectors(case: Case, report: Report) -> None:
    """Compares `<type>.output`, `<type>.grad_input` and `<type>.grad.<parameter>` for every type of the config."""
    x = Tensor(case.inputs["x"])
    with open_checkpoint(case.weights) as checkpoint:
        raw = {name: checkpoint.read(name).to_float32() for name in checkpoint.infos}
    for kind, entry in case.config.items():
        width = entry["hidden_size"] if entry["mm_projector_type"] != "identity" else entry["mm_hidden_size"]
        connector = build_connector(connector_config(ConfigTable(entry)), entry["mm_hidden_size"], width)
        arrays = {name.split("/", 1)[1]: array for name, array in raw.items() if name.startswith(f"{kind}/")}
        source = MemorySource(arrays)
        plan = make_plan(TABLE, source.infos, partial=True)
        view = plan.view(source)
        for name, parameter in connector.parameters_and_names():
            parameter.set_data(Tensor(view.read(PREFIX + name).to_float32()))
        parameters = ms.ParameterTuple(connector.trainable_params())
        graph = ops.value_and_grad(Weighted(connector), 0, parameters or None, has_aux=True)
        (_, output), gradients = graph(x, Tensor(case.inputs[f"{kind}.cotangent"]))
        by_input, by_weights = gradients if parameters else (gradients, ())
        report.close(f"{kind}.output", output.asnumpy())
        report.close(f"{kind}.grad_input", by_input.asnumpy(), bound=TRAINING_BOUND)
        names = [name for name, _ in connector.parameters_and_names()]
        for name, gradient in zip(names, by_weights, strict=True):
            foreign = plan.sources_of(PREFIX + name)[0].removeprefix("model.mm_projector.")
            report.close(f"{kind}.grad.{foreign}", gradient.asnumpy(), bound=TRAINING_BOUND)
        report.same(f"{kind} parameters", [("names", len(names), len(np.unique(list(arrays))))])
