"""The models of cases on MindSpore's own products, or on the C++ kernels."""

from mindspore import nn

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.native.library import open_library
from mindvlm.nn.linear_plan import choose_products
from mindvlm.nn.native_cells import use_native_cells
from mindvlm.nn.native_products import native_rules
from mindvlm.nn.parameters import fill_parameters

KERNELS = ("off", "float32", "16bit")
"""Without the kernels; with them and float32 weights; with them and the 16-bit weights of the case."""
NO_TRAINING = "training is computed without the kernels"

in_use = "off"
"""The choice for the case that is read."""


def fill_model(model: nn.Cell, weights: TensorSource) -> None:
    """Fills a model for inference, on the kernels if they are in use."""
    if in_use != "off":
        choose_products(model, native_rules("auto", "CPU"))
        use_native_cells(model, open_library())
    fill_parameters(model, CastSource(weights, "float32") if in_use == "float32" else weights)
