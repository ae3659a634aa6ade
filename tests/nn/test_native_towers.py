"""Vision towers and connectors on the C++ kernels against the Cells that they replace."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindvlm.checkpoint import MemorySource, RawTensor
from mindvlm.core.runtime import EAGER_FLOAT32
from mindvlm.models.slime.adapter import ADAPTERS
from mindvlm.models.tinyllava.model import build_connector
from mindvlm.models.tinyllava.model_config import ConnectorConfig
from mindvlm.models.vary.model_config import VisionVocabularyConfig
from mindvlm.models.vary.vision_vocabulary import VisionVocabulary
from mindvlm.nn.config import VitConfig
from mindvlm.nn.linear_plan import choose_products
from mindvlm.nn.mlp import ACTIVATIONS, Gated, activation, gated_activation
from mindvlm.nn.native_cells import use_native_cells
from mindvlm.nn.native_products import native_rules
from mindvlm.nn.parameters import fill_parameters, parameter_shapes
from mindvlm.nn.vit import TOWERS

pytestmark = pytest.mark.usefixtures("pynative")

VIT = dict(hidden_size=80, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, patch_size=4)
VOCABULARY = dict(embed_dim=48, depth=2, num_heads=2, global_attn_indexes=[1], patch_size=8)
NECK = dict(out_chans=8, net_2_channels=12, net_3_channels=16)
CONNECTORS = {
    "mlp": ConnectorConfig(type="mlp3x_gelu"),
    "resampler": ConnectorConfig(type="resampler", num_queries=5, num_resampler_layers=2, resampler_hidden_size=144),
}


def vit(dialect: str, **sizes):
    config = VitConfig(**VIT, dialect=dialect, **sizes)
    return lambda: TOWERS[dialect](config)


def vocabulary(image_size, window_size: int):
    config = VisionVocabularyConfig(**VOCABULARY, **NECK, image_size=image_size, window_size=window_size)
    return lambda: VisionVocabulary(config)


# how to build a Cell, and the shape of its input
CELLS = {
    "clip": (vit("clip", image_size=30), (2, 3, 30, 30)),
    "siglip": (vit("siglip", image_size=[20, 32], hidden_act="gelu_pytorch_tanh"), (1, 3, 20, 32)),
    "padded windows": (vocabulary([72, 104], 4), (2, 3, 72, 104)),
    "whole windows": (vocabulary(64, 4), (1, 3, 64, 64)),
    "mlp connector": (lambda: build_connector(CONNECTORS["mlp"], 32, 64), (2, 7, 32)),
    "resampler connector": (lambda: build_connector(CONNECTORS["resampler"], 32, 64), (2, 7, 32)),
    "global adapter": (lambda: ADAPTERS["learned"](128, 64, 9, EAGER_FLOAT32), (2, 9, 128)),
}


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights_of(cell: nn.Cell, dtype: str) -> MemorySource:
    """Random weights in a dtype of checkpoints."""
    shapes = parameter_shapes(cell)
    tensors = {name: noise(shape, index) / 3 for index, (name, shape) in enumerate(shapes.items())}
    return MemorySource({name: RawTensor.from_array(values).cast(dtype) for name, values in tensors.items()})


def output(cell: nn.Cell, source: MemorySource, x: np.ndarray, rules=(), library=None) -> np.ndarray:
    cell.set_train(False)
    choose_products(cell, rules)
    if library:
        use_native_cells(cell, library)
    fill_parameters(cell, source)
    return cell(Tensor(x)).asnumpy()


def require_close(found: np.ndarray, expected: np.ndarray, largest: float = 3e-6) -> None:
    assert np.linalg.norm(found - expected) <= largest * np.linalg.norm(expected)


@pytest.mark.parametrize("name", CELLS)
def test_the_kernels_give_the_results_of_the_replaced_cells(kernels, name):
    build, shape = CELLS[name]
    source, x = weights_of(build(), "bfloat16"), noise(shape, 99)
    expected = output(build(), source, x)
    native = build()
    require_close(output(native, source, x, native_rules("auto", "CPU"), kernels), expected)
    kept = [cell for _, cell in native.cells_and_names() if getattr(cell, "native", True) is None]
    assert not kept
    # a Cell that models share stays as it was
    require_close(output(build(), source, x), expected, 0.0)


def test_a_graph_gives_the_results_of_pynative_mode(kernels):
    build, shape = CELLS["padded windows"]
    source, x = weights_of(build(), "float16"), noise(shape, 99)
    expected = output(build(), source, x)
    ms.set_context(mode=ms.GRAPH_MODE)
    require_close(output(build(), source, x, native_rules("auto", "CPU"), kernels), expected)


def test_pictures_together_have_the_bits_of_single_ones(kernels):
    """With at least 16 tokens at every stage; products of fewer rows sum in another order."""
    native, x = vocabulary([128, 128], 4)(), noise((3, 3, 128, 128), 99)
    together = output(native, weights_of(native, "float32"), x, native_rules("auto", "CPU"), kernels)
    for picture, rows in zip(x, together, strict=True):
        np.testing.assert_array_equal(native(Tensor(picture[None])).asnumpy()[0], rows)


class Feed(nn.Cell):
    """One activation, and a gated one."""

    def __init__(self, name: str):
        super().__init__()
        self.act, self.gated = activation(name), gated_activation(name)

    def construct(self, x):
        return self.gated(self.act(x), x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(kernels, name):
    x = np.linspace(-9, 9, 3 * 4001).astype(np.float32).reshape(3, 4001)
    expected = Feed(name)(Tensor(x)).asnumpy()
    native = Feed(name)
    use_native_cells(native, kernels)
    np.testing.assert_allclose(native(Tensor(x)).asnumpy(), expected, rtol=1e-6, atol=1e-6)
    assert type(activation(name)) is ACTIVATIONS[name]
    assert not isinstance(gated := gated_activation(name), Gated) or gated.activation is activation(name)
