"""The codes of pictures, by a VQGAN alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mindvlm.checkpoint import TensorInfo, open_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RuntimeConfig, start
from mindvlm.models.delvm.checkpoint_config import from_published, read_published
from mindvlm.models.delvm.model import DelvmModel
from mindvlm.models.delvm.names import MODELS
from mindvlm.models.delvm.processor import DelvmProcessor, DelvmProcessorConfig
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.weights.recognise import native_view


def open_vqgan(folder: Path) -> tuple[Callable[[Path], np.ndarray], int]:
    """Returns a function from a picture to its codes (P,) int32, and the number of codes there are.

    Raises:
        UserError: the folder holds no VQGAN, or its weights cannot be used.
    """
    published = read_published(folder) if folder.is_dir() else None
    if published is None or "_class_name" not in published:
        raise UserError(f"--vqgan {folder}: is no folder with the config.json of a VQGAN; give the folder of one")
    config = from_published(published, path=f"{folder}/config.json")
    start(RuntimeConfig(mode="pynative"))
    model = DelvmModel(config).set_train(False)
    expected = {name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(model).items()}
    with open_checkpoint(folder) as checkpoint:
        fill_parameters(model, native_view(checkpoint, MODELS, target_infos=expected))
    processor = DelvmProcessor(DelvmProcessorConfig(size=config.vqgan.resolution))

    def encode(path: Path) -> np.ndarray:
        codes = model.encode_images(Tensor(processor.pixels(path)[None])).asnumpy()[0]
        if codes.min() < 0:
            raise UserError(f"--vqgan {folder}: computes NaN or infinity for {path}; check that its weights are whole")
        return codes

    return encode, config.vqgan.num_embeddings
