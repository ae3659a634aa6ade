"""The Cells on the C++ kernels that a built model uses for inference on a CPU."""

from collections.abc import Sequence

from mindspore import nn

from mindvlm.native.library import Library
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.linear import Linear
from mindvlm.nn.native_attention import CachedAttention, GridAttention, NativeMultiHead
from mindvlm.nn.native_decoder import NativeLayers
from mindvlm.nn.native_layers import (
    JointProducts,
    NativeActivation,
    NativeConv3x3,
    NativeDense,
    NativeGatedSiLU,
    NativeLayerNorm,
    NativeLinear,
    NativePatchConv,
    NativePlainMLP,
    NativeRMSNorm,
)
from mindvlm.nn.norm import LayerNorm, RMSNorm


def use_native_cells(model: nn.Cell, library: Library) -> None:
    """Makes a model use the Cells on the kernels, which have no gradients.

    A Cell that has such a form returns it from `native_form(cells)`, where `cells` is a `NativeCells`. It becomes the
    attribute `native` of the Cell. A Cell without this attribute is shared by models, so it is replaced in its parents.
    """
    cells = NativeCells(library)
    for _, parent in list(model.cells_and_names()):
        if is_shared(parent):
            continue
        if hasattr(parent, "native_form"):
            parent.native = parent.native_form(cells)
        if isinstance(parent, nn.SequentialCell):
            for index, child in enumerate(parent.cell_list):
                if is_shared(child):
                    parent[index] = child.native_form(cells)
        else:
            for name, child in parent.name_cells().items():
                if is_shared(child):
                    setattr(parent, name, child.native_form(cells))


def is_shared(cell: nn.Cell) -> bool:
    """Whether a Cell has a native form and no place for it."""
    return hasattr(cell, "native_form") and not hasattr(cell, "native")


class NativeCells:
    """Makes the Cells on the kernels; equal ones are one Cell, which is compiled once for all layers."""

    def __init__(self, library: Library):
        self.library = library
        self.made: dict[tuple, nn.Cell] = {}

    def shared(self, kind: type[nn.Cell], *arguments) -> nn.Cell:
        if (kind, arguments) not in self.made:
            self.made[kind, arguments] = kind(self.library, *arguments)
        return self.made[kind, arguments]

    def cached_attention(self, head_dim: int, *, has_rotation: bool) -> nn.Cell:
        return self.shared(CachedAttention, head_dim, has_rotation)

    def decoder_layers(self, config: DecoderConfig, layers: nn.CellList) -> nn.Cell | None:
        """Returns the operator of all layers of a decoder; None if one of their Linears needs its own."""
        # a layer defines its Cells in the order of computation
        parts = [cell for _, cell in layers.cells_and_names() if isinstance(cell, Linear | RMSNorm | LayerNorm)]
        if not are_joinable([part for part in parts if isinstance(part, Linear)]):
            return None
        return NativeLayers(self.library, config, parts)

    def multi_head_attention(self, num_heads: int) -> nn.Cell:
        return self.shared(NativeMultiHead, num_heads)

    def grid_attention(self) -> nn.Cell:
        return self.shared(GridAttention)

    def rms_norm(self, eps: float) -> nn.Cell:
        return self.shared(NativeRMSNorm, eps)

    def layer_norm(self, eps: float) -> nn.Cell:
        return self.shared(NativeLayerNorm, eps)

    def activation(self, kernel: str) -> nn.Cell:
        return self.shared(NativeActivation, kernel)

    def patch_conv(self, size: int) -> nn.Cell:
        return self.shared(NativePatchConv, size)

    def conv3x3(self, stride: int) -> nn.Cell:
        return self.shared(NativeConv3x3, stride)

    def conv1x1(self) -> nn.Cell:
        return self.shared(NativeDense)

    def gated_silu(self) -> nn.Cell:
        return self.shared(NativeGatedSiLU)

    def joint_products(self, *linears: nn.Cell) -> nn.Cell | None:
        """Returns the operator of Linears with one input; None if one of them needs its own."""
        if not are_joinable(linears) or len({linear.has_bias for linear in linears}) > 1:
            return None
        return self.shared(JointProducts, tuple(linear.out_features for linear in linears))

    def linear(self, linear: nn.Cell) -> nn.Cell | None:
        """Returns the operator of a product and its bias; None if it needs its own."""
        return self.shared(NativeLinear, linear.out_features) if are_joinable((linear,)) else None

    def plain_mlp(self, first: nn.Cell, activation: nn.Cell, second: nn.Cell) -> nn.Cell | None:
        """Returns the operator of a plain feed-forward block; None if one of its Linears needs its own."""
        if not are_joinable((first, second)) or first.has_bias != second.has_bias:
            return None
        return self.shared(NativePlainMLP, activation.kernel, second.out_features)


def are_joinable(linears: Sequence[nn.Cell]) -> bool:
    """Whether Linears are nothing but products on the kernels, and maybe a bias."""
    return all(type(it) is Linear and not it.is_adapted and hasattr(it.product, "handle") for it in linears)
