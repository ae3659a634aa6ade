"""Cells on the C++ kernels that take the place of others in a built model for inference on a CPU.

B batch, L new tokens, S cache capacity, H query heads, K key and value heads, D head dimension, R rotated dimensions.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.native.library import Library
from mindvlm.nn.linear import Linear
from mindvlm.nn.rotary import rotary_cos_sin

ACTIVATION_KERNELS = ("none", "gelu", "tanh_gelu", "quick_gelu", "silu", "relu")
"""Names of the kernels in the order of `Activation` in native/src/towers.h."""


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

    def patches(self, size: int) -> nn.Cell:
        return self.shared(Patches, size)

    def neighbourhoods(self, stride: int) -> nn.Cell:
        return self.shared(Neighbourhoods, stride)

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

    def gated_mlp(self, *linears: nn.Cell) -> nn.Cell | None:
        """Returns the operator of a gated SiLU block; None if one of its Linears needs its own."""
        if not are_joinable(linears) or any(linear.has_bias for linear in linears):
            return None
        return self.shared(NativeGatedMLP)


def are_joinable(linears: tuple[nn.Cell, ...]) -> bool:
    """Whether Linears are nothing but products on the kernels, and maybe a bias."""
    return all(type(it) is Linear and not it.is_adapted and hasattr(it.product, "handle") for it in linears)


def operator(library: Library, function: str, shape, width: int = 0) -> ops.Custom:
    """Returns the operator of a function of the library, whose output is float32.

    Args:
        shape: the shapes of the inputs -> that of the output.
        width: a number that `shape` depends on.
    """
    made = ops.Custom(f"{library.path}:{function}", shape, lambda *_: ms.float32, func_type="aot")
    # PyNative mode keeps output shapes by attributes, which do not include `shape`
    made.add_prim_attr("width", width)
    return made


def first_shape(first, *others):
    return first


class CachedAttention(nn.Cell):
    """Attention of new tokens with the cache of a layer, which it updates in place; for `SelfAttention.with_cache`.

    Args:
        head_dim: D.
        has_rotation: whether queries and keys are rotated by their positions.
    """

    def __init__(self, library: Library, head_dim: int, has_rotation: bool):
        super().__init__()
        self.scale = head_dim**-0.5
        self.has_rotation = has_rotation
        self.attend = operator(library, "MindvlmAttention", first_shape)

    def shared_inputs(self, positions, inv_freq, query_scale, rows):
        """Returns the inputs that are equal in all layers; see `CausalLM.with_cache`.

        Args:
            query_scale: (B, 1, L, 1) float32, LogN scale; None for 1.
        """
        batch_size, length = positions.shape
        if self.has_rotation:
            cos, sin = rotary_cos_sin(positions, inv_freq, 1)
            cos, sin = cos.reshape((batch_size, length, -1)), sin.reshape((batch_size, length, -1))
        else:
            cos, sin = ops.ones((batch_size, length, 2), ms.float32), ops.zeros((batch_size, length, 2), ms.float32)
        scale = ops.full((batch_size, length), self.scale, dtype=ms.float32)
        if query_scale is not None:
            scale = scale * query_scale.reshape((batch_size, length))
        if rows is None:
            rows = ops.arange(batch_size).astype(ms.int32)
        return cos, sin, positions, rows, scale

    def construct(self, query, key, value, keys, values, cos, sin, positions, rows, scale):
        """query (B, L, H * D), key and value (B, L, K * D), caches (rows, K, S, D) -> (B, L, H * D)."""
        return self.attend(query, key, value, cos, sin, keys, values, positions, rows, scale)


class NativeRMSNorm(nn.Cell):
    """Computes `RMSNorm`: x (N, hidden), weight (hidden,) -> (N, hidden)."""

    def __init__(self, library: Library, eps: float):
        super().__init__()
        self.norm = operator(library, "MindvlmRmsNorm", first_shape)
        self.eps = Tensor(np.array([eps], np.float32))

    def construct(self, x, weight):
        return self.norm(x, weight, self.eps)


class NativeLayerNorm(nn.Cell):
    """Computes `LayerNorm`: x (..., hidden), weight and bias (hidden,) -> the shape of x."""

    def __init__(self, library: Library, eps: float):
        super().__init__()
        self.norm = operator(library, "MindvlmLayerNorm", first_shape)
        self.eps = Tensor(np.array([eps], np.float32))

    def construct(self, x, weight, bias):
        return self.norm(x, weight, bias, self.eps)


class NativeMultiHead(nn.Cell):
    """Computes `MultiHeadCore`."""

    def __init__(self, library: Library, num_heads: int):
        super().__init__()
        self.attend = operator(library, "MindvlmAttendAll", first_shape)
        self.num_heads = Tensor(np.array([num_heads], np.int32))

    def construct(self, query, key, value):
        return self.attend(query, key, value, self.num_heads)


class GridAttention(nn.Cell):
    """Attention over a grid of tokens, or within windows of it, with SAM's relative positions.

    Cells of a window beyond the grid have the query, key and value of a zero token, and are not masked.
    """

    def __init__(self, library: Library):
        super().__init__()
        self.attend = operator(library, "MindvlmAttendGrid", lambda qkv, *_: [*qkv[:-1], qkv[-1] // 3])

    def construct(self, qkv, padding, row_table, column_table):
        """Attends in windows of r x c tokens.

        Args:
            qkv: (N, rows, columns, 3 * H * D), queries, keys and values.
            padding: (3 * H * D,), those of a zero token.
            row_table, column_table: (2 r - 1, D) and (2 c - 1, D), see `RelativePositionAttention`.

        Returns:
            (N, rows, columns, H * D).
        """
        return self.attend(qkv, padding, row_table, column_table)


class Patches(nn.Cell):
    """Patches of size P as rows: x (N, I, height, width) -> (N * rows * columns, I * P * P)."""

    def __init__(self, library: Library, size: int):
        super().__init__()
        self.gather = operator(
            library, "MindvlmPatches", lambda x, _: [x[0] * (x[2] // size) * (x[3] // size), x[1] * size * size], size
        )
        self.size = Tensor(np.array([size], np.int32))

    def construct(self, x):
        return self.gather(x, self.size)


class Neighbourhoods(nn.Cell):
    """3 x 3 neighbourhoods as rows: x (N, rows, columns, I) -> (N * output rows * output columns, I * 9)."""

    def __init__(self, library: Library, stride: int):
        super().__init__()
        self.gather = operator(
            library,
            "MindvlmNeighbourhoods",
            lambda x, _: [x[0] * -(-x[1] // stride) * -(-x[2] // stride), 9 * x[3]],
            stride,
        )
        self.stride = Tensor(np.array([stride], np.int32))

    def construct(self, x):
        return self.gather(x, self.stride)


class JointProducts(nn.Cell):
    """Products of one input in one operator.

    Args:
        num_outputs: output features of each.
    """

    def __init__(self, library: Library, num_outputs: tuple[int, ...]):
        super().__init__()
        self.multiply = ops.Custom(
            f"{library.path}:MindvlmProducts",
            lambda x, *_: tuple([*x[:-1], count] for count in num_outputs),
            lambda *_: (ms.float32,) * len(num_outputs),
            func_type="aot",
        )
        self.multiply.add_prim_attr("width", num_outputs)

    def construct(self, x, *matrices):
        """x (..., in_features), the handles of all products, then their biases or nothing -> tuple of outputs."""
        return self.multiply(x, *matrices)


class NativeLinear(nn.Cell):
    """Computes `Linear`: x (..., in_features), the handle of its product, and its bias if it has one."""

    def __init__(self, library: Library, num_outputs: int):
        super().__init__()
        self.multiply = operator(library, "MindvlmProducts", lambda x, *_: [*x[:-1], num_outputs], num_outputs)

    def construct(self, x, *matrix):
        return self.multiply(x, *matrix)


class NativePlainMLP(nn.Cell):
    """Computes `PlainMLP`: x (..., hidden_size), the handles of both Linears, then their biases or nothing."""

    def __init__(self, library: Library, kernel: str, num_outputs: int):
        super().__init__()
        self.run = operator(library, "MindvlmMlp", lambda x, *_: [*x[:-1], num_outputs], num_outputs)
        self.kind = activation_kind(kernel)

    def construct(self, x, first, second, *biases):
        return self.run(x, first, second, self.kind, *biases)


class NativeGatedMLP(nn.Cell):
    """Computes `GatedMLP` with SiLU: x (..., hidden_size), handles of gate, up and down -> the shape of x."""

    def __init__(self, library: Library):
        super().__init__()
        self.run = operator(library, "MindvlmGatedMlp", first_shape)

    def construct(self, x, gate, up, down):
        return self.run(x, gate, up, down)


class NativeActivation(nn.Cell):
    """Computes an `Activation`: x -> the shape of x."""

    def __init__(self, library: Library, kernel: str):
        super().__init__()
        self.apply = operator(library, "MindvlmActivation", first_shape)
        self.kind = activation_kind(kernel)

    def construct(self, x):
        return self.apply(x, self.kind)


def activation_kind(kernel: str) -> Tensor:
    """Returns the number of an activation for operators, (1,) int32."""
    return Tensor(np.array([ACTIVATION_KERNELS.index(kernel)], np.int32))


class NativeGatedSiLU(nn.Cell):
    """silu(gate) * up."""

    def __init__(self, library: Library):
        super().__init__()
        self.multiply = operator(library, "MindvlmGatedSilu", first_shape)

    def construct(self, gate, up):
        return self.multiply(gate, up)
