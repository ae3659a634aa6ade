"""The models of cases on MindSpore's own products, or on the C++ kernels."""

import os

from mindspore import nn

from mindvlm.checkpoint import CastSource, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.native.library import INSTRUCTION_SETS, open_library
from mindvlm.nn.linear_plan import choose_products
from mindvlm.nn.native_cells import use_native_cells
from mindvlm.nn.native_products import native_rules
from mindvlm.nn.parameters import fill_parameters

FORMATS = ("float32", "16bit")
"""float32 weights, or the 16-bit ones of the case."""
NO_TRAINING = "training is computed without the kernels"

in_use = "off"
"""The format of the weights of the case that is read; "off" without the kernels."""


def check_choice(text: str) -> str:
    """Returns the text: `off`, or a format with or without an instruction set, such as `16bit` and `16bit:avx2`.

    Raises:
        ValueError: it is something else.
    """
    weights, _, instruction_set = text.partition(":")
    if text != "off" and (weights not in FORMATS or instruction_set not in ("", *INSTRUCTION_SETS)):
        raise ValueError(text)
    return text


def choose(text: str) -> None:
    """Makes the next models use these kernels, see `check_choice`.

    Raises:
        UserError: there are no kernels, or the processor does not have the instruction set.
    """
    global in_use
    in_use, _, instruction_set = text.partition(":")
    if in_use == "off":
        return
    library = open_library()
    if library is None:
        raise UserError(f"kernels are {text!r} but there are none here; install a C++ compiler, or take off")
    library.choose(instruction_set or os.environ.get("MINDVLM_NATIVE") or None)


def fill_model(model: nn.Cell, weights: TensorSource) -> None:
    """Fills a model for inference, on the kernels if they are in use."""
    if in_use != "off":
        choose_products(model, native_rules("auto", "CPU"))
        use_native_cells(model, open_library())
    fill_parameters(model, CastSource(weights, "float32") if in_use == "float32" else weights)
