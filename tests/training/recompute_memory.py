"""Peak of memory of one training step beyond what compiling took, in bytes: recompute_memory.py true|false"""

import json
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm.core import runtime
from mindvlm.core.host_memory import peak_memory
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep

BATCH_SIZE, LENGTH, HIDDEN_SIZE, NUM_LAYERS = 32, 256, 256, 4


class Decoder(ImageTextModel):
    """(ids, labels, inv_freq, features, sources) -> as an image-text model whose features are given."""

    def __init__(self):
        super().__init__()
        self.freeze_vision_tower = True
        self.language_model = CausalLM(
            DecoderConfig(
                vocab_size=64,
                hidden_size=HIDDEN_SIZE,
                num_hidden_layers=NUM_LAYERS,
                num_attention_heads=4,
                head_dim=64,
                intermediate_size=4 * HIDDEN_SIZE,
            )
        )

    def encode_images(self, features):
        return features

    def construct(self, ids, labels, inv_freq, features, sources):
        return self.text_loss(self.merge(ids, self.encode_images(features), sources), labels, inv_freq)


def main(recompute: bool) -> None:
    runtime.start(runtime.RuntimeConfig(device="cpu"))
    model = Decoder().set_train()
    rng = np.random.default_rng(0)
    for parameter in model.get_parameters():
        parameter.set_data(Tensor(rng.normal(0.0, 0.02, parameter.shape).astype(np.float32)))
    step = TrainStep(model, OptimizerConfig(learning_rate=1e-3), recompute=recompute)
    ids = Tensor(rng.integers(0, 64, (BATCH_SIZE, LENGTH)).astype(np.int32))
    sources = Tensor(np.arange(BATCH_SIZE * LENGTH, dtype=np.int32).reshape(BATCH_SIZE, LENGTH))
    features = Tensor(np.zeros((1, 1, HIDDEN_SIZE), np.float32))
    arguments = (Tensor(1e-3, ms.float32), ids, ids, Tensor(np.ones(32, np.float32)), features, sources)
    step.compile(*arguments)
    before = peak_memory()
    step(*arguments).loss.asnumpy()
    print(peak_memory() - before)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
