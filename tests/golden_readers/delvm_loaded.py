"""The DeLVM of a case, built from its config and filled by the production conversion rules."""

from pathlib import Path

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.model_config import DelvmModelConfig
from mindvlm.models.delvm.names import MODELS
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.weights.recognise import native_view
from tests.golden_readers.kernels import fill_model


def load_model(folder: Path, config: DelvmModelConfig, *, is_trained: bool = False) -> DelvmModel:
    """Returns the model of a config, filled by the production rules from the weights in a folder.

    Args:
        is_trained: uses no kernels, which have no gradients.
    """
    model = DelvmModel(config).set_train(False)
    expected = {name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(model).items()}
    with open_checkpoint(folder) as checkpoint:
        fill = fill_parameters if is_trained else fill_model
        fill(model, native_view(checkpoint, MODELS, target_infos=expected))
    return model
