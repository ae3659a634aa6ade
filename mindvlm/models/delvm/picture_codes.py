"""The codes of pictures, by a VQGAN alone."""

from collections.abc import Sequence
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
from mindvlm.processing.images.loading import ImageSource
from mindvlm.weights.recognise import native_view

BATCH_PIXELS, MOST_PICTURES = 8 * 256**2, 64


class PictureEncoder:
    """Encodes pictures with the VQGAN of a folder.

    Attributes:
        size: edge of the pictures it takes, in pixels; others are brought to it.
        vocab_size: number of codes there are.
        num_codes: of a picture.
        batch_size: number of pictures to encode at a time.

    Raises:
        UserError: the folder holds no VQGAN, or its weights cannot be used.
    """

    def __init__(self, folder: Path):
        published = read_published(folder) if folder.is_dir() else None
        if published is None or "_class_name" not in published:
            raise UserError(f"--vqgan {folder}: is no folder with the config.json of a VQGAN; give the folder of one")
        config = from_published(published, path=f"{folder}/config.json")
        start(RuntimeConfig(mode="pynative"))
        self.folder, self.size, self.vocab_size = folder, config.vqgan.resolution, config.vqgan.num_embeddings
        self.num_codes = config.vqgan.num_codes
        self.batch_size = max(1, min(MOST_PICTURES, BATCH_PIXELS // self.size**2))
        self.model = DelvmModel(config).set_train(False)
        expected = {name: TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(self.model).items()}
        with open_checkpoint(folder) as checkpoint:
            fill_parameters(self.model, native_view(checkpoint, MODELS, target_infos=expected))
        self.processor = DelvmProcessor(DelvmProcessorConfig(size=self.size))

    def __call__(self, pictures: Sequence[ImageSource]) -> np.ndarray:
        """Returns the codes (N, P) int32 of pictures, computed in one batch.

        Raises:
            UserError: a picture cannot be read, or the VQGAN computes NaN or infinity.
        """
        pixels = np.stack([self.processor.pixels(picture) for picture in pictures])
        codes = self.model.encode_images(Tensor(pixels)).asnumpy()
        if codes.min() < 0:
            raise UserError(
                f"--vqgan {self.folder}: computes NaN or infinity for a picture; check that its weights are whole"
            )
        return codes
