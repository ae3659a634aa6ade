"""The DeLVM of a case, built from its config and filled by the production conversion rules."""

from pathlib import Path

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.model_config import DelvmModelConfig
from mindvlm.models.delvm.names import MODELS
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.weights.recognise import native_view


def load_model(folder: Path, config: DelvmModelConfig) -> DelvmModel:
    """Returns the model of a config in float32, filled by the production rules from the weights in a folder."""
    model = DelvmModel(config).set_train(False)
    expected = {name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(model).items()}
    with open_checkpoint(folder) as checkpoint:
        fill_parameters(model, native_view(checkpoint, MODELS, target_infos=expected))
    return model
