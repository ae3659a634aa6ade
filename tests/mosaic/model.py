"""The Cells of a Mosaic. N images, G cells along each edge, B batch, L length."""

from mindspore import nn, ops

from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.nn.linear import Linear
from tests.mosaic.config import MosaicModelConfig


class MosaicModel(ImageTextModel):
    def __init__(self, config: MosaicModelConfig, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        self.config = config
        self.language_model = CausalLM(config.language_model, context)
        self.colours = Linear(3, config.language_model.hidden_size, dtype=context.dtype)

    @property
    def towers(self) -> list[nn.Cell]:
        return []

    def encode_images(self, pixels):
        """pixels (N, 3, height, width) -> image features (N, G * G, hidden)."""
        grid, (num_images, _, height, width) = self.config.grid, pixels.shape
        cells = pixels.reshape((num_images, 3, grid, height // grid, grid, width // grid)).mean((3, 5))
        return self.colours(ops.transpose(cells.reshape((num_images, 3, grid * grid)), (0, 2, 1)))

    def construct(self, input_ids, labels, inv_freq, pixels, sources):
        return self.text_loss(self.merge(input_ids, self.encode_images(pixels), sources), labels, inv_freq)
